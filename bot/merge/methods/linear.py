"""linear (weighted average) and passthrough (copy)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from bot.merge.methods.registry import WEIGHT, Absent, Base, Finding, Parameter, flag, merge_method
from bot.merge.streaming.operation import Operation

if TYPE_CHECKING:
    from torch import Tensor

    from bot.merge.streaming.inputs import Chunk, Inputs, Kernel


def zero_sum(operation: Operation, normalize: str, method: str) -> Iterator[Finding]:
    """A refusal if the weights of a method that divides by their sum add up to zero."""
    total = sum(float(w) for w in operation.per_input["weight"] if w is not None)
    if operation.shared[normalize] and abs(total) < 1e-8:
        yield Finding(
            "VALUE_OUT_OF_RANGE",
            f"the weights for {operation.name} add up to {total:g}, and {method} divides by that.",
            f"Change a weight, or set `{normalize}: false`.",
        )


def _check_linear(operation: Operation, paths: Sequence[str]) -> Iterator[Finding]:
    return zero_sum(operation, "normalize", "linear")


@merge_method(
    "linear",
    base=Base.IGNORED,
    inputs=(1, None),
    per_input=(WEIGHT,),
    shared=(flag("normalize", True),),
    reference="arXiv:2203.05482",
    check=_check_linear,
)
def linear(inputs: Inputs) -> Kernel:
    """Weighted average sum(w_i x_i) / sum(w_i), or the sum without `normalize`.

    The division comes last, so that weights are not rounded twice.
    """
    weight = inputs.values("weight")
    divisor = sum(weight) if inputs.flag("normalize") else 1.0

    def kernel(chunk: Chunk) -> Tensor:
        out = chunk.x[0].mul_(weight[0])
        for x_i, w_i in zip(chunk.x[1:], weight[1:], strict=True):
            out.add_(x_i, alpha=w_i)
        return out if divisor == 1.0 else out.div_(divisor)

    return kernel


@merge_method(
    "passthrough",
    base=Base.IGNORED,
    inputs=(1, 1),
    per_input=(Parameter("scale", Absent.NONE),),
    reference="cf. depth up-scaling, arXiv:2312.15166",
)
def passthrough(inputs: Inputs) -> Kernel:
    """The only input, times `scale` where one is given."""
    scale = inputs.operation.per_input["scale"][0]
    return lambda chunk: chunk.tensors[0] if scale is None else chunk.tensors[0].mul_(scale)
