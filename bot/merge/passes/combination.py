"""Methods that return a combination of their inputs: inner products first, then one sum. See methods/gram.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from bot.merge.methods.gram import Vector, pair_dot
from bot.merge.methods.model_stock import TINY_PRODUCT, share
from bot.merge.methods.slerp import TINY_NORM, coefficients
from bot.merge.methods.spherical import TINY_NORM as TINY_ARC
from bot.merge.methods.spherical import centre, flat_arc, interpolation, one_step, vanishes
from bot.merge.passes.inputs import Emit, Inputs, Piece

FEW = 2**12  # elements: rounding errors do not average out over so few
NEARLY_DEPENDENT = 1e-4  # smallest eigenvalue of the cosines of vectors that may cancel

Vectors = Callable[[Piece], Sequence[Tensor]]  # those whose inner products are taken, of one piece


def slerp(inputs: Inputs) -> Emit:
    """The arc from the base to the other model."""

    def ends(piece: Piece) -> list[Tensor]:
        return [piece.b, *piece.x]

    g = _gram(inputs, ends, 2)
    inputs.corner("ZERO_TENSOR", int(bool((np.diag(g) <= TINY_NORM**2).any())))
    factors = coefficients(g, float(inputs.work.shared["t"]))
    return lambda piece: _combined(ends(piece), factors)


def nuslerp(inputs: Inputs) -> Emit:
    """The arc between two models or two deltas, whole tensors as vectors."""
    g = _gram(inputs, Piece.deltas, 2)
    inputs.corner("ZERO_TENSOR", int(bool((np.diag(g) <= TINY_ARC**2).any())))
    return _of_deltas(inputs, flat_arc(g, interpolation(inputs.values("weight"))))


def multislerp(inputs: Inputs) -> Emit:
    """One step on the sphere from the weighted mean direction."""
    if inputs.n == 1:
        return lambda piece: piece.x[0]
    shared, weight = inputs.work.shared, inputs.values("weight")
    g = _gram(inputs, Piece.deltas, inputs.n, weight)
    normalize, eps = bool(shared["normalize_weights"]), float(shared["eps"])
    inputs.corner("MEAN_VANISHES", int(vanishes(g, weight, normalize, eps)))
    return _of_deltas(inputs, one_step(g, weight, normalize, eps))


def karcher(inputs: Inputs) -> Emit:
    """The centre of mass of the directions, times the mean length."""
    if inputs.n == 1:
        return lambda piece: piece.tensors[0]
    g = _gram(inputs, Piece.deltas, inputs.n)
    shared = inputs.work.shared
    factors, skipped = centre(g, int(shared["max_iter"]), float(shared["tol"]))
    inputs.corner("ANTIPODAL", int(skipped))
    return _of_deltas(inputs, factors)


def model_stock(inputs: Inputs) -> Emit:
    """t mean(x) + (1 - t) b, t from the angles between the deltas."""
    g = _gram(inputs, Piece.deltas, inputs.n)
    norms = np.sqrt(np.diag(g))
    inputs.corner(
        "COSINE_DAMPED", int(bool((np.outer(norms, norms)[np.triu_indices(inputs.n, 1)] < TINY_PRODUCT).any()))
    )
    t = float(share(torch.from_numpy(g)).to(inputs.wide))

    def emit(piece: Piece) -> Tensor:
        out, *rest = piece.x
        for x_i in rest:
            out.add_(x_i)
        return out.div_(inputs.n).mul_(t).add_(piece.b.mul_(1 - t))

    return emit


def _of_deltas(inputs: Inputs, factors: Sequence[float] | Vector) -> Emit:
    def emit(piece: Piece) -> Tensor:
        out = _combined(piece.deltas(), [float(c) for c in factors])
        return out if piece.base is None else out.add_(piece.b)

    return emit


def _combined(v: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """sum(c_i v_i) in the place of the v_i.

    Products are rounded one like the other, not fused into the sum: where c v and -c v meet, nothing is left over.
    """
    out = v[0].mul_(factors[0])
    for v_i, c_i in zip(v[1:], factors[1:], strict=True):
        out.add_(v_i.mul_(c_i))
    return out


def _gram(inputs: Inputs, vectors: Vectors, count: int, weight: Sequence[float] = ()) -> Vector:
    """Inner products of `count` vectors, to be weighted with these signs.

    Products are formed in float32 where their rounding errors average out, and in float64 if they leave its range or
    the vectors, so signed, nearly cancel: what is left of them decides between the rules for odd cases.
    """
    if inputs.wide == torch.float64 or inputs.count <= FEW:
        return _one_gram(inputs, vectors, count, torch.float64)
    g = _one_gram(inputs, vectors, count, inputs.wide)
    squares = np.diag(g)
    if np.isfinite(squares).all() and (squares > 1e-25 * inputs.count).all():
        cosines = g / np.sqrt(np.outer(squares, squares))
        signs = np.sign(np.array(weight or [1.0] * count))
        opposite = bool((cosines * np.outer(signs, signs) < 0).any())
        if not (opposite and np.linalg.eigvalsh(cosines)[0] < NEARLY_DEPENDENT):
            return g
    return _one_gram(inputs, vectors, count, torch.float64)


def _one_gram(inputs: Inputs, vectors: Vectors, count: int, kind: torch.dtype) -> Vector:
    out = np.zeros((count, count))
    for piece in inputs.pieces():
        parts = vectors(piece)
        room = inputs.scratch.get("product", parts[0].numel(), kind, inputs.feed.device)
        for i in range(count):
            for j in range(i, count):
                out[i, j] += pair_dot(parts[i], parts[j], room)
    return np.triu(out) + np.triu(out, 1).T
