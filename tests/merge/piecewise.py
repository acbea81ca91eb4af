"""Run a method's passes over tensors in memory, as the engine runs them over files."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bot.merge.execution.device import DeviceFeed
from bot.merge.passes import prepare
from bot.merge.passes.inputs import CpuFeed, Inputs
from bot.merge.planning.memory import CHUNK, row_length
from bot.merge.planning.work import Work


class HeldView:
    """A tensor that lies in memory, in any floating type."""

    unit = 1

    def __init__(self, tensor: Tensor, wide: torch.dtype) -> None:
        self.shape = tuple(tensor.shape)
        self._flat, self._wide = tensor.reshape(-1), wide

    def read(self, start: int, stop: int) -> Tensor:
        return self._flat[start:stop].to(self._wide, copy=True)


def merged(
    work: Work, tensors: Sequence[Tensor], *, chunk: int = CHUNK, wide: torch.dtype = torch.float32, ring: bool = False
) -> Tensor:
    """The result in the working type, of the work's shape. ring: through the double buffers of a GPU, on the CPU."""
    result, _ = merged_and_inputs(work, tensors, chunk=chunk, wide=wide, ring=ring)
    return result


def merged_and_inputs(
    work: Work, tensors: Sequence[Tensor], *, chunk: int = CHUNK, wide: torch.dtype = torch.float32, ring: bool = False
) -> tuple[Tensor, Inputs]:
    """The same, with what the inputs remember of odd cases."""
    views = [HeldView(tensor, wide) for tensor in tensors]
    feed = DeviceFeed(views, wide, torch.device("cpu")) if ring else CpuFeed(views)
    inputs = Inputs(work, feed, wide, row_length(work), chunk=chunk)
    emit = prepare(inputs)
    out = torch.empty(work.elements, dtype=wide)
    for piece in inputs.pieces():
        out[piece.start : piece.stop] = emit(piece)
        inputs.restore(piece, out[piece.start : piece.stop])
    return out.reshape(work.shape), inputs
