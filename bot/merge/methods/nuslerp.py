"""nuslerp: the arc between two models, or between their task vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bot.merge.methods.registry import WEIGHT, Base, Missing, flag, merge_method
from bot.merge.streaming.operation import Operation, row_width

if TYPE_CHECKING:
    from torch import Tensor

    from bot.merge.streaming.inputs import Chunk, Inputs, Kernel

STRAIGHT_SINE2 = 6e-8  # 1 - cos^2 of two vectors that float32 cannot tell from colinear ones
TINY_NORM = 1e-7


def _columns(operation: Operation) -> bool:
    """True if vectors run along dimension 0."""
    by_row = not operation.shared["nuslerp_flatten"]
    return by_row and bool(operation.shared["nuslerp_row_wise"]) and len(operation.shape) > 1


def _row_length(operation: Operation) -> int:
    if operation.shared["nuslerp_flatten"]:
        return 1
    return max(1, math.prod(operation.shape[1:])) if _columns(operation) else row_width(operation)


def _state_bytes(operation: Operation, itemsize: int) -> int:
    """Sums per column in float64."""
    if not operation.shared["nuslerp_row_wise"]:
        return 0
    return 12 * 8 * (operation.elements // max(1, operation.shape[0] if operation.shape else 1))


@merge_method(
    "nuslerp",
    base=Base.OPTIONAL,
    inputs=(2, 2),
    per_input=(WEIGHT,),
    shared=(flag("nuslerp_flatten", True), flag("nuslerp_row_wise", False)),
    missing=Missing.ONE,
    reference="mergekit",
    row_length=_row_length,
    state_bytes=_state_bytes,
)
def nuslerp(inputs: Inputs) -> Kernel:
    """The arc between two models, or between their deltas to a base, at t = w_2 / (w_1 + w_2).

    Vectors are whole tensors; without `nuslerp_flatten` rows (last dimension), with `nuslerp_row_wise` as well vectors
    along dimension 0. Chunks hold whole rows, so rows need one pass; columns need a first pass that sums products.
    """
    if inputs.flag("nuslerp_flatten"):
        return _whole(inputs)
    return _by_column(inputs) if _columns(inputs.operation) else _by_row(inputs)


def interpolation(weight: Sequence[float]) -> float:
    """t = w_2 / (w_1 + w_2); 0.5 if the weights cancel."""
    total = weight[0] + weight[1]
    return 0.5 if abs(total) < 1e-6 else weight[1] / total


def arc(square_1: Tensor, square_2: Tensor, product: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Factors of both ends (float64, elementwise) from squared lengths and inner products."""
    import torch

    cosine = product / square_1.sqrt().clamp(min=TINY_NORM) / square_2.sqrt().clamp(min=TINY_NORM)
    cosine = cosine.clamp(-1, 1)
    straight = 1 - cosine**2 <= STRAIGHT_SINE2
    theta = torch.acos(cosine)
    sine = torch.where(straight, torch.ones_like(theta), torch.sin(theta))
    first = torch.where(straight, torch.full_like(theta, 1 - t), torch.sin((1 - t) * theta) / sine)
    second = torch.where(straight, torch.full_like(theta, t), torch.sin(t * theta) / sine)
    return first, second


def _whole(inputs: Inputs) -> Kernel:
    import numpy as np
    import torch

    from bot.merge.streaming.inputs import Chunk
    from bot.merge.streaming.sums import combined_deltas, gram

    g = gram(inputs, Chunk.deltas, 2)
    inputs.corner_case("ZERO_TENSOR", int(bool((np.diag(g) <= TINY_NORM**2).any())))
    products = torch.from_numpy(g)
    first, second = arc(products[0, 0], products[1, 1], products[0, 1], interpolation(inputs.values("weight")))
    return combined_deltas((float(first), float(second)))


def _by_row(inputs: Inputs) -> Kernel:
    from bot.merge.streaming.sums import row_buffer, row_inner

    t, width = interpolation(inputs.values("weight")), row_width(inputs.operation)

    def kernel(chunk: Chunk) -> Tensor:
        first, second = (delta.view(-1, width) for delta in chunk.deltas())
        buffer = row_buffer(inputs, chunk, width)
        products = (row_inner(u, v, buffer) for u, v in ((first, first), (second, second), (first, second)))
        return _mixed(inputs, chunk, first, second, _factors(inputs, *products, t=t))

    return kernel


def _by_column(inputs: Inputs) -> Kernel:
    import torch

    from bot.merge.streaming.sums import row_buffer

    width = inputs.count // inputs.operation.shape[0]
    sums = torch.zeros(3, 1, width, dtype=torch.float64, device=inputs.device)
    for chunk in inputs.chunks():
        first, second = (delta.view(-1, width) for delta in chunk.deltas())
        buffer = row_buffer(inputs, chunk, width)
        for i, (u, v) in enumerate(((first, first), (second, second), (first, second))):
            sums[i] += buffer.copy_(u).mul_(v).sum(0, keepdim=True)
    factors = _factors(inputs, *sums, t=interpolation(inputs.values("weight")))

    def kernel(chunk: Chunk) -> Tensor:
        first, second = (delta.view(-1, width) for delta in chunk.deltas())
        return _mixed(inputs, chunk, first, second, factors)

    return kernel


def _factors(inputs: Inputs, square_1: Tensor, square_2: Tensor, product: Tensor, *, t: float) -> tuple[Tensor, Tensor]:
    """`arc`, counting vectors of zeros."""
    inputs.corner_case("ZERO_TENSOR", int(((square_1 <= TINY_NORM**2) | (square_2 <= TINY_NORM**2)).sum()))
    return arc(square_1, square_2, product, t)


def _mixed(inputs: Inputs, chunk: Chunk, first: Tensor, second: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
    """c_1 first + c_2 second (+ b), in place of first."""
    c_1, c_2 = (factor.to(inputs.dtype) for factor in factors)
    out = first.mul_(c_1).add_(second.mul_(c_2)).view(-1)
    return out if chunk.base is None else out.add_(chunk.b)
