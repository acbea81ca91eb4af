"""Inner products and linear combinations of inputs that arrive chunk by chunk.

Methods that return a combination of their inputs run on the Gram matrix G[i, j] = v_i . v_j: one pass forms it, the
method computes N coefficients from it in float64, a second pass forms sum(c_i v_i). |sum c_i v_i|^2 = c'Gc.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bot.merge.streaming.inputs import Chunk, Inputs, Kernel

SHORT = 2**12  # elements: rounding errors do not average out over so few
NEARLY_DEPENDENT = 1e-4  # smallest eigenvalue of the cosines of vectors that may cancel

Vector = NDArray[np.float64]
Vectors = Callable[[Chunk], Sequence[Tensor]]  # the vectors of one chunk


def gram(inputs: Inputs, vectors: Vectors, count: int, weight: Sequence[float] = ()) -> Vector:
    """Gram matrix (count, count) of the flattened vectors, which will be summed with the signs of `weight`.

    Products are formed in float32 where their rounding errors average out. They are formed in float64 if they leave
    the range of float32, or if the signed vectors nearly cancel, since the rules for corner cases depend on the rest.
    """
    if inputs.dtype == torch.float64 or inputs.count <= SHORT:
        return _gram(inputs, vectors, count, torch.float64)
    g = _gram(inputs, vectors, count, inputs.dtype)
    squares = np.diag(g)
    if np.isfinite(squares).all() and (squares > 1e-25 * inputs.count).all():
        cosines = g / np.sqrt(np.outer(squares, squares))
        signs = np.sign(np.array(weight or [1.0] * count))
        opposite = bool((cosines * np.outer(signs, signs) < 0).any())
        if not (opposite and np.linalg.eigvalsh(cosines)[0] < NEARLY_DEPENDENT):
            return g
    return _gram(inputs, vectors, count, torch.float64)


def _gram(inputs: Inputs, vectors: Vectors, count: int, dtype: torch.dtype) -> Vector:
    out = np.zeros((count, count))
    for chunk in inputs.chunks():
        parts = vectors(chunk)
        buffer = inputs.scratch.get("product", parts[0].numel(), dtype, inputs.device)
        for i in range(count):
            for j in range(i, count):
                out[i, j] += inner(parts[i], parts[j], buffer)
    return np.triu(out) + np.triu(out, 1).T


def inner(x: Tensor, y: Tensor, buffer: Tensor) -> float:
    """x . y of two flat tensors. Products are formed and summed (pairwise) in the dtype of `buffer`, of their length.

    In float32 the rounding errors of a sum of 2^18 products average out to 4e-8 of the sum of their magnitudes.
    """
    if buffer.dtype == x.dtype:
        return float(torch.mul(x, y, out=buffer).sum())
    return float(buffer.copy_(x).mul_(y).sum())


def row_inner(u: Tensor, v: Tensor, buffer: Tensor) -> Tensor:
    """Inner products of the rows, shape (rows, 1); products and sums in float64, the dtype of `buffer`.

    Rounded to float32, the product of two exactly opposite vectors leaves 1 - q^2 at 1e-7: no longer a straight line.
    """
    return buffer.copy_(u).mul_(v).sum(-1, keepdim=True)


def row_buffer(inputs: Inputs, chunk: Chunk, width: int) -> Tensor:
    """A float64 buffer for the products of a chunk, shape (rows, width)."""
    return inputs.scratch.get("product", chunk.stop - chunk.start, torch.float64, inputs.device).view(-1, width)


def length(g: Vector, c: Vector) -> float:
    """|sum c_i v_i|."""
    return math.sqrt(max(0.0, float(c @ g @ c)))


def combination(vectors: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """sum(c_i v_i), in place of the v_i.

    Each product is rounded before it is added, not fused into the sum: c v and -c v must cancel exactly.
    """
    out = vectors[0].mul_(factors[0])
    for v_i, c_i in zip(vectors[1:], factors[1:], strict=True):
        out.add_(v_i.mul_(c_i))
    return out


def combined_deltas(factors: Sequence[float] | Vector) -> Kernel:
    """Kernel of b + sum(c_i (x_i - b)); without a base, of sum(c_i x_i)."""

    def kernel(chunk: Chunk) -> Tensor:
        out = combination(chunk.deltas(), [float(c) for c in factors])
        return out if chunk.base is None else out.add_(chunk.b)

    return kernel


def total(tensors: Sequence[Tensor]) -> Tensor:
    """The sum in order, in place of the first tensor."""
    out, *rest = tensors
    for tensor in rest:
        out.add_(tensor)
    return out


def add_to_base(change: Tensor, divisor: float, lambda_: float, base: Tensor) -> Tensor:
    """base + lambda * change / divisor, in place of `change`."""
    if divisor != 1.0:
        change.div_(divisor)
    if lambda_ != 1.0:
        change.mul_(lambda_)
    return change.add_(base)
