"""sce: select the elements that vary most, calculate weights from energies, erase minority signs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from bot.merge.methods.registry import Base, Finding, Parameter, merge_method
from bot.merge.streaming.operation import GATHER_LIMIT, Operation

if TYPE_CHECKING:
    from torch import Tensor

    from bot.merge.streaming.inputs import Chunk, Inputs, Kernel
    from bot.merge.streaming.selection import Selector

LEAST_WEIGHT = 1e-6  # mergekit's constant; ordinary fine-tunes reach it in almost every tensor


def _state_bytes(operation: Operation, itemsize: int) -> int:
    """Elements gathered around one threshold."""
    return 2 * itemsize * min(operation.elements, GATHER_LIMIT)


def _check(operation: Operation, paths: Sequence[str]) -> Iterator[Finding]:
    if int(operation.elements * float(operation.shared["select_topk"])) == 0:
        yield Finding("NOTHING_KEPT", f"select_topk keeps no element of {operation.name}; the result is the base")


@merge_method(
    "sce",
    base=Base.REQUIRED,
    inputs=(1, None),
    shared=(Parameter("select_topk", 1.0, low=0, high=1),),
    reference="arXiv:2408.07990",
    state_bytes=_state_bytes,
    check=_check,
)
def sce(inputs: Inputs) -> Kernel:
    """b + the deltas of the elected sign, averaged by their energy, where the models differ most.

    `select_topk`: fraction of the non-zero elements, by population variance over the models.
    """
    import torch

    from bot.merge.streaming.election import Election
    from bot.merge.streaming.selection import Selector, select_share
    from bot.merge.streaming.sums import inner

    topk = inputs.number("select_topk")
    selection = None
    if topk < 1:
        selection = select_share(inputs, lambda chunk: _variance(inputs, chunk.deltas()), topk)

    def selector() -> Selector | None:
        return None if selection is None else Selector(selection, inputs.dtype)

    def deltas(chunk: Chunk, select: Selector | None) -> list[Tensor]:
        found = chunk.deltas()
        if select is not None:
            keep = _variance(inputs, found)
            keep = torch.ne(select(keep), 0, out=keep)
            for delta in found:
                delta.mul_(keep)
        return found

    energies = [0.0] * inputs.n
    first = selector()
    for chunk in inputs.chunks():
        for i, delta in enumerate(deltas(chunk, first)):
            energies[i] += inner(delta, delta, inputs.buffer("part", delta)) / max(1, inputs.count)
    total = sum(energies)
    inputs.corner_case("EVEN_SHARES", int(total < LEAST_WEIGHT))
    weights = [1 / inputs.n] * inputs.n if total < LEAST_WEIGHT else [energy / total for energy in energies]
    second = selector()
    return lambda chunk: Election(inputs, deltas(chunk, second), weights).weighted_mean(LEAST_WEIGHT).add_(chunk.b)


def _variance(inputs: Inputs, deltas: list[Tensor]) -> Tensor:
    """Population variance over the models per element, in a buffer."""
    import torch

    first, *others = deltas
    mean, out, part = (inputs.buffer(name, first) for name in ("mean", "variance", "part"))
    total = first
    for delta in others:
        total = torch.add(total, delta, out=mean)
    torch.div(total, len(deltas), out=mean)
    torch.sub(first, mean, out=out).square_()
    for delta in others:
        out.add_(torch.sub(delta, mean, out=part).square_())
    return out.div_(len(deltas))
