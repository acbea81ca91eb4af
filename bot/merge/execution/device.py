"""Reader for a GPU: pinned buffers and a copy stream overlap the transfer of a chunk with work on the one before.

Methods run unchanged on the device of their tensors. On the CPU the same code runs without streams.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.cuda import Event

from bot.errors import Refused
from bot.merge.execution.views import StoredView
from bot.merge.streaming.inputs import Spans, View

TILE = 2**24  # elements per chunk: a launch costs as much as thousands of elements


def choose_devices(name: str) -> list[torch.device]:
    """Return the torch devices for cpu, cuda (all GPUs), cuda:N or auto."""
    cuda = torch.cuda.is_available()
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "auto") or (number and (kind != "cuda" or not number.isdecimal())):
        raise Refused("DEVICE_UNAVAILABLE", f"{name[:40]!r} is not a device.", "Use cpu, cuda or auto.", value=name)
    if kind == "cuda" and (not cuda or int(number or 0) >= torch.cuda.device_count()):
        raise Refused(
            "DEVICE_UNAVAILABLE",
            "This machine has no such CUDA device.",
            "Compute on the CPU: `--device cpu`; with `mergebot classic`, leave out --cuda.",
            value=name,
        )
    if not cuda or kind == "cpu":
        return [torch.device("cpu")]
    return [torch.device("cuda", i) for i in ([int(number)] if number else range(torch.cuda.device_count()))]


class DeviceReader:
    """Reader with two sets of buffers: one is computed on while the other is read, copied as stored and widened."""

    def __init__(self, views: Sequence[View], wide: torch.dtype, device: torch.device) -> None:
        self._views, self._wide, self.device = views, wide, device
        self._copies: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pinned: dict[tuple[int, int], Tensor] = {}
        self._free: list[Event | None] = [None, None]  # when the pinned buffers of a set may be filled again

    def chunks(self, spans: Spans) -> Iterator[list[Tensor]]:
        pending: list[tuple[list[Tensor], Event | None]] = []
        for number, span in enumerate(spans):
            pending.append(self._transfer(number % 2, *span))
            if len(pending) == 2:
                yield self._arrived(*pending.pop(0))
        if pending:
            yield self._arrived(*pending.pop(0))

    def _transfer(self, turn: int, start: int, stop: int) -> tuple[list[Tensor], Event | None]:
        """Start the transfer of one chunk; the event marks its arrival."""
        if (free := self._free[turn]) is not None:
            free.synchronize()
        tensors = []
        with torch.cuda.stream(self._copies) if self._copies is not None else contextlib.nullcontext():
            for i, view in enumerate(self._views):
                if isinstance(view, StoredView):
                    here = view.fill(start, self._buffer(turn, i, stop - start, view.stored))
                else:
                    here = self._buffer(turn, i, stop - start, self._wide).copy_(view.read(start, stop))
                tensors.append(here.to(self.device, non_blocking=True, copy=True))
            if self._copies is None:
                return tensors, None
            self._free[turn] = self._copies.record_event()
        return tensors, self._free[turn]

    def _arrived(self, tensors: list[Tensor], event: Event | None) -> list[Tensor]:
        if event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(event)
            for tensor in tensors:
                tensor.record_stream(stream)
        return [tensor.to(self._wide) for tensor in tensors]

    def _buffer(self, turn: int, i: int, count: int, dtype: torch.dtype) -> Tensor:
        buffer = self._pinned.get((turn, i))
        if buffer is None or buffer.numel() < count or buffer.dtype != dtype:
            buffer = torch.empty(count, dtype=dtype, pin_memory=self._copies is not None)
            self._pinned[turn, i] = buffer
        return buffer[:count]
