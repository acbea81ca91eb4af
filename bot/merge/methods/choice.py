"""Methods that choose per element between two models: nearswap, arcee_fusion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bot.merge.methods.reductions import sorted_element

SMOOTHING = 1e-8
TINY_DISTANCE = 1e-6


def nearswap(x: Sequence[Tensor], b: Tensor, *, t: float) -> Tensor:
    """Move to the other model where it is near: w x + (1 - w) b, w = clamp(t / |b - x|, 0, 1).

    Source: the model card of QuartetAnemoi-70B-t0.0001.
    """
    w = (t / (b - x[0]).abs_().clamp_(min=TINY_DISTANCE)).clamp_(0, 1)
    return w * x[0] + (1 - w) * b


def arcee_fusion(x: Sequence[Tensor], b: Tensor) -> Tensor:
    """Take the other model's element where its importance stands out, else the base's. A vendor's method, no paper.

    Importance is |x - b| times the KL divergence of the rows' softmaxes, and stands out from median + 1.5 * (third -
    first quartile) on, quantiles being elements of the sorted tensor. The mask is computed in float32 whatever the
    inputs are: the divergence cancels to second order, and its noise is part of the method.
    """
    tuned, base = x[0].float(), b.float()
    importance = (tuned - base).abs_() * row_divergence(tuned, base)
    flat = importance.reshape(-1)
    last = flat.numel() - 1
    median, low, high = (sorted_element(flat, int(f * last)) for f in (0.5, 0.25, 0.75))
    return torch.where(importance >= median + 1.5 * (high - low), x[0], b)


def row_divergence(tuned: Tensor, base: Tensor) -> Tensor:
    """KL divergence of the rows' softmaxes, shape (..., 1)."""
    p, q = torch.softmax(tuned, -1).add_(SMOOTHING), torch.softmax(base, -1).add_(SMOOTHING)
    return torch.div(p, q, out=q).log_().mul_(p).sum(-1, keepdim=True)
