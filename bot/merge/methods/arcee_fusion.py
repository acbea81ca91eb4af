"""arcee_fusion: take the elements of the other model whose importance stands out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bot.merge.methods.registry import Base, Missing, merge_method
from bot.merge.streaming.operation import GATHER_LIMIT, Operation, row_width

if TYPE_CHECKING:
    from torch import Tensor

    from bot.merge.streaming.inputs import Chunk, Inputs, Kernel

SMOOTHING = 1e-8


def _state_bytes(operation: Operation, itemsize: int) -> int:
    """Elements gathered around three quartiles."""
    return 3 * 2 * itemsize * min(operation.elements, GATHER_LIMIT)


@merge_method(
    "arcee_fusion",
    base=Base.REQUIRED,
    inputs=(1, 1),
    missing=Missing.ONE,
    reference="vendor method, no paper",
    row_length=row_width,
    state_bytes=_state_bytes,
)
def arcee_fusion(inputs: Inputs) -> Kernel:
    """The element of x where its importance is at least median + 1.5 (third - first quartile), else that of b.

    Importance is |x - b| times the KL divergence of the rows' softmaxes. Quartiles are elements of the sorted tensor.
    Importance is float32 for any input: the divergence cancels to second order, and its noise is part of the method.
    """
    import torch

    from bot.merge.streaming.selection import select

    width = row_width(inputs.operation)

    def importance(chunk: Chunk) -> Tensor:
        tuned, base = (tensor.float().view(-1, width) for tensor in (chunk.x[0], chunk.b))
        out = inputs.scratch.get("importance", tuned.numel(), torch.float32, tuned.device).view(-1, width)
        return torch.sub(tuned, base, out=out).abs_().mul_(row_divergence(tuned, base)).view(-1)

    n = inputs.count
    ranks = [int(f * (n - 1)) for f in (0.5, 0.25, 0.75)]
    median, low, high = select(inputs, lambda chunk: [importance(chunk)], [[n - rank for rank in ranks]])[0]
    if ranks[1] == 0:  # `select` does not look for the smallest element
        low.threshold = min(float(importance(chunk).min()) for chunk in inputs.chunks())
    threshold = median.threshold + 1.5 * (high.threshold - low.threshold)

    def kernel(chunk: Chunk) -> Tensor:
        take = importance(chunk)
        take = torch.ge(take, threshold, out=take)
        chunk.x[0].mul_(take)
        return chunk.x[0].add_(chunk.b.mul_(take.neg_().add_(1)))

    return kernel


def row_divergence(tuned: Tensor, base: Tensor) -> Tensor:
    """KL divergence of the rows' softmaxes, shape (rows, 1)."""
    import torch

    p, q = torch.softmax(tuned, -1).add_(SMOOTHING), torch.softmax(base, -1).add_(SMOOTHING)
    return torch.div(p, q, out=q).log_().mul_(p).sum(-1, keepdim=True)
