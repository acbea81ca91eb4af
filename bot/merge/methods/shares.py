"""Methods that weigh each delta by what it contributes: sce, ram, ramplus_tl."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bot.merge.methods.reductions import dot, first_largest
from bot.merge.methods.task_vectors import elected_sign, sum_of

FLOOR = 1e-6


def sce(x: Sequence[Tensor], b: Tensor, *, select_topk: float) -> Tensor:
    """Select the elements that vary most, calculate shares from energies, erase minority signs. arXiv:2408.07990.

    The floor of 1e-6 under the shares is mergekit's; ordinary fine-tunes reach it in almost every tensor.
    """
    deltas = [x_i - b for x_i in x]
    if select_topk < 1:
        keep = _most_varying(deltas, select_topk)
        deltas = [delta * keep for delta in deltas]
    energies = [dot(delta, delta) / max(1, b.numel()) for delta in deltas]
    total = sum(energies)
    shares = [1 / len(x)] * len(x) if total < FLOOR else [energy / total for energy in energies]
    sign = elected_sign(deltas)
    top, bottom = torch.zeros_like(b), torch.zeros_like(b)
    for delta, share in zip(deltas, shares, strict=True):
        agreeing = (delta * sign).clamp_(min=0)
        top.add_(agreeing, alpha=share)
        bottom.add_(agreeing.sign_(), alpha=share)
    return top.mul_(sign).div_(bottom.clamp_(min=FLOOR)).add_(b)


def _most_varying(deltas: Sequence[Tensor], select_topk: float) -> Tensor:
    """Mask of the int(select_topk * #nonzero) elements with the largest population variance over the models."""
    mean = sum_of(deltas).div_(len(deltas))
    variance = torch.zeros_like(mean)
    for delta in deltas:
        variance.add_((delta - mean).square_())
    flat = variance.div_(len(deltas)).reshape(-1)
    k = int(int((flat != 0).sum()) * select_topk)
    return first_largest(flat, k).reshape(mean.shape)


def ram(x: Sequence[Tensor], b: Tensor, *, epsilon: float) -> Tensor:
    """Average each element over the models that changed it by more than epsilon. arXiv:2601.13572."""
    active, deltas, count = _active(x, b, epsilon)
    return sum_of([delta * on for delta, on in zip(deltas, active, strict=True)]).div_(count.clamp(min=1)).add_(b)


def ramplus_tl(x: Sequence[Tensor], b: Tensor, *, r: float, alpha: float, epsilon: float) -> Tensor:
    """ram, with what only one model changed raised by its overlap with the others. arXiv:2601.13572."""
    active, deltas, count = _active(x, b, epsilon)
    alone = count == 1
    votes = []
    for delta, on in zip(deltas, active, strict=True):
        shared, own = int((on & ~alone).sum()), int((on & alone).sum())
        boost = 1 + r * max(0.0, min(alpha, overlap(shared, own, epsilon)))
        votes.append(torch.where(alone, delta * boost, delta) * on)
    return sum_of(votes).div_(count.clamp(min=1)).add_(b)


def overlap(shared: int, own: int, epsilon: float) -> float:
    """Elements changed with other models over those changed alone; with none alone and no epsilon, infinite."""
    divisor = max(own, epsilon)
    if not shared:
        return 0.0
    return shared / divisor if divisor else math.inf


def _active(x: Sequence[Tensor], b: Tensor, epsilon: float) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Masks of changed elements, deltas, and in how many models each element changed."""
    deltas = [x_i - b for x_i in x]
    active = [delta.abs() > epsilon for delta in deltas]
    return active, deltas, sum_of([on.to(b.dtype) for on in active])
