"""The task-vector family: b + lambda * combined, sparsified, sign-elected deltas d_i = x_i - b. merging.md 2.2.

The order is mergekit's: delta, sparsify, rescale, weight, elect, sum, normalise, lambda.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from bot.merge.methods.masks import by_chance, by_rank, largest, middle
from bot.merge.methods.reductions import l1

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
    naive_count: bool = False,
) -> Tensor:
    """Trim to the largest deltas, elect a sign per element, sum what agrees. TIES-merging, arXiv:2306.01708.

    naive_count: the sign that more inputs have is elected, whatever their sizes (the 2023 `main.py`).
    """

    def trim(delta: Tensor, i: int) -> Tensor:
        return largest(delta, density[i])

    return combine(
        x, b, weight, trim, elects=True, rescale=rescale, normalize=normalize, lambda_=lambda_, by_count=naive_count
    )


def breadcrumbs(
    x: Sequence[Tensor],
    b: Tensor,
    *,
    elects: bool,
    weight: Sequence[float],
    density: Sequence[float],
    gamma: Sequence[float],
    normalize: bool,
    rescale: bool,
    lambda_: float,
) -> Tensor:
    """Drop outliers and small changes, then sum (or elect signs as ties does). Model breadcrumbs, arXiv:2312.06795."""

    def band(delta: Tensor, i: int) -> Tensor:
        return middle(delta, density[i], gamma[i])

    return combine(x, b, weight, band, elects=elects, rescale=rescale, normalize=normalize, lambda_=lambda_)


def dare(
    x: Sequence[Tensor],
    b: Tensor,
    *,
    elects: bool,
    keys: Sequence[int],
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool,
    rescale: bool,
    lambda_: float,
) -> Tensor:
    """Drop elements at random and restore the L1 norm, then sum (or elect signs). DARE, arXiv:2311.03099.

    As in mergekit the norm is matched exactly, where the paper multiplies by 1 / density.
    """

    def drop(delta: Tensor, i: int) -> Tensor:
        return by_chance(delta, density[i], keys[i])

    return combine(x, b, weight, drop, elects=elects, rescale=rescale, normalize=normalize, lambda_=lambda_)


def della(
    x: Sequence[Tensor],
    b: Tensor,
    *,
    elects: bool,
    keys: Sequence[int],
    weight: Sequence[float],
    density: Sequence[float],
    epsilon: Sequence[float],
    normalize: bool,
    rescale: bool,
    lambda_: float,
) -> Tensor:
    """As dare, but large elements of a row are kept more often. DELLA-merging, arXiv:2406.11617."""

    def drop(delta: Tensor, i: int) -> Tensor:
        return by_rank(delta, density[i], epsilon[i], keys[i])

    return combine(x, b, weight, drop, elects=elects, rescale=rescale, normalize=normalize, lambda_=lambda_)


FAMILY: dict[str, Callable[..., Tensor]] = {
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "breadcrumbs": partial(breadcrumbs, elects=False),
    "breadcrumbs_ties": partial(breadcrumbs, elects=True),
    "dare_linear": partial(dare, elects=False),
    "dare_ties": partial(dare, elects=True),
    "della": partial(della, elects=True),
    "della_linear": partial(della, elects=False),
}


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
    by_count: bool = False,
) -> Tensor:
    """Steps (1) to (9) of the family. x_i, b: one shape; the result has it too."""
    votes = []
    for i, (x_i, w_i) in enumerate(zip(x, weight, strict=True)):
        delta = x_i - b
        masked = sparsify(delta, i)
        votes.append(masked * (w_i * l1_match(l1(delta), l1(masked)) if rescale else w_i))
    return decide(votes, b, weight, elects=elects, normalize=normalize, lambda_=lambda_, by_count=by_count)


def decide(
    votes: Sequence[Tensor],
    b: Tensor,
    weight: Sequence[float],
    *,
    elects: bool,
    normalize: bool,
    lambda_: float,
    by_count: bool = False,
) -> Tensor:
    """Steps (5) to (9), elementwise: elect, sum, normalise, scale, add to the base."""
    if not elects:
        weight_sum = sum(weight)
        divisor = weight_sum if normalize and abs(weight_sum) >= 1e-8 else 1.0
        return b + sum_of(votes).div_(divisor).mul_(lambda_)
    total, count = _elected_sum(votes, weight, by_count)
    if normalize:
        total.div_(torch.where(count == 0, torch.ones_like(count), count))
    return total.mul_(lambda_).add_(b)


def elected_sign(votes: Sequence[Tensor]) -> Tensor:
    """Per element +1 or -1. A draw (sides equal up to rounding) elects plus."""
    up, down = sum_of([vote.clamp(min=0) for vote in votes]), sum_of([vote.clamp(max=0) for vote in votes])
    plus = (up - down) * CANCELS + (up + down) >= 0
    return plus.to(up.dtype).mul_(2).sub_(1)


def _elected_sum(votes: Sequence[Tensor], weight: Sequence[float], by_count: bool) -> tuple[Tensor, Tensor]:
    """Sum of the votes that agree with the elected sign, and the weights of those votes, per element.

    An exact zero never votes; a negative weight has flipped its vote already. Arithmetic on floats throughout: masks
    of booleans cost several times as much.
    """
    sign = elected_sign([vote.sign() for vote in votes] if by_count else votes)
    total, count = torch.zeros_like(votes[0]), torch.zeros_like(votes[0])
    for vote, w_i in zip(votes, weight, strict=True):
        agreeing = (vote * sign).clamp_(min=0)
        total.add_(agreeing)
        count.add_(agreeing.sign_(), alpha=w_i)
    return total.mul_(sign), count


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """A fresh tensor: the sum in order."""
    out = tensors[0].clone()
    for tensor in tensors[1:]:
        out.add_(tensor)
    return out


def _untouched(delta: Tensor, i: int) -> Tensor:
    return delta


def l1_match(whole: float, rest: float) -> float:
    """The factor that gives a masked delta (L1 norm `rest`) the norm of the whole one; 1 for almost-zero deltas."""
    return 1.0 if whole < TINY_L1 or rest < TINY_L1 else whole / rest
