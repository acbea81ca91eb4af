"""model_stock: the distance to go from the base towards the mean, from the angles between the deltas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bot.merge.methods.registry import Base, Missing, flag, merge_method
from bot.merge.streaming.operation import Operation, row_width

if TYPE_CHECKING:
    from torch import Tensor

    from bot.merge.streaming.inputs import Chunk, Inputs, Kernel

TINY_PRODUCT = 1e-6  # smallest product of two lengths that a cosine is divided by


def _row_length(operation: Operation) -> int:
    return row_width(operation) if operation.shared["filter_wise"] else 1


@merge_method(
    "model_stock",
    base=Base.REQUIRED,
    inputs=(2, None),
    shared=(flag("filter_wise", False),),
    missing=Missing.STOCK,
    reference="arXiv:2403.19522",
    row_length=_row_length,
)
def model_stock(inputs: Inputs) -> Kernel:
    """t mean(x) + (1 - t) b with t = N q / (1 + (N-1) q), q the mean cosine between the deltas.

    One q per tensor, or per row with `filter_wise` (a vector is one row). t is not clamped.
    """
    return _by_row(inputs) if inputs.flag("filter_wise") else _whole(inputs)


def _whole(inputs: Inputs) -> Kernel:
    import numpy as np
    import torch

    from bot.merge.streaming.inputs import Chunk
    from bot.merge.streaming.sums import gram, total

    g = gram(inputs, Chunk.deltas, inputs.n)
    norms = np.sqrt(np.diag(g))
    damped = np.outer(norms, norms)[np.triu_indices(inputs.n, 1)] < TINY_PRODUCT
    inputs.corner_case("COSINE_DAMPED", int(bool(damped.any())))
    t = float(interpolation(torch.from_numpy(g)).to(inputs.dtype))

    def kernel(chunk: Chunk) -> Tensor:
        return total(chunk.x).div_(inputs.n).mul_(t).add_(chunk.b.mul_(1 - t))

    return kernel


def _by_row(inputs: Inputs) -> Kernel:
    import torch

    from bot.merge.streaming.sums import row_buffer, row_inner, total

    width, n = row_width(inputs.operation), inputs.n

    def kernel(chunk: Chunk) -> Tensor:
        x, b = chunk.x, chunk.b
        # the deltas give the angles only: x_i = d_i + b would round again
        buffer = row_buffer(inputs, chunk, width)
        deltas = [torch.sub(x_i, b, out=inputs.buffer(f"delta {i}", b)).view(-1, width) for i, x_i in enumerate(x)]
        products = torch.zeros(n, n, len(buffer), 1, dtype=torch.float64, device=b.device)
        for i in range(n):
            for j in range(i, n):
                products[i, j] = products[j, i] = row_inner(deltas[i], deltas[j], buffer)
        sizes = [products[i, i].sqrt() for i in range(n)]
        damped = [sizes[i] * sizes[j] < TINY_PRODUCT for i in range(n) for j in range(i + 1, n)]
        inputs.corner_case("COSINE_DAMPED", int(torch.stack(damped).any(0).sum()))
        t = interpolation(products).to(inputs.dtype)
        rows = total(x).div_(n).view(-1, width).mul_(t)
        return rows.add_(b.view(-1, width).mul_(1 - t)).view(-1)

    return kernel


def interpolation(products: Tensor) -> Tensor:
    """t from the inner products (N, N, ...) of the deltas, float64."""
    import torch

    n = len(products)
    norms = [products[i, i].sqrt() for i in range(n)]
    cosines: Sequence[Tensor] = [
        (products[i, j] / (norms[i] * norms[j]).clamp(min=TINY_PRODUCT)).clamp(-1, 1)
        for i in range(n)
        for j in range(i + 1, n)
    ]
    q = cosines[0].clone()
    for cosine in cosines[1:]:
        q.add_(cosine)
    q = q / len(cosines)
    divisor = 1 + (n - 1) * q
    vanishes = divisor.abs() < 1e-6
    return torch.where(vanishes, torch.zeros_like(q), n * q / torch.where(vanishes, torch.ones_like(q), divisor))
