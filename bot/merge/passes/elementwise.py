"""Methods of one pass: every element follows from the elements at its place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bot.merge.methods.choice import TINY_DISTANCE
from bot.merge.passes.inputs import Emit, Inputs, Piece


def linear(inputs: Inputs) -> Emit:
    """sum(w_i x_i), then divided by sum(w_i)."""
    weight = inputs.values("weight")
    divisor = sum(weight) if inputs.work.shared["normalize"] else 1.0

    def emit(piece: Piece) -> Tensor:
        out = weighted(piece.x, weight)
        return out if divisor == 1.0 else out.div_(divisor)

    return emit


def passthrough(inputs: Inputs) -> Emit:
    """x, or x times `scale`."""
    scale = inputs.work.per_input["scale"][0]
    return lambda piece: piece.tensors[0] if scale is None else piece.tensors[0].mul_(scale)


def task_arithmetic(inputs: Inputs) -> Emit:
    """b + lambda sum(w_i d_i), the sum divided by sum(w_i) if asked."""
    weight, lambda_ = inputs.values("weight"), float(inputs.work.shared["lambda"])
    total = sum(weight)
    divisor = total if inputs.work.shared["normalize"] and abs(total) >= 1e-8 else 1.0

    def emit(piece: Piece) -> Tensor:
        out, *rest = [delta.mul_(w) for delta, w in zip(piece.deltas(), weight, strict=True)]
        for vote in rest:
            out.add_(vote)
        return added(out, divisor, lambda_, piece.b)

    return emit


def added(total: Tensor, divisor: float, lambda_: float, base: Tensor) -> Tensor:
    """base + lambda * total / divisor, in the place of total."""
    if divisor != 1.0:
        total.div_(divisor)
    if lambda_ != 1.0:
        total.mul_(lambda_)
    return total.add_(base)


def weighted(x: Sequence[Tensor], weight: Sequence[float]) -> Tensor:
    """sum(w_i x_i) in the place of x_0."""
    out = x[0].mul_(weight[0])
    for x_i, w_i in zip(x[1:], weight[1:], strict=True):
        out.add_(x_i, alpha=w_i)
    return out


def nearswap(inputs: Inputs) -> Emit:
    """w x + (1 - w) b with w = clamp(t / |b - x|, 0, 1)."""
    t = float(inputs.work.shared["t"])

    def emit(piece: Piece) -> Tensor:
        (x,), b = piece.x, piece.b
        w = torch.sub(b, x, out=inputs.buffer("w", b)).abs_().clamp_(min=TINY_DISTANCE)
        w.reciprocal_().mul_(t).clamp_(0, 1)
        x.mul_(w)
        return x.add_(b.mul_(w.neg_().add_(1)))

    return emit


def ram(inputs: Inputs) -> Emit:
    """b + the mean of the deltas larger than epsilon."""
    epsilon = float(inputs.work.shared["epsilon"])

    def emit(piece: Piece) -> Tensor:
        total, count = inputs.buffer("total", piece.b).zero_(), inputs.buffer("count", piece.b).zero_()
        changed = inputs.buffer("changed", piece.b)
        for delta in piece.deltas():
            total.add_(shrunk(delta, epsilon))
            count.add_(torch.ne(delta, 0, out=changed))
        return total.div_(count.clamp_(min=1)).add_(piece.b)

    return emit


def shrunk(delta: Tensor, threshold: float) -> Tensor:
    """delta where |delta| > threshold, else 0; in place."""
    out: Tensor = torch.ops.aten.hardshrink.out(delta, threshold, out=delta)
    return out
