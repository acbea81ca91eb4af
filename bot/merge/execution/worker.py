"""Carry out one step: views of its operands, passes of the method, rounding, output. Memory: a few chunks."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bot.errors import Failed
from bot.merge.checkpoints.checkpoint import LocalFiles
from bot.merge.execution.copying import Copier, copies, count_nonfinite, require_finite
from bot.merge.execution.device import TILE, DeviceReader
from bot.merge.execution.gather import GatheredView
from bot.merge.execution.lora_rows import patched, stored_tensor
from bot.merge.execution.options import MergeOptions
from bot.merge.execution.views import StoredView
from bot.merge.execution.writer import StepCounts, TensorWriter
from bot.merge.methods import METHODS
from bot.merge.planning.memory import row_length
from bot.merge.planning.plan import Step
from bot.merge.planning.work import Operand, Work
from bot.merge.recipe.spec import ModelRef
from bot.merge.streaming.inputs import Chunk, CpuReader, Inputs, Reader, Scratch, Spans, View


class Stoppable:
    """Reader that raises CancelledError once the merge is stopped, in any pass."""

    def __init__(self, reader: Reader, stopped: threading.Event) -> None:
        self.device, self._reader, self._stopped = reader.device, reader, stopped

    def chunks(self, spans: Spans) -> Iterator[list[Tensor]]:
        for chunk in self._reader.chunks(spans):
            if self._stopped.is_set():
                raise CancelledError
            yield chunk


class Worker(Copier):
    """State of one thread: a device and buffers that are reused for every tensor."""

    def __init__(
        self,
        sources: Mapping[ModelRef, LocalFiles],
        writer: TensorWriter,
        options: MergeOptions,
        stopped: threading.Event,
        device: torch.device,
    ) -> None:
        super().__init__(sources, writer, options, stopped)
        self.device, self.scratch = device, Scratch()
        torch.set_num_threads(1)  # for this thread: splitting a tensor would show in the last bits

    def carry_out(self, step: Step) -> None:
        """Compute one tensor and write it to the writer. Raises `bot.errors.Failed`."""
        if copies(step.work):
            super().carry_out(step)
        else:
            self.writer.finished(step, self._merge(step))

    def _views(self, work: Work, wide: torch.dtype) -> list[View]:
        views = [self._view(operand, wide, f"operand {i}") for i, operand in enumerate(work.reads)]
        if work.aligned is None:
            return views
        return [GatheredView(one, i, views, wide) for i, one in enumerate(work.aligned.maps[: len(work.operands)])]

    def _view(self, operand: Operand, wide: torch.dtype, name: str) -> View:
        """View of one operand before its rows are re-indexed."""
        stored = StoredView(self.sources[operand.model], operand.tensor, wide, self.scratch, name)
        patch = operand.patch
        if patch is None:
            return stored
        return patched(stored, patch, lambda tensor: stored_tensor(self.sources[patch.adapter], tensor, wide))

    def _merge(self, step: Step) -> StepCounts:
        work = step.work
        if work.action == "copy":
            work = replace(work, method="passthrough", per_input={"scale": (None,)}, shared={}, base=None)
        wide = torch.float64 if any(o.tensor.dtype.name == "float64" for o in work.reads) else torch.float32
        views = self._views(work, wide)
        unit = max(math.lcm(*(view.unit for view in views)), row_length(work))
        on_cpu = self.device.type == "cpu"
        reader = Stoppable(CpuReader(views) if on_cpu else DeviceReader(views, wide, self.device), self._stopped)
        chunk = self._options.chunk if on_cpu else TILE
        on_nonfinite = partial(require_finite, step, on_nonfinite=self._options.on_nonfinite)
        inputs = Inputs(work, reader, wide, unit, chunk=chunk, scratch=self.scratch, on_nonfinite=on_nonfinite)
        if not work.elements:
            return StepCounts()
        kernel = METHODS[work.method].kernel(inputs)
        for part in inputs.chunks():
            self._write(step, inputs, part, kernel(part))
        return StepCounts(inputs.nonfinite, inputs.corner_cases)

    def _write(self, step: Step, inputs: Inputs, chunk: Chunk, result: Tensor) -> None:
        """Round one chunk of the result and write it."""
        count = chunk.stop - chunk.start
        out = self.scratch.get("out", count, getattr(torch, step.work.dtype.name))
        out.copy_(rounded_to_odd(result) if result.dtype == torch.float64 and out.element_size() == 2 else result)
        data = out.view(torch.uint8).numpy()
        if count_nonfinite(data, step.work.dtype.name):
            raise Failed(
                "NOT_FINITE",
                f"{step.name} overflows {step.work.dtype.name}, though its inputs are finite.",
                "Use a wider `out_dtype` such as bfloat16 or float32, or smaller weights.",
                value=step.name,
            )
        inputs.restore(chunk, out)
        self.writer.write(step, chunk.start * out.element_size(), data.data)


def rounded_to_odd(wide: Tensor) -> Tensor:
    """Round float64 to float32, with the last bit set where the value is not exact (round to odd).

    Rounding the result to bfloat16 or float16 equals rounding the float64 directly; torch goes through the nearest
    float32 and rounds twice. Cf. S. Boldo and G. Melquiond, Emulation of FMA and
    correctly rounded sums, IEEE Transactions on Computers 2008.
    """
    out = wide.to(torch.float32)
    bits = out.view(torch.int32)
    bits -= (out.abs() > wide.abs()).int()
    return torch.where(out == wide, out, (bits | 1).view(torch.float32), out=out)
