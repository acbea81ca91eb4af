"""The inputs of one step, piece by piece, with NaN and infinite elements taken out and remembered.

Pieces start at fixed places, so that sums over them do not depend on threads. Every pass over the tensor gets the
same pieces; the tensors of a piece are the pass's own, to be overwritten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bot.merge.operands.views import Scratch, View
from bot.merge.planning.memory import CHUNK
from bot.merge.planning.work import Work

SAMPLE, BLOCKS = 2**16, 64  # elements looked at before a search for thresholds, and in how many places
Spans = Iterable[tuple[int, int]]


@dataclass(slots=True)
class Piece:
    """Elements [start, stop) of every operand, in the working type; `x` are all but the base `b`."""

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
        """x_i - b, in the place of x_i; without a base the x_i themselves."""
        if self.base is None:
            return self.tensors
        return [tensor.sub_(self.b) for tensor in self.x]


class Feed(Protocol):
    """Brings the operands' pieces to where they are worked on."""

    device: torch.device

    def pieces(self, spans: Spans) -> Iterator[list[Tensor]]: ...


class CpuFeed:
    """Reads each view when its piece is wanted."""

    device = torch.device("cpu")

    def __init__(self, views: Sequence[View]) -> None:
        self._views = views

    def pieces(self, spans: Spans) -> Iterator[list[Tensor]]:
        for start, stop in spans:
            yield [view.read(start, stop) for view in self._views]


class Inputs:
    """Everything a method may ask about its operands. `chunk`: elements per piece, before rounding to whole units."""

    def __init__(
        self,
        work: Work,
        feed: Feed,
        wide: torch.dtype,
        unit: int,
        *,
        chunk: int = CHUNK,
        scratch: Scratch | None = None,
        judge: Callable[[Mapping[str, int]], None] | None = None,
    ) -> None:
        self.work, self.feed, self.wide = work, feed, wide
        self.count = work.elements
        self.unit = max(1, unit)
        self.chunk = max(1, chunk // self.unit) * self.unit
        self.others = [i for i in range(len(work.operands)) if i != work.base]
        self.n = len(self.others)
        self.scratch = scratch or Scratch()
        self.nonfinite: dict[str, int] = {}
        self.corners: dict[str, int] = {}
        self._judge = judge or (lambda nonfinite: None)
        self._spoilt: set[int] = set()  # where pieces start that are not finite throughout
        self._taken_out: tuple[Tensor, Tensor] | None = None  # which elements of the present piece, and their sums
        self._examined = 0

    def values(self, name: str) -> list[float]:
        """A parameter of each input but the base."""
        column = self.work.per_input[name]
        return [math.nan if (value := column[i]) is None else float(value) for i in self.others]

    def corner(self, code: str, count: int = 1) -> None:
        """Remember that a rule for odd cases came in."""
        if count:
            self.corners[code] = self.corners.get(code, 0) + count

    def buffer(self, name: str, like: Tensor) -> Tensor:
        """A reused tensor as long as `like`, contents undefined."""
        return self.scratch.get(name, like.numel(), self.wide, self.feed.device)

    def spans(self) -> Iterator[tuple[int, int]]:
        return ((start, min(self.count, start + self.chunk)) for start in range(0, self.count, self.chunk))

    def pieces(self) -> Iterator[Piece]:
        """One pass over the tensor."""
        for (start, stop), tensors in zip(self.spans(), self.feed.pieces(self.spans()), strict=True):
            if stop > self._examined:
                self._examine(start, tensors)
                self._examined = stop
            self._taken_out = _take_out(tensors) if start in self._spoilt else None
            yield Piece(start, stop, tensors, self.work.base)

    def sample(self) -> Iterator[Piece]:
        """About SAMPLE elements from all over the tensor, in small pieces."""
        size = SAMPLE if self.count <= 2**27 else 16 * SAMPLE
        blocks = max(8, min(BLOCKS, size // self.unit))
        length = max(1, size // blocks // self.unit) * self.unit
        last = max(0, self.count // self.unit - length // self.unit)
        spans = sorted({(k * last // (blocks - 1)) * self.unit for k in range(blocks)})
        pairs = [(start, min(self.count, start + length)) for start in spans]
        for (start, stop), tensors in zip(pairs, self.feed.pieces(pairs), strict=True):
            for tensor in tensors:
                tensor.nan_to_num_(0.0, 0.0, 0.0)
            yield Piece(start, stop, tensors, self.work.base)

    def _examine(self, start: int, tensors: list[Tensor]) -> None:
        """Count non-finite elements, once per piece."""
        if all(surely_finite(tensor) for tensor in tensors):
            return
        for operand, tensor in zip(self.work.operands, tensors, strict=True):
            if count := tensor.numel() - int(torch.isfinite(tensor).sum()):
                self.nonfinite[str(operand.source)] = self.nonfinite.get(str(operand.source), 0) + count
                self._spoilt.add(start)
        if start in self._spoilt:
            self._judge(self.nonfinite)

    def restore(self, piece: Piece, result: Tensor) -> None:
        """Put what was taken out of `piece`, which must be the present one, back into its place: the inputs' sum."""
        if self._taken_out is not None:
            where, values = self._taken_out
            result[where] = values.to(result.dtype)


def _take_out(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Zero in all tensors what is not finite in any; which elements those were, and the sums of the tensors there.

    Found again in every pass: remembered for all pieces, a tensor full of NaN would take more memory than its inputs.
    """
    spoilt = ~torch.isfinite(tensors[0])
    for tensor in tensors[1:]:
        spoilt |= ~torch.isfinite(tensor)
    values = tensors[0][spoilt]
    for tensor in tensors[1:]:
        values += tensor[spoilt]
    for tensor in tensors:
        tensor.masked_fill_(spoilt, 0.0)
    return spoilt, values


Emit = Callable[[Piece], Tensor]  # the wide result of a piece, in a tensor of the piece or a buffer


def surely_finite(tensor: Tensor) -> bool:
    """Whether every element surely is finite: one cheap sum. False means that a closer look is due."""
    return math.isfinite(float(tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)))
