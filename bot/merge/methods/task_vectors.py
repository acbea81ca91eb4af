"""The task-vector family: b + lambda * combined, sparsified, sign-elected deltas d_i = x_i - b. merging.md 2.2.

The order is mergekit's: delta, sparsify, rescale, weight, elect, sum, normalise, lambda.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bot.merge.methods.reductions import first_largest, l1

CANCELS = 1e-6  # a vote whose sides differ by less than this share is a draw, and a draw is positive
TINY_L1 = 1e-7
Sparsify = Callable[[Tensor, int], Tensor]  # delta, number of the input -> masked delta


def task_arithmetic(
    x: Sequence[Tensor], b: Tensor, *, weight: Sequence[float], normalize: bool, lambda_: float
) -> Tensor:
    """b + lambda * sum(w_i (x_i - b)). Editing models with task arithmetic, arXiv:2212.04089."""
    return combine(x, b, weight, _untouched, elects=False, rescale=False, normalize=normalize, lambda_=lambda_)


def ties(
    x: Sequence[Tensor],
    b: Tensor,
    *,
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool,
    rescale: bool,
    lambda_: float,
) -> Tensor:
    """Trim to the largest deltas, elect a sign per element, sum what agrees. TIES-merging, arXiv:2306.01708.

    Keeps max(1, int(density*n)) elements of each delta; with equal magnitudes those of the lowest index.
    """

    def trim(delta: Tensor, i: int) -> Tensor:
        return largest(delta, density[i])

    return combine(x, b, weight, trim, elects=True, rescale=rescale, normalize=normalize, lambda_=lambda_)


def largest(delta: Tensor, density: float) -> Tensor:
    """The delta with all but its int(density*n) largest elements (at least one) set to zero."""
    if density >= 1:
        return delta
    flat = delta.reshape(-1)
    keep = first_largest(flat.abs(), max(1, int(density * flat.numel())) if density > 0 else 0)
    return (flat * keep).reshape(delta.shape)


def combine(
    x: Sequence[Tensor],
    b: Tensor,
    weight: Sequence[float],
    sparsify: Sparsify,
    *,
    elects: bool,
    rescale: bool,
    normalize: bool,
    lambda_: float,
) -> Tensor:
    """Steps (1) to (9) of the family. x_i, b: one shape; the result has it too."""
    votes = []
    for i, (x_i, w_i) in enumerate(zip(x, weight, strict=True)):
        delta = x_i - b
        masked = sparsify(delta, i)
        votes.append(masked * (w_i * _l1_match(delta, masked) if rescale else w_i))
    if not elects:
        weight_sum = sum(weight)
        divisor = weight_sum if normalize and abs(weight_sum) >= 1e-8 else 1.0
        return b + sum_of(votes).div_(divisor).mul_(lambda_)
    total, count = elected_sum(votes, weight)
    if normalize:
        total.div_(torch.where(count == 0, torch.ones_like(count), count))
    return total.mul_(lambda_).add_(b)


def elected_sum(votes: Sequence[Tensor], weight: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Sum of the votes that agree with the elected sign, and the weights of those votes, per element.

    An exact zero never votes; a draw (sides equal up to rounding) elects plus.
    """
    balance = sum_of(votes)
    size = torch.zeros_like(balance)
    for vote in votes:
        size.add_(vote.abs())
    positive = (balance >= 0) | (balance.abs() <= CANCELS * size)
    total, count = torch.zeros_like(balance), torch.zeros_like(balance)
    for vote, w_i in zip(votes, weight, strict=True):
        agrees = torch.where(positive, vote > 0, vote < 0)
        total.add_(vote * agrees)
        count.add_(agrees, alpha=w_i)
    return total, count


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """A fresh tensor: the sum in order."""
    out = tensors[0].clone()
    for tensor in tensors[1:]:
        out.add_(tensor)
    return out


def _untouched(delta: Tensor, i: int) -> Tensor:
    return delta


def _l1_match(delta: Tensor, masked: Tensor) -> float:
    """The factor that gives the masked delta the L1 norm of the whole one; 1 for almost-zero deltas."""
    whole, kept = l1(delta), l1(masked)
    return 1.0 if whole < TINY_L1 or kept < TINY_L1 else whole / kept
