"""Cache and forward passes, shared by baseline and Medusa decoding so that neither has an advantage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DummyLayer

from evaluators.medusa.decoding.acceptance import Rule
from evaluators.medusa.drafting.drafters import Drafter
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.trees.tree import Path, Tree


@dataclass(frozen=True, slots=True)
class Step:
    """Result of one decoding step: accepted nodes, tokens after the root, next hidden state [H].

    A fused step overwrites `hidden` at the next step. The other fields are valid only if `finite`.
    """

    path: Path
    block: list[int]
    hidden: Tensor
    finite: bool


class Runner(Protocol):
    """A cache and its forward passes, for a batch of one.

    Invariant between calls of the loop: the cache holds exactly the first `length` tokens.
    """

    base: Base
    length: int

    @property
    def execution(self) -> str:
        """Kind of execution: `eager`, `packed`, `static` or `cuda_graph`, and the reason if it is not the fastest."""
        ...

    def prepare(self, drafter: Drafter | None, tree: Tree, rule: Rule, lengths: range) -> Callable[[Tree], Step] | None:
        """Empty the cache and do the work that is done once per shape, before the clock starts.

        `lengths` are the text lengths at which a step may begin. Returns a function that runs a whole step on the
        device for the tree or a cut of it, from drafting to the reduced cache; None if steps cannot be fused.
        """
        ...

    def prefill(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Start a new text with `ids`. Returns h [H] and logits [V] of the last token."""
        ...

    def forward(self, tokens: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
        """Tokens [n] of `tree` after the cached ones -> h [n, H], logits [n, V]. Call `keep` next.

        The logits are valid until the next call.
        """
        ...

    def keep(self, path: Sequence[int]) -> None:
        """Keep only the nodes of `path` (root first) of the last forward pass in the cache, in that order."""
        ...

    def rewind(self, tokens: int) -> None:
        """Remove the last `tokens` cached tokens."""
        ...


class EagerRunner:
    """Runner over a DynamicCache that grows with the text. `reason` explains why no faster runner is used."""

    def __init__(self, base: Base, reason: str | None = None) -> None:
        self.base = base
        self.cache: Any = None
        self.length = 0
        self.execution = base.execution if reason is None else f"{base.execution}: {reason}"
        self._width = 0
        self._text: list[int] = []
        self._tokens: Tensor | None = None
        self._prepared: dict[tuple[tuple[int, ...], ...], tuple[Tensor, Tensor]] = {}

    def prepare(self, drafter: Drafter | None, tree: Tree, rule: Rule, lengths: range) -> None:
        """None: nothing is prepared and steps are not fused."""

    def prefill(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        hidden, logits = self._read(ids)
        self.length, self._width, self._text = len(ids), 0, list(ids)
        return hidden, logits

    def _read(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        self.cache = self.base.new_cache()
        row = torch.tensor([list(ids)], device=self.base.device)
        hidden, logits = self.base.run(row, last_only=True, past_key_values=self.cache, use_cache=True)
        return hidden[0, -1], logits[0, -1]

    def forward(self, tokens: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
        # The baseline (root alone) needs neither a mask nor explicit positions and does not pay for them.
        self._width, self._tokens = tree.nodes, tokens
        if tree.nodes == 1 and self.base.recomputes_at(self.length):
            hidden, logits = self._read([*self._text, *tokens.tolist()])
            return hidden[None], logits[None]
        options: dict[str, Any] = {"past_key_values": self.cache, "use_cache": True}
        if tree.nodes > 1:
            depth, bias = self._prepare(tree)
            mask = torch.zeros((tree.nodes, self.length + tree.nodes), dtype=self.base.dtype, device=self.base.device)
            mask[:, self.length :] = bias
            positions = (depth + self.length)[None]
            last = self.length + tree.max_depth
            options["attention_mask"] = masks_of(self.base, mask[None, None], positions[None], last)
            options["position_ids"] = positions
        hidden, logits = self.base.run(tokens[None], **options)
        return hidden[0], logits[0]

    def keep(self, path: Sequence[int]) -> None:
        kept = len(path)
        if (self.base.cache_name is None or self.base.recompute_length is not None) and self._tokens is not None:
            self._text[self.length :] = self._tokens[list(path)].tolist()
        if list(path) != list(range(kept)):
            # Advanced indexing copies its right-hand side first, so overlapping source and target rows are safe.
            source = torch.tensor([self.length + node for node in path], device=self.base.device)
            target = slice(self.length, self.length + kept)
            for layer in self.cache.layers:
                if isinstance(layer, DummyLayer):
                    continue
                layer.keys[:, :, target] = layer.keys[:, :, source]
                layer.values[:, :, target] = layer.values[:, :, source]
        if self._width > kept:
            self.cache.crop(kept - self._width)
        self.length += kept
        self._width = 0

    def rewind(self, tokens: int) -> None:
        self.cache.crop(-tokens)
        self.length -= tokens
        del self._text[self.length :]

    def _prepare(self, tree: Tree) -> tuple[Tensor, Tensor]:
        """Depths [n] of the nodes and the additive mask [n, n] among them, computed once per tree."""
        if tree.paths not in self._prepared:
            self._prepared[tree.paths] = (torch.tensor(tree.depth, device=self.base.device), bias_of(self.base, tree))
        return self._prepared[tree.paths]


def bias_of(base: Base, tree: Tree) -> Tensor:
    """Additive mask [n, n] among the nodes of a tree."""
    visible = torch.tensor(tree.visible(), device=base.device)
    # finfo.min, not -inf: a row of -inf would give NaN in some kernels.
    bias = torch.zeros(visible.shape, dtype=base.dtype, device=base.device)
    return bias.masked_fill_(~visible, torch.finfo(base.dtype).min)


def masks_of(base: Base, mask: Tensor, positions: Tensor, last: int) -> Tensor | dict[str, Tensor]:
    """The mask [B, 1, n, L + n] in the form that the model takes; nodes are at `positions` [B, 1, n] up to `last`."""
    return mask if base.window is None else base.window.masks(mask, positions, last)
