"""Run a merge method over tensors in memory, as the engine runs it over files."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bot.merge.execution.device import DeviceReader
from bot.merge.methods import METHODS
from bot.merge.planning.memory import row_length
from bot.merge.planning.work import Work
from bot.merge.streaming.inputs import CpuReader, Inputs
from bot.merge.streaming.operation import CHUNK


class TensorView:
    """A tensor in memory, of any floating type."""

    unit = 1

    def __init__(self, tensor: Tensor, dtype: torch.dtype) -> None:
        self.shape = tuple(tensor.shape)
        self._flat, self._dtype = tensor.reshape(-1), dtype

    def read(self, start: int, stop: int) -> Tensor:
        return self._flat[start:stop].to(self._dtype, copy=True)


def merged(
    work: Work, tensors: Sequence[Tensor], *, chunk: int = CHUNK, dtype: torch.dtype = torch.float32, ring: bool = False
) -> Tensor:
    """The result in the compute dtype. ring: through the double buffers of a GPU, on the CPU."""
    result, _ = merged_and_inputs(work, tensors, chunk=chunk, dtype=dtype, ring=ring)
    return result


def merged_and_inputs(
    work: Work, tensors: Sequence[Tensor], *, chunk: int = CHUNK, dtype: torch.dtype = torch.float32, ring: bool = False
) -> tuple[Tensor, Inputs]:
    """The same, with the inputs, which counted corner cases."""
    views = [TensorView(tensor, dtype) for tensor in tensors]
    reader = DeviceReader(views, dtype, torch.device("cpu")) if ring else CpuReader(views)
    inputs = Inputs(work, reader, dtype, row_length(work), chunk=chunk)
    kernel = METHODS[work.method].kernel(inputs)
    out = torch.empty(work.elements, dtype=dtype)
    for part in inputs.chunks():
        out[part.start : part.stop] = kernel(part)
        inputs.restore(part, out[part.start : part.stop])
    return out.reshape(work.shape), inputs
