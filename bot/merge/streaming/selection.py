"""Exact selection of the k largest elements of a tensor that arrives chunk by chunk.

A sample gives two values that almost surely bracket the k-th largest. One pass counts the elements above and gathers
the few between; their order gives the exact threshold. Where the sample was wrong, histograms over the bits find it:
with the sign handled, floats order like the integers of the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bot.merge.streaming.inputs import Chunk, Inputs
from bot.merge.streaming.operation import GATHER_LIMIT

Magnitudes = Callable[[Chunk], Sequence[Tensor]]  # one flat tensor per column
Array = NDArray[Any]
SMALL = 2**18  # tensors up to this size are gathered whole


@dataclass(slots=True)
class Selection:
    """The k largest elements of a tensor: all above `threshold`, and the first `equal` of those exactly at it.

    `excess` counts the further elements at the threshold, which are not selected.
    """

    threshold: float
    equal: int
    excess: int = 0


def select(inputs: Inputs, magnitudes: Magnitudes, ks: Sequence[Sequence[int]]) -> list[list[Selection]]:
    """The k largest elements of each column, for each k in `ks[column]`. Of equal elements the first ones win."""
    n = inputs.count
    wanted = [(column, k) for column, row in enumerate(ks) for k in row if 0 < k < n]
    found: dict[tuple[int, int], Selection] = {}
    if wanted:
        brackets = _brackets(inputs, magnitudes, wanted)
        for chunk in inputs.chunks():
            arrays = magnitudes(chunk)
            for bracket in brackets:
                bracket.see(arrays[bracket.column])
        for bracket in brackets:
            exact = bracket.answer() or _by_histogram(inputs, magnitudes, bracket.column, bracket.k)
            found[bracket.column, bracket.k] = exact
    trivial = {True: Selection(math.inf, 0), False: Selection(-math.inf, 0)}
    return [[found.get((column, k)) or trivial[k <= 0] for k in row] for column, row in enumerate(ks)]


def select_share(inputs: Inputs, magnitudes: Callable[[Chunk], Tensor], share: float) -> Selection:
    """The int(share * m) largest elements, where m elements are above zero; 0 < share < 1."""
    column: Magnitudes = lambda chunk: [magnitudes(chunk)]  # noqa: E731
    sample = _sampled(inputs, column, [0])[0]
    guess = share * float(np.count_nonzero(sample)) / max(1, len(sample))
    bracket = _Bracket(0, 0, *(_around(sample, guess) if inputs.count > SMALL else (-math.inf, math.inf)))
    positive = 0
    for chunk in inputs.chunks():
        sizes = magnitudes(chunk)
        positive += int(np.count_nonzero(sizes.numpy() > 0) if sizes.device.type == "cpu" else (sizes > 0).sum())
        bracket.see(sizes)
    bracket.k = int(positive * share)
    if bracket.k == 0:
        return Selection(math.inf, 0)
    return bracket.answer() or _by_histogram(inputs, column, 0, bracket.k)


def _brackets(inputs: Inputs, magnitudes: Magnitudes, wanted: Sequence[tuple[int, int]]) -> list[_Bracket]:
    if inputs.count <= SMALL:
        return [_Bracket(column, k, -math.inf, math.inf) for column, k in wanted]
    samples = _sampled(inputs, magnitudes, sorted({column for column, _ in wanted}))
    return [_Bracket(column, k, *_around(samples[column], k / inputs.count)) for column, k in wanted]


def _sampled(inputs: Inputs, magnitudes: Magnitudes, columns: Sequence[int]) -> dict[int, Array]:
    parts: dict[int, list[Tensor]] = {column: [] for column in columns}
    for chunk in inputs.sample():
        arrays = magnitudes(chunk)
        for column in columns:
            parts[column].append(arrays[column].clone())
    return {column: torch.cat(parts[column]).cpu().numpy() for column in columns}


def _around(sample: Array, share: float) -> tuple[float, float]:
    """Two values that bracket the element exceeded by the fraction `share` of all elements."""
    size = len(sample)
    slack = 5 * math.sqrt(share * (1 - share) / size) + 0.004
    low, high = int(size * (1 - share - slack)), int(size * (1 - share + slack))
    ordered = np.sort(sample)
    return (float(ordered[low]) if low >= 0 else -math.inf), (float(ordered[high]) if high < size else math.inf)


class _Bracket:
    """Counts around one threshold: elements above `high`, at it, between, above `low` and at it."""

    def __init__(self, column: int, k: int, low: float, high: float) -> None:
        self.column, self.k, self.low, self.high = column, k, low, high
        self._above = self._at_high = self._over = self._at_low = self._gathered = 0
        self._between: list[Array] = []

    def see(self, magnitudes: Tensor) -> None:
        if magnitudes.device.type == "cpu":
            array = magnitudes.numpy()
            above, over = array > self.high, array > self.low
            equal = array == self.high
            counts = [int(np.count_nonzero(one)) for one in (above, equal, over, array == self.low)]
            above |= equal
            inside = np.compress(over > above, array)
        else:
            above_, equal_ = magnitudes > self.high, magnitudes == self.high
            counts = [int(one.sum()) for one in (above_, equal_, magnitudes > self.low, magnitudes == self.low)]
            inside = magnitudes[(magnitudes > self.low) & (magnitudes < self.high)].cpu().numpy()
        self._above += counts[0]
        self._at_high += counts[1]
        self._over += counts[2]
        self._at_low += counts[3]
        self._gathered += len(inside)
        if self._gathered <= GATHER_LIMIT:
            self._between.append(inside)

    def answer(self) -> Selection | None:
        """The selection; None if the threshold lies outside, or the counts do not give exactly k elements."""
        if self._gathered > GATHER_LIMIT:
            return None
        beyond = self._above + self._at_high
        if self.k <= beyond:
            return self._exactly(self.high, self._above, self._at_high)
        rest = self.k - beyond
        if rest > self._gathered:
            return self._exactly(self.low, self._over, self._at_low)
        between = np.concatenate(self._between)
        between.sort()  # faster than a partition where many are equal
        threshold = between[len(between) - rest]
        beyond += int(np.count_nonzero(between > threshold))
        return self._exactly(float(threshold), beyond, int(np.count_nonzero(between == threshold)))

    def _exactly(self, threshold: float, beyond: int, at: int) -> Selection | None:
        """The selection of k: `beyond` elements above the threshold and some of the `at` elements at it; else None."""
        equal = self.k - beyond
        return Selection(threshold, equal, at - equal) if 0 < equal <= at else None


def _by_histogram(inputs: Inputs, magnitudes: Magnitudes, column: int, k: int) -> Selection:
    """16 bits of the threshold per pass, from the top."""
    bits = shift = 8 * magnitudes(next(inputs.sample()))[column].element_size()
    prefix, rest, equal = 0, k, 0
    while shift:
        shift -= 16
        counts = np.zeros(2**16, dtype=np.int64)
        for chunk in inputs.chunks():
            ordered = _ordered_bits(magnitudes(chunk)[column].cpu().numpy())
            mine = ordered if shift == bits - 16 else ordered[ordered >> (shift + 16) == prefix]
            counts += np.bincount(((mine >> shift) & 0xFFFF).astype(np.int64), minlength=2**16)
        digit, above = _bucket(counts, rest)
        prefix, rest, equal = (prefix << 16) | digit, rest - above, int(counts[digit])
    return Selection(_of_ordered_bits(prefix, bits), rest, equal - rest)


def _bucket(counts: Array, k: int) -> tuple[int, int]:
    """The bucket that holds the k-th largest element, and the number of elements in the buckets above it."""
    from_top = np.cumsum(counts[::-1])
    i = int(np.searchsorted(from_top, k))
    return len(counts) - 1 - i, int(from_top[i - 1]) if i else 0


def _ordered_bits(array: Array) -> Array:
    """Unsigned integers that order as the floats do; both zeros are one."""
    kind: Any = np.uint64 if array.dtype == np.float64 else np.uint32
    raw, top = (array + array.dtype.type(0)).view(kind), kind(1 << (8 * array.itemsize - 1))
    out: Array = np.where(raw & top, ~raw, raw | top)
    return out


def _of_ordered_bits(number: int, bits: int) -> float:
    """The float that `_ordered_bits` turns into `number`."""
    top = 1 << (bits - 1)
    raw = number ^ top if number & top else number ^ (2 * top - 1)
    kinds: tuple[Any, Any] = (np.uint64, np.float64) if bits == 64 else (np.uint32, np.float32)
    return float(np.array(raw, dtype=kinds[0]).view(kinds[1]))


class Selector:
    """Sets unselected elements to zero, in place. Chunks must come in order."""

    def __init__(self, selection: Selection, dtype: torch.dtype) -> None:
        self._selection = selection
        kind: Any = np.float64 if dtype == torch.float64 else np.float32
        self._below = float(np.nextafter(kind(selection.threshold), kind(-1)))
        self._left = selection.equal  # elements at the threshold that are still to be kept

    def __call__(self, delta: Tensor) -> Tensor:
        selection = self._selection
        if not math.isfinite(selection.threshold):
            return delta.zero_() if selection.threshold > 0 else delta
        if not selection.excess:
            return self._with_equals(delta)
        if not self._left:
            return zero_below(delta, selection.threshold)
        at = delta.abs() == selection.threshold
        count = int(at.sum())
        if count > self._left:
            surplus = at.nonzero().squeeze(1)[self._left :]
            delta[surplus] = 0.0
            count = self._left
        self._left -= count
        return self._with_equals(delta)

    def _with_equals(self, delta: Tensor) -> Tensor:
        return delta if self._selection.threshold <= 0 else zero_below(delta, self._below)


def zero_below(delta: Tensor, threshold: float) -> Tensor:
    """delta where |delta| > threshold, else 0; in place."""
    out: Tensor = torch.ops.aten.hardshrink.out(delta, threshold, out=delta)
    return out
