"""Accuracy and tokens per step of heads on known answers, computed exactly without the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evaluators.medusa.drafting.heads import Heads
from evaluators.medusa.training.distillation import Features
from evaluators.medusa.trees.tree import Tree

RANKS = 10
ROWS = 512


@dataclass(frozen=True, slots=True)
class Accuracy:
    """`shares[k][j]` is the share of the `positions[k]` positions where rank j of head k + 1 is correct.

    A token outside the draft vocabulary counts as incorrect.
    """

    shares: tuple[tuple[float, ...], ...]
    positions: tuple[int, ...]


@torch.no_grad()
def _correct_ranks(heads: Heads, features: Features, k: int) -> tuple[Tensor, Tensor]:
    """(correct [K, T, k] bool, valid [K, T] bool): ranks that equal the generated token."""
    labels = features.labels(heads.spec.heads)
    ranks = [
        heads.ranks(features.hidden[at : at + ROWS], features.tokens[at : at + ROWS], k)
        for at in range(0, len(features.tokens), ROWS)
    ]
    right = torch.cat(ranks, dim=1) == labels[..., None]
    return right, labels >= 0


def accuracy(heads: Heads, features: Features, ranks: int = RANKS) -> Accuracy:
    """Marginal accuracy of each rank of each head on `features`."""
    if not len(features.tokens):
        empty = tuple((0.0,) * ranks for _ in range(heads.spec.heads))
        return Accuracy(empty, (0,) * heads.spec.heads)
    right, valid = _correct_ranks(heads, features, ranks)
    counts = valid.sum(-1)
    shares = (right & valid[..., None]).sum(1).float() / counts.clamp_min(1)[:, None]
    return Accuracy(tuple(tuple(row) for row in shares.tolist()), tuple(counts.tolist()))


def simulate(heads: Heads, features: Features, tree: Tree) -> float:
    """Tokens per step of greedy decoding with these heads and this tree on these answers, without the base."""
    return simulate_each(heads, features, [tree])[0]


def simulate_each(heads: Heads, features: Features, trees: Sequence[Tree]) -> list[float]:
    """`simulate` for several trees from one pass of the heads.

    At row i the root is y_i; node (a1..ad) is correct iff rank a_j of head j at i is y_{i+j} for all j <= d. The step
    emits 1 + d tokens for the deepest correct node.
    """
    topk = max(tree.topk for tree in trees)
    if not topk or not len(features.tokens):
        return [1.0 for _ in trees]
    right, _ = _correct_ranks(heads, features, topk)
    return [_walk(_advance(right, tree), features.lengths) for tree in trees]


def _advance(right: Tensor, tree: Tree) -> list[int]:
    """[K, T, k] -> 1 + depth of the deepest correct node at each row."""
    rows = right.shape[1]
    good: dict[tuple[int, ...], Tensor] = {(): torch.ones(rows, dtype=torch.bool, device=right.device)}
    depth = torch.zeros(rows, dtype=torch.long, device=right.device)
    for path in tree.paths:
        good[path] = good[path[:-1]] & right[len(path) - 1, :, path[-1]]
        depth = torch.maximum(depth, good[path].long() * len(path))
    advance: list[int] = (depth + 1).tolist()
    return advance


def _walk(advance: Sequence[int], lengths: Sequence[int]) -> float:
    tokens = steps = start = 0
    for length in lengths:
        at = 0
        while at < length - 1:
            at += advance[start + at]
            steps += 1
        tokens += max(length - 1, 0)
        start += length
    return tokens / steps if steps else 1.0
