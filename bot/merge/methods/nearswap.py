"""nearswap: move to the other model where it is close to the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bot.merge.methods.registry import Absent, Base, Missing, Parameter, merge_method

if TYPE_CHECKING:
    from torch import Tensor

    from bot.merge.streaming.inputs import Chunk, Inputs, Kernel

TINY_DISTANCE = 1e-6


@merge_method(
    "nearswap",
    base=Base.REQUIRED,
    inputs=(1, 1),
    shared=(Parameter("t", Absent.REQUIRED, low=0),),
    missing=Missing.BASE,
    reference="model card of QuartetAnemoi-70B-t0.0001",
)
def nearswap(inputs: Inputs) -> Kernel:
    """w x + (1 - w) b with w = clamp(t / |b - x|, 0, 1)."""
    import torch

    t = inputs.number("t")

    def kernel(chunk: Chunk) -> Tensor:
        (x,), b = chunk.x, chunk.b
        w = torch.sub(b, x, out=inputs.buffer("w", b)).abs_().clamp_(min=TINY_DISTANCE)
        w.reciprocal_().mul_(t).clamp_(0, 1)
        x.mul_(w)
        return x.add_(b.mul_(w.neg_().add_(1)))

    return kernel
