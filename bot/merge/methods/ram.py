"""ram and ramplus_tl: average each element over the models that changed it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bot.merge.methods.registry import Base, Parameter, merge_method

if TYPE_CHECKING:
    from torch import Tensor

    from bot.merge.streaming.inputs import Chunk, Inputs, Kernel

EPSILON = Parameter("epsilon", 1e-5, low=0)


@merge_method("ram", base=Base.REQUIRED, inputs=(1, None), shared=(EPSILON,), reference="arXiv:2601.13572")
def ram(inputs: Inputs) -> Kernel:
    """b + the mean of the deltas larger than `epsilon`."""
    import torch

    from bot.merge.streaming.selection import zero_below

    epsilon = inputs.number("epsilon")

    def kernel(chunk: Chunk) -> Tensor:
        total, count = inputs.buffer("total", chunk.b).zero_(), inputs.buffer("count", chunk.b).zero_()
        changed = inputs.buffer("changed", chunk.b)
        for delta in chunk.deltas():
            total.add_(zero_below(delta, epsilon))
            count.add_(torch.ne(delta, 0, out=changed))
        return total.div_(count.clamp_(min=1)).add_(chunk.b)

    return kernel


@merge_method(
    "ramplus_tl",
    base=Base.REQUIRED,
    inputs=(1, None),
    shared=(Parameter("r", 0.1), Parameter("alpha", 0.2, low=0), EPSILON),
    reference="arXiv:2601.13572",
)
def ramplus_tl(inputs: Inputs) -> Kernel:
    """ram, with elements that only one model changed raised by its overlap with the others.

    The factor is 1 + r max(0, min(alpha, overlap)), with one overlap per model and tensor.
    """
    import torch

    from bot.merge.streaming.selection import zero_below

    r, alpha, epsilon = inputs.number("r"), inputs.number("alpha"), inputs.number("epsilon")
    own, active = [0] * inputs.n, [0] * inputs.n
    for chunk in inputs.chunks():
        alone = _alone(inputs, [zero_below(delta, epsilon) for delta in chunk.deltas()])[0]
        for i, tensor in enumerate(chunk.x):
            changed = torch.ne(tensor, 0, out=tensor)
            active[i] += int(changed.sum())
            own[i] += int(changed.mul_(alone).sum())
    boosts = []
    for mine, all_ in zip(own, active, strict=True):
        boosts.append(1 + r * max(0.0, min(alpha, overlap(all_ - mine, mine, epsilon))))

    def kernel(chunk: Chunk) -> Tensor:
        deltas = [zero_below(delta, epsilon) for delta in chunk.deltas()]
        alone, count = _alone(inputs, deltas)
        total, boosted = inputs.buffer("total", alone).zero_(), inputs.buffer("boosted", alone).zero_()
        for delta, boost in zip(deltas, boosts, strict=True):
            total.add_(delta)
            boosted.add_(delta.mul_(boost))
        total.div_(count.clamp_(min=1)).sub_(torch.mul(total, alone, out=count))
        return total.add_(boosted.mul_(alone)).add_(chunk.b)

    return kernel


def overlap(shared: int, own: int, epsilon: float) -> float:
    """Elements changed with other models over those changed alone; infinite with none alone and epsilon 0."""
    divisor = max(own, epsilon)
    if not shared:
        return 0.0
    return shared / divisor if divisor else math.inf


def _alone(inputs: Inputs, deltas: list[Tensor]) -> tuple[Tensor, Tensor]:
    """1 where exactly one model changed the element, and the number of models that changed it, in buffers."""
    import torch

    count, part = inputs.buffer("count", deltas[0]).zero_(), inputs.buffer("part", deltas[0])
    for delta in deltas:
        count.add_(torch.ne(delta, 0, out=part))
    return torch.eq(count, 1, out=part), count
