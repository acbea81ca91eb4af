"""Which elements of a whole tensor are among the k largest, found while the tensor streams by. merging.md 5.3.

A sample says between which two values the k-th largest lies, almost surely. One pass counts what lies above, and
gathers the few elements between; their order gives the exact answer. Where the sample was wrong, histograms over the
bits find it: floats that are not negative order like the integers of the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bot.merge.memory import GATHERED
from bot.merge.methods.reductions import Selection, bucket
from bot.merge.passes.elementwise import shrunk
from bot.merge.passes.inputs import Inputs, Piece

Magnitudes = Callable[[Piece], Sequence[Tensor]]  # one flat tensor per column, none of them negative
Array = NDArray[Any]
SMALL = 2**18  # tensors up to this size are gathered whole


def select(inputs: Inputs, magnitudes: Magnitudes, ks: Sequence[Sequence[int]]) -> list[list[Selection]]:
    """For each column and each k of it, which k elements are the largest; among equals the first ones win."""
    n = inputs.count
    wanted = [(column, k) for column, row in enumerate(ks) for k in row if 0 < k < n]
    found: dict[tuple[int, int], Selection] = {}
    if wanted:
        brackets = _brackets(inputs, magnitudes, wanted)
        for piece in inputs.pieces():
            arrays = magnitudes(piece)
            for bracket in brackets:
                bracket.see(arrays[bracket.column])
        for bracket in brackets:
            exact = bracket.answer() or _by_histogram(inputs, magnitudes, bracket.column, bracket.k)
            found[bracket.column, bracket.k] = exact
    trivial = {True: Selection(math.inf, 0), False: Selection(-math.inf, 0)}
    return [[found.get((column, k)) or trivial[k <= 0] for k in row] for column, row in enumerate(ks)]


def _brackets(inputs: Inputs, magnitudes: Magnitudes, wanted: Sequence[tuple[int, int]]) -> list[_Bracket]:
    if inputs.count <= SMALL:
        return [_Bracket(column, k, -1.0, math.inf) for column, k in wanted]
    columns = sorted({column for column, _ in wanted})
    parts: dict[int, list[Tensor]] = {column: [] for column in columns}
    for piece in inputs.sample():
        arrays = magnitudes(piece)
        for column in columns:
            parts[column].append(arrays[column].clone())
    samples = {column: torch.cat(parts[column]).cpu().numpy() for column in columns}
    return [_Bracket(column, k, *_around(samples[column], k / inputs.count)) for column, k in wanted]


def _around(sample: Array, share: float) -> tuple[float, float]:
    """Two values between which the element lies that `share` of all elements exceed."""
    size = len(sample)
    slack = 5 * math.sqrt(share * (1 - share) / size) + 0.004
    low, high = int(size * (1 - share - slack)), int(size * (1 - share + slack))
    ordered = np.sort(sample)
    return (float(ordered[low]) if low >= 0 else -1.0), (float(ordered[high]) if high < size else math.inf)


class _Bracket:
    """Counts around one threshold: elements above `high`, at it, between, and at `low`."""

    def __init__(self, column: int, k: int, low: float, high: float) -> None:
        self.column, self.k, self.low, self.high = column, k, low, high
        self._above = self._at_high = self._at_low = self._gathered = 0
        self._between: list[Array] = []

    def see(self, magnitudes: Tensor) -> None:
        if magnitudes.device.type == "cpu":
            array = magnitudes.numpy()
            above, over = array > self.high, array > self.low
            equal = array == self.high
            counts = [int(np.count_nonzero(one)) for one in (above, equal, array == self.low)]
            above |= equal
            inside = array[over & ~above]
        else:
            above_, equal_ = magnitudes > self.high, magnitudes == self.high
            counts = [int(one.sum()) for one in (above_, equal_, magnitudes == self.low)]
            inside = magnitudes[(magnitudes > self.low) & (magnitudes < self.high)].cpu().numpy()
        self._above += counts[0]
        self._at_high += counts[1]
        self._at_low += counts[2]
        self._gathered += len(inside)
        if self._gathered <= GATHERED:
            self._between.append(inside)

    def answer(self) -> Selection | None:
        """None if the threshold lies outside, or too much lay between."""
        rest = self.k - self._above
        if rest <= 0 or self._gathered > GATHERED:
            return None
        if rest <= self._at_high:
            return Selection(self.high, rest, self._at_high - rest)
        rest -= self._at_high
        if rest > self._gathered:
            rest -= self._gathered
            return Selection(self.low, rest, self._at_low - rest) if rest <= self._at_low else None
        between = np.concatenate(self._between)
        between.sort()  # faster than a partition where many are equal
        threshold = between[len(between) - rest]
        equal = rest - int(np.count_nonzero(between > threshold))
        return Selection(float(threshold), equal, int(np.count_nonzero(between == threshold)) - equal)


def _by_histogram(inputs: Inputs, magnitudes: Magnitudes, column: int, k: int) -> Selection:
    """16 bits of the threshold per pass, from the top."""
    bits = 64 if inputs.wide == torch.float64 else 32
    integers: Any = np.int64 if bits == 64 else np.int32
    prefix, rest, equal = 0, k, 0
    for shift in range(bits - 16, -1, -16):
        counts = np.zeros(2**16, dtype=np.int64)
        for piece in inputs.pieces():
            array = magnitudes(piece)[column].cpu().numpy().view(integers)
            mine = array if shift == bits - 16 else array[array >> (shift + 16) == prefix]
            counts += np.bincount((mine >> shift) & 0xFFFF, minlength=2**16)
        digit, above = bucket(counts, rest)
        prefix, rest, equal = (prefix << 16) | digit, rest - above, int(counts[digit])
    value = np.array(prefix, dtype=integers).view(np.float64 if bits == 64 else np.float32)
    return Selection(float(value), rest, equal - rest)


class Shrinker:
    """Zeroes in place what a selection does not select. Pieces must come in order."""

    def __init__(self, selection: Selection, wide: torch.dtype) -> None:
        self._selection = selection
        kind: Any = np.float64 if wide == torch.float64 else np.float32
        self._below = float(np.nextafter(kind(selection.threshold), kind(-1)))
        self._left = selection.equal  # how many of those exactly at the threshold are still to be kept

    def __call__(self, delta: Tensor, magnitudes: Tensor | None = None) -> Tensor:
        """`magnitudes`: |delta| if it is at hand."""
        chosen = self._selection
        if not math.isfinite(chosen.threshold):
            return delta.zero_() if chosen.threshold > 0 else delta
        if not chosen.excess:
            return self._with_equals(delta)
        if not self._left:
            return shrunk(delta, chosen.threshold)
        at = (delta.abs() if magnitudes is None else magnitudes) == chosen.threshold
        count = int(at.sum())
        if count > self._left:
            surplus = at.nonzero().squeeze(1)[self._left :]
            delta[surplus] = 0.0
            count = self._left
        self._left -= count
        return self._with_equals(delta)

    def _with_equals(self, delta: Tensor) -> Tensor:
        return delta if self._selection.threshold <= 0 else shrunk(delta, self._below)
