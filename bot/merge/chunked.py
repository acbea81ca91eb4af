"""The fast path: inputs stay in their stored type and are widened chunk by chunk, in the cache. merging.md 5.3.

Each method is one or two passes. The first collects what depends on the whole tensor (a Gram matrix, thresholds, L1
norms), the second computes chunk after chunk and rounds it into the output. Chunks start at fixed places, so results
equal those of the whole-tensor functions in `methods/`, which the tests hold against this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bot.merge.methods import apply
from bot.merge.methods.gram import Vector, combination, gram_of
from bot.merge.methods.masks import band, by_chance, by_rank, kept
from bot.merge.methods.model_stock import blend, share
from bot.merge.methods.reductions import CHUNK, Selection, selection, streamed_selection
from bot.merge.methods.slerp import coefficients
from bot.merge.methods.spherical import centre, flat_arc, interpolation, one_step
from bot.merge.methods.task_vectors import decide, l1_match
from bot.merge.steps import Work

Emit = Callable[[int, int], Tensor]  # elements [start, stop) of the result, wide
Mask = Callable[[Tensor, int], Tensor]  # a piece of a delta, the number of its first element -> masked piece
ELEMENTWISE = frozenset({"linear", "passthrough", "nearswap", "ram", "task_arithmetic"})
FAMILY = {  # method -> elects signs
    "ties": True, "breadcrumbs": False, "breadcrumbs_ties": True, "dare_linear": False, "dare_ties": True,
    "della": True, "della_linear": False,
}  # fmt: skip
GRAM = frozenset({"slerp", "nuslerp", "multislerp", "karcher", "model_stock"})


class Pieces:
    """The inputs of one step as flat pieces: `x` without the base, `b` the base. Elements are counted from 0."""

    def __init__(self, work: Work, stored: Sequence[Tensor], wide: torch.dtype, chunk: int) -> None:
        flat = [tensor.reshape(-1) for tensor in stored]
        self.work, self.wide = work, wide
        self.count = flat[0].numel()
        self.inputs = flat
        self.x = [tensor for i, tensor in enumerate(flat) if i != work.base]
        self.base = None if work.base is None else flat[work.base]
        width = work.shape[-1] if work.shape and rows_matter(work) else 1
        self.chunk = max(1, chunk // max(1, width)) * max(1, width)

    def spans(self) -> Iterator[tuple[int, int]]:
        return ((start, min(self.count, start + self.chunk)) for start in range(0, self.count, self.chunk))

    def widened(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        return tensor[start:stop].to(self.wide)

    def delta(self, i: int, start: int, stop: int) -> Tensor:
        if self.base is None:
            return self.widened(self.x[i], start, stop)
        return self.widened(self.x[i], start, stop) - self.widened(self.base, start, stop)

    def largest(self, i: int, k: int) -> Selection:
        """Which k elements of |d_i| are the largest."""
        if self.wide != torch.float32:
            return selection(self.delta(i, 0, self.count).abs_(), k)
        return streamed_selection(
            lambda: (self.delta(i, start, stop).abs_() for start, stop in self.spans()), self.count, k
        )

    def values(self, name: str) -> list[float]:
        """A parameter of each input but the base."""
        column = self.work.per_input[name]
        return [float(v) for i, v in enumerate(column) if i != self.work.base and v is not None]


def can_stream(work: Work) -> bool:
    """Whether the method has a chunked path; the others work on whole tensors."""
    shared = work.shared
    if work.method == "nuslerp":
        return bool(shared["nuslerp_flatten"])
    if work.method == "model_stock":
        return not shared["filter_wise"]
    return work.method in ELEMENTWISE or work.method in FAMILY or work.method in GRAM


def merge_chunked(
    work: Work, stored: Sequence[Tensor], wide: torch.dtype, target: torch.dtype, chunk: int = CHUNK
) -> Tensor:
    """The merged tensor, flat, in the `target` type. `stored`: the operands in their own types, on the CPU."""
    pieces = Pieces(work, stored, wide, chunk)
    if work.method in FAMILY:
        emit = _family(pieces)
    elif work.method in GRAM:
        emit = _combination(pieces)
    else:
        emit = _elementwise(pieces)
    out = torch.empty(pieces.count, dtype=target)
    for start, stop in pieces.spans():
        out[start:stop] = emit(start, stop)
    return out


def rows_matter(work: Work) -> bool:
    """Whether chunks must hold whole rows."""
    return work.method.startswith("della")


def _elementwise(pieces: Pieces) -> Emit:
    work = pieces.work

    def emit(start: int, stop: int) -> Tensor:
        parts = [pieces.widened(tensor, start, stop) for tensor in pieces.inputs]
        return apply(work.method, parts, work.base, work.per_input, work.shared)

    return emit


def _combination(pieces: Pieces) -> Emit:
    """Methods that return a combination of their inputs: factors from the Gram matrix, then one fused sum."""
    work, base, n = pieces.work, pieces.base, len(pieces.x)

    def vectors(start: int, stop: int) -> list[Tensor]:
        if work.method == "slerp" and base is not None:
            return [pieces.widened(base, start, stop), pieces.widened(pieces.x[0], start, stop)]
        return [pieces.delta(i, start, stop) for i in range(n)]

    if work.method in ("multislerp", "karcher") and n == 1:
        return lambda start, stop: pieces.widened(pieces.x[0], start, stop)
    g = gram_of((vectors(start, stop) for start, stop in pieces.spans()), 2 if work.method == "slerp" else n)
    if work.method == "model_stock" and base is not None:
        t = share(torch.from_numpy(g)).to(pieces.wide)
        return lambda start, stop: blend(
            [pieces.widened(x, start, stop) for x in pieces.x], pieces.widened(base, start, stop), t
        )
    factors = _factors(pieces, g)

    def emit(start: int, stop: int) -> Tensor:
        out = combination(vectors(start, stop), factors)
        return out if base is None or work.method == "slerp" else out.add_(pieces.widened(base, start, stop))

    return emit


def _factors(pieces: Pieces, g: Vector) -> Sequence[float] | Vector:
    shared = pieces.work.shared
    match pieces.work.method:
        case "slerp":
            return coefficients(g, float(shared["t"]))
        case "nuslerp":
            return flat_arc(g, interpolation(pieces.values("weight")))
        case "multislerp":
            return one_step(g, pieces.values("weight"), bool(shared["normalize_weights"]), float(shared["eps"]))
    return centre(g, int(shared["max_iter"]), float(shared["tol"]))


def _family(pieces: Pieces) -> Emit:
    """Task vectors with masks: the masks' thresholds and L1 norms first, then everything else elementwise."""
    shared, weight = pieces.work.shared, pieces.values("weight")
    recipes = [_mask(pieces, i) for i in range(len(pieces.x))]
    factors = list(weight)
    if shared["rescale"]:
        factors = [w * _rescale(pieces, i, recipes[i]()) for i, w in enumerate(weight)]
    masks = [recipe() for recipe in recipes]
    elects, normalize, lambda_ = FAMILY[pieces.work.method], bool(shared["normalize"]), float(shared["lambda"])

    def emit(start: int, stop: int) -> Tensor:
        base = pieces.widened(pieces.inputs[pieces.work.base or 0], start, stop)
        votes = [
            mask(pieces.widened(x, start, stop) - base, start) * factor
            for x, mask, factor in zip(pieces.x, masks, factors, strict=True)
        ]
        return decide(votes, base, weight, elects=elects, normalize=normalize, lambda_=lambda_)

    return emit


