"""The task-vector family: masks first (thresholds, L1 norms), then delta, mask, weight, elect, sum, element by element.

Steps (1) to (9) of merging.md 2.2 are in `methods/task_vectors.py` in their plain form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bot.merge.methods.masks import band, kept
from bot.merge.methods.reductions import Selection
from bot.merge.methods.task_vectors import l1_match
from bot.merge.passes.election import Election
from bot.merge.passes.elementwise import added
from bot.merge.passes.inputs import Emit, Inputs, Piece
from bot.merge.passes.random_masks import Kept, Mask, by_chance, by_rank
from bot.merge.passes.ranks import Shrinker, select

ELECTS = {
    "ties": True, "breadcrumbs": False, "breadcrumbs_ties": True, "dare_linear": False, "dare_ties": True,
    "della": True, "della_linear": False,
}  # fmt: skip


def family(inputs: Inputs) -> Emit:
    """b + lambda * combined masked deltas."""
    work, shared = inputs.work, inputs.work.shared
    weight, lambda_ = inputs.values("weight"), float(shared["lambda"])
    masks = _masks(inputs)
    factors = [w * f for w, f in zip(weight, _rescales(inputs, masks), strict=True)] if shared["rescale"] else weight
    elects, normalize = ELECTS[work.method], bool(shared["normalize"])
    by_count = bool(shared.get("naive_count"))
    total = sum(weight)
    divisor = total if normalize and abs(total) >= 1e-8 else 1.0
    for mask in masks:
        mask.rewind()

    def emit(piece: Piece) -> Tensor:
        deltas = zip(piece.deltas(), masks, factors, strict=True)
        votes = [_times(mask.apply(delta, piece.start), factor) for delta, mask, factor in deltas]
        if elects:
            return added(Election(inputs, votes, weight).mean_or_sum(normalize, by_count), 1.0, lambda_, piece.b)
        for vote in votes[1:]:
            votes[0].add_(vote)
        return added(votes[0], divisor, lambda_, piece.b)

    return emit


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else tensor.mul_(factor)


def _rescales(inputs: Inputs, masks: Sequence[Mask]) -> list[float]:
    """The L1 match of every input: one pass over its delta and the masked delta."""
    whole, rest = [0.0] * inputs.n, [0.0] * inputs.n
    if all(type(mask) is Mask for mask in masks):
        return [1.0] * inputs.n
    for piece in inputs.pieces():
        room = inputs.buffer("magnitude", piece.b)
        for i, (delta, mask) in enumerate(zip(piece.deltas(), masks, strict=True)):
            whole[i] += float(torch.abs(delta, out=room).sum())
            rest[i] += float(torch.abs(mask.apply(delta, piece.start), out=room).sum())
    return [l1_match(a, c) for a, c in zip(whole, rest, strict=True)]


class Nothing(Mask):
    """Keeps nothing."""

    def apply(self, delta: Tensor, start: int) -> Tensor:
        return delta.zero_()


class Largest(Mask):
    """Keeps the largest (ties)."""

    def __init__(self, chosen: Selection, wide: torch.dtype) -> None:
        self._chosen, self._wide = chosen, wide
        self.rewind()

    def rewind(self) -> None:
        self._shrink = Shrinker(self._chosen, self._wide)

    def apply(self, delta: Tensor, start: int) -> Tensor:
        return self._shrink(delta)


class Band(Mask):
    """Keeps those of the outer selection that the inner one does not have (breadcrumbs)."""

    def __init__(self, inner: Selection, outer: Selection, inputs: Inputs) -> None:
        self._inner, self._outer, self._inputs = inner, outer, inputs
        self.rewind()

    def rewind(self) -> None:
        self._inside = Shrinker(self._inner, self._inputs.wide)
        self._around = Shrinker(self._outer, self._inputs.wide)

    def apply(self, delta: Tensor, start: int) -> Tensor:
        inside = self._inside(self._inputs.buffer("inside", delta).copy_(delta))
        return self._around(delta).sub_(inside)


def _masks(inputs: Inputs) -> list[Mask]:
    method, densities = inputs.work.method, inputs.values("density")
    if method == "ties" or method.startswith("breadcrumbs"):
        return _by_size(inputs, densities)
    keys = [inputs.work.keys[i] for i in inputs.others]
    epsilons = inputs.values("epsilon") if method.startswith("della") else []
    again = bool(inputs.work.shared["rescale"])  # two passes: keep the bits of the first
    out: list[Mask] = []
    for i, density in enumerate(densities):
        if density >= 1:
            out.append(Mask())
        elif density <= 0:
            out.append(Nothing())
        elif epsilons:
            width = inputs.work.shape[-1] if inputs.work.shape else 1
            out.append(Kept(by_rank(density, epsilons[i], keys[i], width), inputs, again))
        else:
            out.append(Kept(by_chance(density, keys[i]), inputs, again))
    return out


def _by_size(inputs: Inputs, densities: Sequence[float]) -> list[Mask]:
    ties, n = inputs.work.method == "ties", inputs.count
    gammas = [0.0] * inputs.n if ties else inputs.values("gamma")
    ks: list[tuple[int, ...]] = []
    for density, gamma in zip(densities, gammas, strict=True):
        ks.append(() if density >= 1 else (kept(n, density),) if ties else band(n, density, gamma))
    chosen = select(inputs, lambda piece: [delta.abs_() for delta in piece.deltas()], ks)
    out: list[Mask] = []
    for one in chosen:
        match one:
            case []:
                out.append(Mask())
            case [only]:
                out.append(Largest(only, inputs.wide))
            case _:
                out.append(Band(one[0], one[1], inputs))
    return out
