"""Sign election (TIES, arXiv:2306.01708) without branches: sum both signs, then keep the elected one.

Boolean masks and `where` cost ten times as much as arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bot.merge.streaming.inputs import Inputs

CANCELS = 1e-6  # opposite sums that differ by less than this fraction are a tie; a tie elects plus


class Election:
    """The votes of one chunk and their weights. Votes are overwritten; results lie in buffers."""

    def __init__(self, inputs: Inputs, votes: Sequence[Tensor], weight: Sequence[float]) -> None:
        self._inputs, self._votes, self._weight = inputs, votes, weight
        self._part = inputs.buffer("part", votes[0])

    def mean_or_sum(self, normalize: bool, by_count: bool = False) -> Tensor:
        """Sum of the votes with the elected sign, divided by the sum of their weights if `normalize`.

        by_count: elect the sign of most votes instead of the sign of their sum.
        """
        ballots = self._sides("ballots")[0].zero_() if by_count else None
        up, down, weight_up, weight_down = self._sides("up", "down", "weight up", "weight down")
        for first, vote, w_i in self._numbered():
            if ballots is not None:
                ballots.add_(torch.sign(vote, out=self._part))
            rise = torch.clamp_min(vote, 0, out=up if first else self._part)
            fall = torch.clamp_max(vote, 0, out=down if first else vote)
            if not first:
                up.add_(rise)
                down.add_(fall)
            if normalize and first:
                torch.sign(rise, out=weight_up).mul_(w_i)
                torch.sign(fall, out=weight_down).mul_(-w_i)
            elif normalize:
                weight_up.add_(rise.sign_(), alpha=w_i)
                weight_down.sub_(fall.sign_(), alpha=w_i)
        plus = self._plus(up, down) if ballots is None else torch.ge(ballots, 0, out=self._votes[0])
        total = self._side(plus, up, down)
        if not normalize:
            return total
        count = self._side(plus, weight_up, weight_down)
        least = min(self._weight)
        if least > 0:  # where nobody voted, any divisor will do
            return total.div_(count.clamp_(min=least))
        return total.div_(count.add_(torch.eq(count, 0, out=self._part)))

    def weighted_mean(self, least_weight: float) -> Tensor:
        """Mean of the votes with the elected sign by their weights; the sign comes from unweighted votes.

        The sum of weights counts as `least_weight` where it is smaller.
        """
        up, down, sum_up, sum_down = self._sides("up", "down", "sum up", "sum down")
        weight_up, weight_down = self._sides("weight up", "weight down")
        for first, vote, w_i in self._numbered():
            rise = torch.clamp_min(vote, 0, out=up if first else self._part)
            fall = torch.clamp_max(vote, 0, out=down if first else vote)
            if first:
                torch.mul(rise, w_i, out=sum_up)
                torch.mul(fall, w_i, out=sum_down)
                torch.sign(rise, out=weight_up).mul_(w_i)
                torch.sign(fall, out=weight_down).mul_(-w_i)
                continue
            up.add_(rise)
            down.add_(fall)
            sum_up.add_(rise, alpha=w_i)
            sum_down.add_(fall, alpha=w_i)
            weight_up.add_(rise.sign_(), alpha=w_i)
            weight_down.sub_(fall.sign_(), alpha=w_i)
        plus = self._plus(up, down)
        total, count = self._side(plus, sum_up, sum_down), self._side(plus, weight_up, weight_down)
        return total.div_(count.clamp_(min=least_weight))

    def _sides(self, *names: str) -> list[Tensor]:
        """Buffers that the first vote fills and the others are added to."""
        return [self._inputs.buffer(name, self._votes[0]) for name in names]

    def _numbered(self) -> Iterator[tuple[bool, Tensor, float]]:
        """(first or not, vote, weight) of every vote."""
        for i, (vote, w_i) in enumerate(zip(self._votes, self._weight, strict=True)):
            yield i == 0, vote, w_i

    def _plus(self, up: Tensor, down: Tensor) -> Tensor:
        """1 where plus is elected, else 0."""
        balance = torch.sub(up, down, out=self._part).mul_(CANCELS).add_(self._votes[0].copy_(up).add_(down))
        return torch.ge(balance, 0, out=self._votes[0])

    def _side(self, plus: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """up where plus is 1, down where it is 0; in place of up."""
        up.mul_(plus)
        return up.add_(down.sub_(torch.mul(down, plus, out=self._part)))
