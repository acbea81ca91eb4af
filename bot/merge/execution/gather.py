"""Views of matrices in the row order of the output's vocabulary. See bot/merge/tokenizer/rows.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from bot.merge.streaming.inputs import View
from bot.merge.streaming.operation import CHUNK
from bot.merge.tokenizer.rows import RowMap
from bot.merge.tokenizer.tokenizer import Index

MAX_GAP = 2**14  # elements; reading so many in vain costs about as much as a second read


class GatheredView:
    """View of matrix number `mine` of `matrices` (rows_i, ...), re-indexed; rows it lacks come from the others."""

    def __init__(self, row_map: RowMap, mine: int, matrices: Sequence[View], wide: torch.dtype) -> None:
        self._map, self._mine, self._matrices, self._wide = row_map, matrices[mine], matrices, wide
        self.shape = (len(row_map.own), *self._mine.shape[1:])
        self.unit = math.prod(self.shape[1:])
        self._mean: Tensor | None = None
        self._out = torch.empty(0, self.unit, dtype=wide)

    def read(self, start: int, stop: int) -> Tensor:
        first, last = start // self.unit, stop // self.unit
        out = self._tokens(first, last)
        padding = _within(self._map.padding, first, last)
        if len(padding):
            mean = self._mean_row()
            out = self._tokens(first, last)  # `_mean_row` overwrote the buffer
            out[torch.from_numpy(self._map.padding[padding] - first)] = mean
        return out.view(-1)

    def _tokens(self, first: int, last: int) -> Tensor:
        """Rows [first, last) of the output's vocabulary; zeros for padding."""
        if len(self._out) < last - first:
            self._out = torch.empty(last - first, self.unit, dtype=self._wide)
        out = self._out[: last - first].zero_()
        own = self._map.own[first:last]
        have = np.flatnonzero(own >= 0)
        self._gather(self._mine, have, own[have], out)
        self._fill(out, first, last)
        return out

    def _fill(self, out: Tensor, first: int, last: int) -> None:
        for fill in self._map.fills:
            some = _within(fill.rows, first, last)
            if not fill.matrices or not len(some):
                continue
            total = torch.zeros(len(some), self.unit, dtype=torch.float64)
            rows = torch.empty(len(some), self.unit, dtype=self._wide)
            for matrix, taken in zip(fill.matrices, fill.taken[some].T, strict=True):
                self._gather(self._matrices[matrix], np.arange(len(some)), taken, rows)
                total += rows
            out[torch.from_numpy(fill.rows[some] - first)] = rows.copy_(total.div_(len(fill.matrices)))

    def _gather(self, matrix: View, places: Index, rows: Index, out: Tensor) -> None:
        """Copy rows of a matrix to places of `out`. Rows close together in the file are read with one call."""
        if matrix.unit > 1:  # with an adapter, products of rows in the gap cost more than a second read
            for at, row, count in _runs(places, rows):
                out[at : at + count] = self._rows(matrix, row, count)
            return
        order = np.argsort(rows, kind="stable")
        places, rows = places[order], rows[order]
        for start, stop in _stretches(rows, MAX_GAP // self.unit, max(1, len(out))):
            first, count = int(rows[start]), int(rows[stop - 1] - rows[start]) + 1
            read = self._rows(matrix, first, count)
            if count == 1 or (count == stop - start and (np.diff(places[start:stop]) == 1).all()):
                out[int(places[start]) : int(places[start]) + count] = read
            else:
                out[torch.from_numpy(places[start:stop])] = read[torch.from_numpy(rows[start:stop] - first)]

    def _rows(self, matrix: View, row: int, count: int) -> Tensor:
        return matrix.read(row * self.unit, (row + count) * self.unit).view(count, self.unit)

    def _mean_row(self) -> Tensor:
        """Mean of the rows of tokens, over finite values."""
        if self._mean is None:
            total = torch.zeros(self.unit, dtype=torch.float64)
            count = torch.zeros(self.unit, dtype=torch.int64)
            step = max(1, CHUNK // max(1, self.unit))
            token = torch.ones(len(self._map.own), dtype=torch.bool)
            token[torch.from_numpy(self._map.padding)] = False
            for first in range(0, len(token), step):
                last = min(first + step, len(token))
                rows = self._tokens(first, last)[token[first:last]]
                finite = rows.isfinite()
                total += rows.where(finite, 0.0).sum(0, dtype=torch.float64)
                count += finite.sum(0)
            self._mean = (total / count.clamp_(min=1)).to(self._wide)
        return self._mean


def _within(rows: Index, first: int, last: int) -> Index:
    """Places in `rows` whose value lies in [first, last)."""
    return np.flatnonzero((rows >= first) & (rows < last))


def _stretches(rows: Index, bridge: int, most: int) -> Iterator[tuple[int, int]]:
    """Split ascending `rows` into [start, stop) per read: at most `most` rows, gaps of at most `bridge` rows."""
    breaks = np.flatnonzero(np.diff(rows) > bridge + 1) + 1
    for start, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True):
        while start < end:
            stop = min(end, int(np.searchsorted(rows, rows[start] + most)))
            yield start, stop
            start = stop


def _runs(places: Index, rows: Index) -> Iterator[tuple[int, int, int]]:
    """Split into (place, row, count) of runs in which both ascend by one."""
    if not len(places):
        return
    breaks = np.flatnonzero((np.diff(places) != 1) | (np.diff(rows) != 1)) + 1
    starts, ends = np.concatenate([[0], breaks]), np.concatenate([breaks, [len(places)]])
    for start, end in zip(starts, ends, strict=True):
        yield int(places[start]), int(rows[start]), int(end - start)
