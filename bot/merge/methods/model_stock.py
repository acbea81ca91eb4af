"""model_stock: how far to go from the base towards the mean, from the angles between the deltas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bot.merge.methods.gram import gram, row_dot
from bot.merge.methods.task_vectors import sum_of

TINY_PRODUCT = 1e-6


def model_stock(x: Sequence[Tensor], b: Tensor, *, filter_wise: bool) -> Tensor:
    """t mean(x) + (1 - t) b with t = N q / (1 + (N-1) q), q the mean cosine between deltas. arXiv:2403.19522.

    filter_wise: one q per row (a vector is one row), else one per tensor. t is not clamped.
    """
    deltas = [x_i - b for x_i in x]
    products = _row_products(deltas) if filter_wise else torch.from_numpy(gram(deltas)).to(b.device)
    return blend(x, b, share(products).to(b.dtype))


def blend(x: Sequence[Tensor], b: Tensor, t: Tensor) -> Tensor:
    """t mean(x) + (1 - t) b."""
    return sum_of(x).div_(len(x)).mul_(t).add_((1 - t) * b)


def share(products: Tensor) -> Tensor:
    """t from the inner products (N, N, ...) of the deltas, float64."""
    n = len(products)
    norms = [products[i, i].sqrt() for i in range(n)]
    cosines = [
        (products[i, j] / (norms[i] * norms[j]).clamp(min=TINY_PRODUCT)).clamp(-1, 1)
        for i in range(n)
        for j in range(i + 1, n)
    ]
    q = sum_of(cosines) / len(cosines)
    divisor = 1 + (n - 1) * q
    vanishes = divisor.abs() < 1e-6
    return torch.where(vanishes, torch.zeros_like(q), n * q / torch.where(vanishes, torch.ones_like(q), divisor))


def _row_products(deltas: Sequence[Tensor]) -> Tensor:
    """Inner products per row, float64, shape (N, N, ..., 1)."""
    return torch.stack([torch.stack([row_dot(d_i, d_j) for d_j in deltas]) for d_i in deltas])
