"""Sign election without branches: both sides of every vote are summed, then one side is taken.

Masks of booleans and choices by `where` cost ten times as much as arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bot.merge.methods.shares import FLOOR
from bot.merge.methods.task_vectors import CANCELS
from bot.merge.passes.inputs import Inputs


class Election:
    """One piece's votes e_i and their weights. The votes are overwritten, results lie in buffers."""

    def __init__(self, inputs: Inputs, votes: Sequence[Tensor], weight: Sequence[float]) -> None:
        self._inputs, self._votes, self._weight = inputs, votes, weight
        self._part = inputs.buffer("part", votes[0])

    def mean_or_sum(self, normalize: bool, by_count: bool = False) -> Tensor:
        """The sum of the votes that agree with the elected sign, divided by the sum of their weights if asked.

        by_count: the sign of most votes is elected, whatever their sizes.
        """
        ballots = self._zeros("ballots") if by_count else None
        up, down = self._zeros("up"), self._zeros("down")
        weight_up, weight_down = self._zeros("weight up"), self._zeros("weight down")
        for vote, w_i in zip(self._votes, self._weight, strict=True):
            if ballots is not None:
                ballots.add_(torch.sign(vote, out=self._part))
            up.add_(torch.clamp_min(vote, 0, out=self._part))
            if normalize:
                weight_up.add_(self._part.sign_(), alpha=w_i)
            down.add_(vote.clamp_(max=0))
            if normalize:
                weight_down.sub_(vote.sign_(), alpha=w_i)
        plus = self._plus(up, down) if ballots is None else torch.ge(ballots, 0, out=self._votes[0])
        total = self._side(plus, up, down)
        if not normalize:
            return total
        count = self._side(plus, weight_up, weight_down)
        least = min(self._weight)
        if least > 0:  # where nobody voted, any divisor will do
            return total.div_(count.clamp_(min=least))
        return total.div_(count.add_(torch.eq(count, 0, out=self._part)))

    def shared(self) -> Tensor:
        """sce: bare votes elect, the agreeing ones are averaged with their weights, over a floor."""
        up, down = self._zeros("up"), self._zeros("down")
        sum_up, sum_down = self._zeros("sum up"), self._zeros("sum down")
        weight_up, weight_down = self._zeros("weight up"), self._zeros("weight down")
        for vote, w_i in zip(self._votes, self._weight, strict=True):
            up.add_(torch.clamp_min(vote, 0, out=self._part))
            sum_up.add_(self._part, alpha=w_i)
            weight_up.add_(self._part.sign_(), alpha=w_i)
            down.add_(vote.clamp_(max=0))
            sum_down.add_(vote, alpha=w_i)
            weight_down.sub_(vote.sign_(), alpha=w_i)
        plus = self._plus(up, down)
        total, count = self._side(plus, sum_up, sum_down), self._side(plus, weight_up, weight_down)
        return total.div_(count.clamp_(min=FLOOR))

    def _zeros(self, name: str) -> Tensor:
        return self._inputs.buffer(name, self._votes[0]).zero_()

    def _plus(self, up: Tensor, down: Tensor) -> Tensor:
        """1 where plus is elected, else 0. A draw (sides equal up to rounding) elects plus."""
        balance = torch.sub(up, down, out=self._part).mul_(CANCELS).add_(self._votes[0].copy_(up).add_(down))
        return torch.ge(balance, 0, out=self._votes[0])

    def _side(self, plus: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """up where plus is 1, down where it is 0, in the place of up."""
        up.mul_(plus)
        return up.add_(down.sub_(torch.mul(down, plus, out=self._part)))