def _rescale(pieces: Pieces, i: int, mask: Mask) -> float:
    """The L1 match of input i: one pass over its delta and the masked delta."""
    whole = rest = 0.0
    for start, stop in pieces.spans():
        delta = pieces.delta(i, start, stop)
        whole += float(delta.abs().sum())
        rest += float(mask(delta, start).abs().sum())
    return l1_match(whole, rest)


def _mask(pieces: Pieces, i: int) -> Callable[[], Mask]:
    """How to mask the delta of input i; each call of the result starts over at element 0."""
    method, density = pieces.work.method, pieces.values("density")[i]
    keys = [key for j, key in enumerate(pieces.work.keys) if j != pieces.work.base]
    if density >= 1:
        return lambda: lambda delta, start: delta
    if method.startswith("dare"):
        return lambda: lambda delta, start: by_chance(delta, density, keys[i], start)
    if method.startswith("della"):
        epsilon, width = pieces.values("epsilon")[i], pieces.work.shape[-1] if pieces.work.shape else 1
        return lambda: (
            lambda delta, start: by_rank(delta.reshape(-1, width), density, epsilon, keys[i], start).reshape(-1)
        )
    if method == "ties":
        chosen = pieces.largest(i, kept(pieces.count, density))

        def largest() -> Mask:
            fresh = chosen.again()
            return lambda delta, start: fresh.shrink(delta)

        return largest
    inner, outer = (pieces.largest(i, k) for k in band(pieces.count, density, pieces.values("gamma")[i]))

    def middle() -> Mask:
        inside, around = inner.again(), outer.again()
        return lambda delta, start: around.shrink(delta) - inside.shrink(delta)

    return middle
