"""Acceptance rules: which drafted tokens are accepted, and which token comes next.

`Greedy` gives the greedy text of the base. `Typical` is Medusa's rule and approximate: its text does not follow the
distribution of the base. `Exact` samples from the distribution of the base, one draw per emitted token, with noise
keyed by (seed, absolute position): baseline sampling with the same key gives the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from evaluators.medusa.trees.tree import Path, Tree


class Rule(Protocol):
    def pick(self, logits: Tensor, position: int) -> int:
        """Token at absolute `position`, from the logits [V] of the token before it."""
        ...

    def accept(self, tree: Tree, tokens: Sequence[int], logits: Tensor, length: int) -> tuple[Path, int]:
        """Node tokens [n] (root first, at position `length`) and logits [n, V] -> accepted nodes, next root."""
        ...


@dataclass(frozen=True, slots=True)
class Greedy:
    """Accept the nodes that equal the argmax of the base."""

    def pick(self, logits: Tensor, position: int) -> int:
        return int(logits.argmax())

    def accept(self, tree: Tree, tokens: Sequence[int], logits: Tensor, length: int) -> tuple[Path, int]:
        best: list[int] = logits.argmax(dim=-1).tolist()
        path = [0]
        while (child := _child_with(tree, path[-1], tokens, best[path[-1]])) is not None:
            path.append(child)
        return tuple(path), best[path[-1]]


@dataclass(frozen=True, slots=True)
class Typical:
    """Accept x iff p(x) > min(eps, delta * exp(-H(p))), H with log(p + 1e-5) (arXiv 2401.10774, section 2.3.1).

    The deepest path of accepted nodes is chosen, ties by the larger sum of log p; the next root is the argmax.
    """

    temperature: float = 0.7
    eps: float = 0.09
    delta: float = 0.3

    def pick(self, logits: Tensor, position: int) -> int:
        return int(logits.argmax())

    def accept(self, tree: Tree, tokens: Sequence[int], logits: Tensor, length: int) -> tuple[Path, int]:
        p = torch.softmax(logits.float() / max(self.temperature, 1e-6), dim=-1)
        threshold = self.threshold(p)
        parents = torch.tensor(tree.parent[1:], dtype=torch.long, device=p.device)
        chosen = p[parents, torch.tensor(tokens[1:], dtype=torch.long, device=p.device)]
        good = (chosen > threshold[parents]).tolist()
        log_p = torch.log(chosen).tolist()
        score: dict[int, tuple[int, float]] = {0: (0, 0.0)}
        for node in range(1, tree.nodes):
            above = score.get(tree.parent[node])
            if above is not None and good[node - 1]:
                score[node] = (above[0] + 1, above[1] + log_p[node - 1])
        last = max(score, key=lambda node: score[node])
        return tree.ancestors(last), int(logits[last].argmax())

    def threshold(self, p: Tensor) -> Tensor:
        """Probabilities [.., V] -> smallest accepted probability [..]."""
        entropy = -(p * torch.log(p + 1e-5)).sum(dim=-1)
        return torch.clamp(self.delta * torch.exp(-entropy), max=self.eps)


@dataclass(frozen=True, slots=True)
class Exact:
    """Sample from the base: draw at each visited node and continue while a child holds the drawn token.

    `top_k` and `top_p` cut the distribution first; 0 and 1.0 turn them off.
    """

    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def pick(self, logits: Tensor, position: int) -> int:
        scores = self._cut(logits.float().cpu() / self.temperature)
        # Gumbel-max: argmax(score + Gumbel noise) is one draw from softmax(score). The key holds
        # the position, so the draw does not depend on the number of tokens per step.
        # Philox takes both numbers in full; torch's CPU generator would use only 32 bits of a seed.
        noise = np.random.Philox(key=np.array([self.seed % (1 << 64), position], dtype=np.uint64))
        uniform = torch.from_numpy(np.random.Generator(noise).random(len(scores))).clamp_min(1e-300)
        return int((scores.double() - torch.log(-torch.log(uniform))).argmax())

    def accept(self, tree: Tree, tokens: Sequence[int], logits: Tensor, length: int) -> tuple[Path, int]:
        path = [0]
        while True:
            drawn = self.pick(logits[path[-1]], length + len(path))
            child = _child_with(tree, path[-1], tokens, drawn)
            if child is None:
                return tuple(path), drawn
            path.append(child)

    def _cut(self, scores: Tensor) -> Tensor:
        if self.top_k:
            scores = scores.masked_fill(scores < scores.topk(min(self.top_k, len(scores))).values[-1], -torch.inf)
        if self.top_p < 1.0:
            ordered, order = scores.sort(descending=True)
            p = ordered.softmax(-1)
            scores = scores.masked_fill(
                torch.zeros_like(p, dtype=torch.bool).scatter(0, order, p.cumsum(-1) - p >= self.top_p), -torch.inf
            )
        return scores


def _child_with(tree: Tree, node: int, tokens: Sequence[int], token: int) -> int | None:
    return next((child for child in tree.children[node] if tokens[child] == token), None)


GREEDY = Greedy()
