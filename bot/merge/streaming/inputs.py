"""The inputs of one operation, chunk by chunk. NaN and infinite elements are taken out and counted.

Chunks start at fixed places, so that sums over them do not depend on the number of threads. Every pass over a tensor
gets the same chunks. A pass may overwrite the tensors of its chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bot.merge.streaming.operation import CHUNK, Operation

SAMPLE, BLOCKS = 2**16, 64  # elements sampled before a search for thresholds, and the number of places
Spans = Iterable[tuple[int, int]]


class Scratch:
    """Tensors that one thread reuses: allocating fresh memory costs more than the arithmetic done in it."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, count: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """The tensor of that name with `count` elements; contents undefined."""
        held = self._tensors.get((name, dtype))
        if held is None or held.numel() < count:
            held = self._tensors[name, dtype] = torch.empty(count, dtype=dtype, device=device)
        return held[:count]


class View(Protocol):
    """One operand in the shape of the output and in the compute dtype (float32 or float64)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        ...

    @property
    def unit(self) -> int:
        """Reads start and end at multiples of this: 1, or the length of a row (or at the end of the tensor)."""
        ...

    def read(self, start: int, stop: int) -> Tensor:
        """Flat elements [start, stop) in the compute dtype on the CPU.

        The caller may overwrite the tensor. It is valid until the next read of this view. For one thread at a time.
        """
        ...


@dataclass(slots=True)
class Chunk:
    """Elements [start, stop) of every operand in the compute dtype; `x` are all operands but the base `b`."""

    start: int
    stop: int
    tensors: list[Tensor]
    base: int | None

    @property
    def x(self) -> list[Tensor]:
        return [tensor for i, tensor in enumerate(self.tensors) if i != self.base]

    @property
    def b(self) -> Tensor:
        assert self.base is not None
        return self.tensors[self.base]

    def deltas(self) -> list[Tensor]:
        """x_i - b, in place of x_i; the x_i themselves where there is no base."""
        if self.base is None:
            return self.tensors
        return [tensor.sub_(self.b) for tensor in self.x]


Kernel = Callable[[Chunk], Tensor]  # computes the result of a chunk, in a tensor of the chunk or a buffer


class Reader(Protocol):
    """Brings the chunks of all operands to the device that computes."""

    device: torch.device

    def chunks(self, spans: Spans) -> Iterator[list[Tensor]]: ...


class CpuReader:
    """Reads each view when its chunk is needed."""

    device = torch.device("cpu")

    def __init__(self, views: Sequence[View]) -> None:
        self._views = views

    def chunks(self, spans: Spans) -> Iterator[list[Tensor]]:
        for start, stop in spans:
            yield [view.read(start, stop) for view in self._views]


