"""Methods that see each row, or each vector along dimension 0, as a vector of its own.

Pieces hold whole rows, so rows need one pass. Vectors along dimension 0 run through all pieces: a first pass sums
their inner products, column by column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bot.merge.methods.model_stock import TINY_PRODUCT, share
from bot.merge.methods.spherical import TINY_NORM, arc, interpolation
from bot.merge.passes.inputs import Emit, Inputs, Piece


def width_of(shape: tuple[int, ...]) -> int:
    """The length of a row."""
    return shape[-1] if shape else 1


def nuslerp(inputs: Inputs) -> Emit:
    """The arc between the rows of two models or deltas, or between their vectors along dimension 0."""
    work = inputs.work
    t = interpolation(inputs.values("weight"))
    if work.shared["nuslerp_row_wise"] and len(work.shape) > 1:
        return _across(inputs, t)
    width = width_of(work.shape)

    def emit(piece: Piece) -> Tensor:
        first, second = (delta.view(-1, width) for delta in piece.deltas())
        room = _double(inputs, piece, width)
        products = (_row_sums(u, v, room) for u, v in ((first, first), (second, second), (first, second)))
        return _mixed(inputs, piece, first, second, arc(*_noted(inputs, *products), t))

    return emit


def _across(inputs: Inputs, t: float) -> Emit:
    width = inputs.count // inputs.work.shape[0]
    sums = torch.zeros(3, 1, width, dtype=torch.float64, device=inputs.feed.device)
    for piece in inputs.pieces():
        first, second = (delta.view(-1, width) for delta in piece.deltas())
        room = _double(inputs, piece, width)
        for i, (u, v) in enumerate(((first, first), (second, second), (first, second))):
            sums[i] += room.copy_(u).mul_(v).sum(0, keepdim=True)
    factors = arc(*_noted(inputs, *sums), t)

    def emit(piece: Piece) -> Tensor:
        first, second = (delta.view(-1, width) for delta in piece.deltas())
        return _mixed(inputs, piece, first, second, factors)

    return emit


def _mixed(inputs: Inputs, piece: Piece, first: Tensor, second: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
    """c_1 first + c_2 second (+ b), in the place of first."""
    c_1, c_2 = (factor.to(inputs.wide) for factor in factors)
    out = first.mul_(c_1).add_(second.mul_(c_2)).view(-1)
    return out if piece.base is None else out.add_(piece.b)


def _noted(inputs: Inputs, square_1: Tensor, square_2: Tensor, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inputs.corner("ZERO_TENSOR", int(((square_1 <= TINY_NORM**2) | (square_2 <= TINY_NORM**2)).sum()))
    return square_1, square_2, product


def _row_sums(u: Tensor, v: Tensor, room: Tensor) -> Tensor:
    """Inner products of the rows, shape (rows, 1); products and sums in float64, the type of `room`.

    Rounded to float32, the product of two exactly opposite vectors leaves 1 - q^2 at 1e-7: no longer a straight line.
    """
    return room.copy_(u).mul_(v).sum(-1, keepdim=True)


def _double(inputs: Inputs, piece: Piece, width: int) -> Tensor:
    """A buffer for products, as rows."""
    count, device = piece.stop - piece.start, inputs.feed.device
    return inputs.scratch.get("product", count, torch.float64, device).view(-1, width)


def model_stock(inputs: Inputs) -> Emit:
    """t mean(x) + (1 - t) b with a t for each row."""
    width, n = width_of(inputs.work.shape), inputs.n

    def emit(piece: Piece) -> Tensor:
        x, b = piece.x, piece.b
        # the deltas are needed for the angles only: x_i = d_i + b would round again
        room = _double(inputs, piece, width)
        deltas = [torch.sub(x_i, b, out=inputs.buffer(f"delta {i}", b)).view(-1, width) for i, x_i in enumerate(x)]
        products = torch.zeros(n, n, len(room), 1, dtype=torch.float64, device=b.device)
        for i in range(n):
            for j in range(i, n):
                products[i, j] = products[j, i] = _row_sums(deltas[i], deltas[j], room)
        sizes = [products[i, i].sqrt() for i in range(n)]
        damped = [sizes[i] * sizes[j] < TINY_PRODUCT for i in range(n) for j in range(i + 1, n)]
        inputs.corner("COSINE_DAMPED", int(torch.stack(damped).any(0).sum()))
        t = share(products).to(inputs.wide)
        out, *rest = x
        for x_i in rest:
            out.add_(x_i)
        rows = out.div_(n).view(-1, width).mul_(t)
        return rows.add_(b.view(-1, width).mul_(1 - t)).view(-1)

    return emit
