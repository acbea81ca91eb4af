"""Carry out one step: views of its operands, the method's passes, rounding, the sink. Memory: a few pieces."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NoReturn

import torch
from torch import Tensor

from bot.errors import Failed
from bot.merge.checkpoints.checkpoint import LocalFiles
from bot.merge.execution.device import TILE, DeviceFeed
from bot.merge.execution.writer import Found, Sink
from bot.merge.operands.gather import GatheredView
from bot.merge.operands.lora_rows import PatchedView, stored_tensor
from bot.merge.operands.views import Scratch, StoredView, View, common_unit
from bot.merge.passes import prepare
from bot.merge.passes.inputs import CpuFeed, Feed, Inputs, Piece, Spans, surely_finite
from bot.merge.planning.memory import CHUNK, row_length
from bot.merge.planning.plan import Step
from bot.merge.planning.work import Operand, Work
from bot.merge.recipe.spec import ModelRef

NonFinite = Literal["notice", "fail"]


class Stoppable:
    """A feed that brings no further piece once the merge has been stopped, in the first passes and in the last."""

    def __init__(self, feed: Feed, stopped: threading.Event) -> None:
        self.device, self._feed, self._stopped = feed.device, feed, stopped

    def pieces(self, spans: Spans) -> Iterator[list[Tensor]]:
        for piece in self._feed.pieces(spans):
            if self._stopped.is_set():
                raise CancelledError
            yield piece


@dataclass(slots=True)
class Lane:
    """What one worker has to itself: a device and buffers that serve for every tensor."""

    sources: Mapping[ModelRef, LocalFiles]
    sink: Sink
    on_nonfinite: NonFinite = "notice"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    chunk: int = CHUNK
    stopped: threading.Event = field(default_factory=threading.Event)
    scratch: Scratch = field(default_factory=Scratch)

    def carry_out(self, step: Step) -> None:
        """Compute one tensor and hand it to the sink. Raises `bot.errors.Failed`."""
        work = step.work
        if work.action == "equal":
            found = self._equal(step)
        elif as_stored(work):
            found = self._copied(step)
        else:
            found = self._merged(step)
        self.sink.finished(step, found)

    def view(self, operand: Operand, wide: torch.dtype, name: str) -> View:
        """One operand before its rows are re-indexed."""
        stored = StoredView(self.sources[operand.model], operand.tensor, wide, self.scratch, name)
        patch = operand.patch
        if patch is None:
            return stored
        return PatchedView(stored, patch, lambda tensor: stored_tensor(self.sources[patch.adapter], tensor, wide))

    def _views(self, work: Work, wide: torch.dtype) -> list[View]:
        views = [self.view(operand, wide, f"operand {i}") for i, operand in enumerate(work.reads)]
        if work.aligned is None:
            return views
        return [GatheredView(one, i, views, wide) for i, one in enumerate(work.aligned.maps[: len(work.operands)])]

    def _merged(self, step: Step) -> Found:
        work = step.work
        if work.action == "copy":
            work = dataclasses.replace(work, method="passthrough", per_input={"scale": (None,)}, shared={}, base=None)
        wide = torch.float64 if any(o.tensor.dtype.name == "float64" for o in work.reads) else torch.float32
        views = self._views(work, wide)
        unit = common_unit(views) if row_length(work) == 1 else max(common_unit(views), row_length(work))
        on_cpu = self.device.type == "cpu"
        feed = Stoppable(CpuFeed(views) if on_cpu else DeviceFeed(views, wide, self.device), self.stopped)
        chunk = self.chunk if on_cpu else TILE
        inputs = Inputs(work, feed, wide, unit, chunk=chunk, scratch=self.scratch, judge=partial(self._judge, step))
        if not work.elements:
            return Found()
        emit = prepare(inputs)
        for piece in inputs.pieces():
            self._write(step, inputs, piece, emit(piece))
        return Found(inputs.nonfinite, inputs.corners)

    def _write(self, step: Step, inputs: Inputs, piece: Piece, result: Tensor) -> None:
        """Round one piece of the result and hand it on."""
        count = piece.stop - piece.start
        out = self.scratch.get("out", count, getattr(torch, step.work.dtype.name))
        out.copy_(rounded_to_odd(result) if result.dtype == torch.float64 and out.element_size() == 2 else result)
        finite = surely_finite(out) or bool(torch.isfinite(out).all())
        if not finite:
            raise Failed(
                "NOT_FINITE", f"{step.name} overflows {step.work.dtype.name}, though its inputs are finite.",
                "Use a wider `out_dtype` such as bfloat16 or float32, or smaller weights.", value=step.name,
            )  # fmt: skip
        inputs.restore(piece, out)
        self.sink.write(step, piece.start * out.element_size(), out.view(torch.uint8).numpy().data)

    def _judge(self, step: Step, nonfinite: Mapping[str, int]) -> None:
        if nonfinite and self.on_nonfinite == "fail":
            source, count = next(iter(nonfinite.items()))
            raise Failed(
                "NOT_FINITE", f"{step.name} has {count} NaN or infinite values in {source}.",
                "Use another source: such weights spoil whatever they are merged into.", value=step.name,
            )  # fmt: skip

    def _copied(self, step: Step) -> Found:
        """The bytes as they are, looked at on the way."""
        (operand,) = step.work.operands
        view = self._stored(operand)
        nonfinite: dict[str, int] = {}
        for start in range(0, step.work.elements, self.chunk):
            self._go_on()
            count = min(self.chunk, step.work.elements - start)
            piece = view.fill(start, self.scratch.get("stored", count, view.stored))
            if not surely_finite(piece) and (bad := count - int(torch.isfinite(piece).sum())):
                nonfinite[str(operand.source)] = nonfinite.get(str(operand.source), 0) + bad
                self._judge(step, nonfinite)
            self.sink.write(step, start * piece.element_size(), piece.view(torch.uint8).numpy().data)
        return Found(nonfinite)

    def _equal(self, step: Step) -> Found:
        """Tensors that are not floating point: copied if they are the same in every source."""
        views = [self._stored(operand) for operand in step.work.operands]
        for start in range(0, step.work.elements, self.chunk):
            self._go_on()
            count = min(self.chunk, step.work.elements - start)
            first, *others = (
                view.fill(start, self.scratch.get(f"equal {i}", count, view.stored)) for i, view in enumerate(views)
            )
            data = first.view(torch.uint8)
            if any(not torch.equal(data, other.view(torch.uint8)) for other in others):
                _differs(step)
            self.sink.write(step, start * first.element_size(), data.numpy().data)
        return Found()

    def _go_on(self) -> None:
        if self.stopped.is_set():
            raise CancelledError

    def _stored(self, operand: Operand) -> StoredView:
        return StoredView(self.sources[operand.model], operand.tensor, torch.float32, self.scratch)


def rounded_to_odd(wide: Tensor) -> Tensor:
    """float64 as float32 with the last bit set where something was cut off.

    What is rounded to bfloat16 or float16 from there comes out as if from float64; torch goes through the nearest
    float32, and rounds a value near the middle of two twice. Cf. S. Boldo and G. Melquiond, Emulation of FMA and
    correctly rounded sums, IEEE Transactions on Computers 2008.
    """
    out = wide.to(torch.float32)
    bits = out.view(torch.int32)
    bits -= (out.abs() > wide.abs()).int()
    return torch.where(out == wide, out, (bits | 1).view(torch.float32), out=out)


def as_stored(work: Work) -> bool:
    """Whether the output's bytes are those of the only operand."""
    first = work.operands[0]
    plain = work.aligned is None and first.tensor.dtype == work.dtype and first.patch is None
    unscaled = work.method == "passthrough" and work.per_input.get("scale", (None,)) == (None,)
    return plain and (work.action == "copy" or (work.action == "merge" and unscaled))


def read_ahead(step: Step, sources: Mapping[ModelRef, LocalFiles]) -> None:
    """Let the system read what `step` will want."""
    for operand in step.work.reads:
        StoredView(sources[operand.model], operand.tensor, torch.float32).will_need()


def _differs(step: Step) -> NoReturn:
    raise Failed(
        "SHAPE_MISMATCH", f"{step.name} is not floating point and differs between the sources.",
        "Use models that agree on it.", value=step.name,
    )  # fmt: skip
