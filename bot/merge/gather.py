"""Carry out row maps: a matrix in the order of the output's vocabulary, piece by piece. See `rows.py`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from bot.merge.memory import CHUNK
from bot.merge.rows import RowMap
from bot.merge.tokenizer import Index
from bot.merge.views import View


class GatheredView:
    """Matrix number `mine` of `matrices` (rows_i, ...), re-indexed; other matrices give rows that it lacks."""

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
            out = self._tokens(first, last)  # the mean was taken in the same buffer
            out[torch.from_numpy(self._map.padding[padding] - first)] = mean
        return out.view(-1)

    def _tokens(self, first: int, last: int) -> Tensor:
        """Rows [first, last) of the output's vocabulary, zeros where no token stands."""
        if len(self._out) < last - first:
            self._out = torch.empty(last - first, self.unit, dtype=self._wide)
        out = self._out[: last - first].zero_()
        own = self._map.own[first:last]
        have = np.flatnonzero(own >= 0)
        for at, row, count in _runs(have, own[have]):
            out[at : at + count] = self._rows(self._mine, row, count)
        self._fill(out, first, last)
        return out

    def _fill(self, out: Tensor, first: int, last: int) -> None:
        for fill in self._map.fills:
            for i in _within(fill.rows, first, last) if fill.matrices else ():
                total = torch.zeros(self.unit, dtype=torch.float64)
                for matrix, row in zip(fill.matrices, fill.taken[i], strict=True):
                    total += self._rows(self._matrices[matrix], int(row), 1)[0]
                out[int(fill.rows[i]) - first] = total / len(fill.matrices)

    def _rows(self, matrix: View, row: int, count: int) -> Tensor:
        return matrix.read(row * self.unit, (row + count) * self.unit).view(count, self.unit)

    def _mean_row(self) -> Tensor:
        """The mean of the rows of tokens. A value that is not finite stays in its row and out of the mean."""
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


def _runs(places: Index, rows: Index) -> Iterator[tuple[int, int, int]]:
    """(place, row, count) of the stretches in which both go up by one, to be read at a time."""
    if not len(places):
        return
    breaks = np.flatnonzero((np.diff(places) != 1) | (np.diff(rows) != 1)) + 1
    starts, ends = np.concatenate([[0], breaks]), np.concatenate([breaks, [len(places)]])
    for start, end in zip(starts, ends, strict=True):
        yield int(places[start]), int(rows[start]), int(end - start)