class Inputs:
    """The operands of one operation and its parameters. `chunk`: elements per chunk, rounded to whole units.

    `dtype` is the compute dtype. `on_nonfinite` receives the counts of non-finite elements by source and may raise.
    """

    def __init__(
        self,
        operation: Operation,
        reader: Reader,
        dtype: torch.dtype,
        unit: int,
        *,
        chunk: int = CHUNK,
        scratch: Scratch | None = None,
        on_nonfinite: Callable[[Mapping[str, int]], None] | None = None,
    ) -> None:
        self.operation, self.reader, self.dtype = operation, reader, dtype
        self.count = operation.elements
        self.unit = max(1, unit)
        self.chunk = max(1, chunk // self.unit) * self.unit
        self.others = [i for i in range(len(operation.operands)) if i != operation.base]
        self.n = len(self.others)
        self.scratch = scratch or Scratch()
        self.nonfinite: dict[str, int] = {}
        self.corner_cases: dict[str, int] = {}
        self._on_nonfinite = on_nonfinite or (lambda counts: None)
        self._with_nonfinite: set[int] = set()  # starts of chunks with non-finite elements
        self._taken_out: tuple[Tensor, Tensor] | None = None  # mask of the present chunk, and sums of the inputs there
        self._examined = 0

    @property
    def device(self) -> torch.device:
        return self.reader.device

    def flag(self, name: str) -> bool:
        """A shared boolean parameter."""
        return bool(self.operation.shared[name])

    def number(self, name: str) -> float:
        """A shared numeric parameter."""
        return float(self.operation.shared[name])

    def values(self, name: str) -> list[float]:
        """A parameter per input, without the base; NaN where it is unset."""
        column = self.operation.per_input[name]
        return [math.nan if (value := column[i]) is None else float(value) for i in self.others]

    def corner_case(self, code: str, count: int = 1) -> None:
        """Count the use of a rule for a corner case. It becomes a notice of the merge."""
        if count:
            self.corner_cases[code] = self.corner_cases.get(code, 0) + count

    def buffer(self, name: str, like: Tensor) -> Tensor:
        """A reused tensor of the length of `like`; contents undefined."""
        return self.scratch.get(name, like.numel(), self.dtype, self.device)

    def spans(self) -> Iterator[tuple[int, int]]:
        return ((start, min(self.count, start + self.chunk)) for start in range(0, self.count, self.chunk))

    def chunks(self) -> Iterator[Chunk]:
        """One pass over the tensor."""
        for (start, stop), tensors in zip(self.spans(), self.reader.chunks(self.spans()), strict=True):
            if stop > self._examined:
                self._examine(start, tensors)
                self._examined = stop
            self._taken_out = _take_out(tensors) if start in self._with_nonfinite else None
            yield Chunk(start, stop, tensors, self.operation.base)

    def sample(self) -> Iterator[Chunk]:
        """About SAMPLE elements from all over the tensor, in small chunks."""
        size = SAMPLE if self.count <= 2**27 else 16 * SAMPLE
        blocks = max(8, min(BLOCKS, size // self.unit))
        length = max(1, size // blocks // self.unit) * self.unit
        last = max(0, self.count // self.unit - length // self.unit)
        spans = sorted({(k * last // (blocks - 1)) * self.unit for k in range(blocks)})
        pairs = [(start, min(self.count, start + length)) for start in spans]
        for (start, stop), tensors in zip(pairs, self.reader.chunks(pairs), strict=True):
            for tensor in tensors:
                tensor.nan_to_num_(0.0, 0.0, 0.0)
            yield Chunk(start, stop, tensors, self.operation.base)

    def restore(self, chunk: Chunk, result: Tensor) -> None:
        """Write the sum of the inputs where non-finite elements were taken out of `chunk`, the present one."""
        if self._taken_out is not None:
            where, values = self._taken_out
            result[where] = values.to(result.dtype)

    def _examine(self, start: int, tensors: list[Tensor]) -> None:
        """Count non-finite elements, once per chunk."""
        if all(surely_finite(tensor) for tensor in tensors):
            return
        for operand, tensor in zip(self.operation.operands, tensors, strict=True):
            if count := tensor.numel() - int(torch.isfinite(tensor).sum()):
                self.nonfinite[str(operand.source)] = self.nonfinite.get(str(operand.source), 0) + count
                self._with_nonfinite.add(start)
        if start in self._with_nonfinite:
            self._on_nonfinite(self.nonfinite)


def _take_out(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Set elements to zero in all tensors where any is non-finite; returns their mask and the sums of the tensors.

    Computed again in every pass: kept for all chunks, a tensor full of NaN would take more memory than its inputs.
    """
    mask = ~torch.isfinite(tensors[0])
    for tensor in tensors[1:]:
        mask |= ~torch.isfinite(tensor)
    values = tensors[0][mask]
    for tensor in tensors[1:]:
        values += tensor[mask]
    for tensor in tensors:
        tensor.masked_fill_(mask, 0.0)
    return mask, values


def surely_finite(tensor: Tensor) -> bool:
    """True if every element is finite, found with one sum. False means that a closer look is needed."""
    return math.isfinite(float(tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)))
