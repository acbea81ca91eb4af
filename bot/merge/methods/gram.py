"""Methods that return a combination of their inputs work on inner products and coefficients instead of tensors.

One pass over the tensors gives the Gram matrix G[i, j] = v_i . v_j, the method runs on vectors of N coefficients in
float64, a second pass forms sum(c_i v_i). Lengths and angles of any combination follow from G: |sum c_i v_i|^2 = c'Gc.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bot.merge.planning.memory import CHUNK

Vector = NDArray[np.float64]


def gram(v: Sequence[Tensor]) -> Vector:
    """Matrix (N, N) of inner products of the flattened tensors, products and sums in float64."""
    flat = [v_i.reshape(-1) for v_i in v]
    starts = range(0, flat[0].numel(), CHUNK)
    return gram_of(([v_i[start : start + CHUNK] for v_i in flat] for start in starts), len(v))


def gram_of(pieces: Iterable[Sequence[Tensor]], count: int) -> Vector:
    """The same for `count` tensors that come piece by piece."""
    out = np.zeros((count, count))
    for piece in pieces:
        for i in range(count):
            for j in range(i, count):
                room = torch.empty(piece[i].numel(), dtype=torch.float64, device=piece[i].device)
                out[i, j] += pair_dot(piece[i], piece[j], room)
    return np.triu(out) + np.triu(out, 1).T


def pair_dot(x: Tensor, y: Tensor, room: Tensor) -> float:
    """x . y of two flat tensors. The products are formed and summed (pairwise) in the type of `room`, as long as x.

    In float32 the rounding errors of a sum of 2^18 products average out to 4e-8 of the sum of their sizes.
    """
    if room.dtype == x.dtype:
        return float(torch.mul(x, y, out=room).sum())
    return float(room.copy_(x).mul_(y).sum())


def length(g: Vector, c: Vector) -> float:
    """|sum c_i v_i|."""
    return math.sqrt(max(0.0, float(c @ g @ c)))


def combination(v: Sequence[Tensor], c: Sequence[float] | Vector) -> Tensor:
    """A fresh tensor: sum(c_i v_i) in input order.

    Products are rounded one like the other, not fused into the sum: where c v and -c v meet, nothing is left over.
    """
    out = v[0] * float(c[0])
    for v_i, c_i in zip(v[1:], c[1:], strict=True):
        out.add_(v_i * float(c_i))
    return out


def row_dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of the rows (vectors along the last dimension) in float64; shape (..., 1)."""
    width = max(1, x.shape[-1])
    rows_x, rows_y = x.reshape(-1, width), y.reshape(-1, width)
    step = max(1, CHUNK // width)
    parts = [
        (rows_x[i : i + step].double() * rows_y[i : i + step].double()).sum(-1) for i in range(0, len(rows_x), step)
    ]
    return torch.cat(parts).reshape(*x.shape[:-1], 1)
