"""Masks of the task-vector methods: keep the largest elements, a band of magnitudes, or a random subset.

Random masks come from SplitMix64 keyed by seed, source and tensor (`planning/work.py`): element i of a tensor has
the same draw for any order of models, chunk size, device and number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bot.merge.streaming.inputs import Inputs
from bot.merge.streaming.operation import MASK_LIMIT_BYTES
from bot.merge.streaming.selection import Selection, Selector

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)

Array = NDArray[Any]
Draw = Callable[[Tensor, int], Tensor]  # a flat chunk of a delta and its start -> elements to keep, uint8 or bool
TILE = 2**15  # draws made at a time; 256 KiB, so that all rounds stay in the cache


class Mask:
    """Keeps every element."""

    def rewind(self) -> None:
        """Start again with the first chunk."""

    def apply(self, delta: Tensor, start: int) -> Tensor:
        """Set dropped elements to zero, in place. Chunks come in order; `start` is the index of the first element."""
        return delta


class DropAll(Mask):
    """Keeps no element."""

    def apply(self, delta: Tensor, start: int) -> Tensor:
        return delta.zero_()


class Largest(Mask):
    """Keeps a selection of the largest elements."""

    def __init__(self, selection: Selection, dtype: torch.dtype) -> None:
        self._selection, self._dtype = selection, dtype
        self.rewind()

    def rewind(self) -> None:
        self._select = Selector(self._selection, self._dtype)

    def apply(self, delta: Tensor, start: int) -> Tensor:
        return self._select(delta)


class Band(Mask):
    """Keeps the elements of the outer selection that are not in the inner one."""

    def __init__(self, inner: Selection, outer: Selection, inputs: Inputs) -> None:
        self._inner, self._outer, self._inputs = inner, outer, inputs
        self.rewind()

    def rewind(self) -> None:
        self._select_inner = Selector(self._inner, self._inputs.dtype)
        self._select_outer = Selector(self._outer, self._inputs.dtype)

    def apply(self, delta: Tensor, start: int) -> Tensor:
        inside = self._select_inner(self._inputs.buffer("inside", delta).copy_(delta))
        return self._select_outer(delta).sub_(inside)


class Drawn(Mask):
    """Applies a random mask. `twice`: two passes follow, so keep the bits of the first."""

    def __init__(self, draw: Draw, inputs: Inputs, twice: bool) -> None:
        self._draw = draw
        self._bits: dict[int, NDArray[np.uint8]] = {}
        self._remember = twice and inputs.count <= 8 * MASK_LIMIT_BYTES and inputs.device.type == "cpu"

    def apply(self, delta: Tensor, start: int) -> Tensor:
        if start in self._bits:
            count = delta.numel()
            return delta.mul_(torch.from_numpy(np.unpackbits(self._bits.pop(start), count=count)))
        kept = self._draw(delta, start)
        if self._remember:
            self._bits[start] = np.packbits(kept.numpy())
        return delta.mul_(kept)


def by_chance(density: float, key: int) -> Draw:
    """Keep each element with probability `density`: draws below density * 2^24. DARE, arXiv:2311.03099."""
    limit = math.ceil(density * 2**24)

    def keep(delta: Tensor, start: int) -> Tensor:
        if delta.device.type != "cpu":
            return torch_draws(key, start, delta.numel(), delta.device) < limit
        out = np.empty(delta.numel(), dtype=np.bool_)
        last = np.uint64((limit << 40) - 1)  # the largest number whose upper 24 bits are below the limit
        for at, part in _stream(key, start, delta.numel()):
            np.less_equal(part, last, out=out[at : at + len(part)])
        return torch.from_numpy(out.view(np.uint8))

    return keep


def by_rank(density: float, epsilon: float, key: int, width: int) -> Draw:
    """Keep with a probability that grows with the rank in the row, from density - epsilon to density + epsilon.

    Rank r of m: p = density - epsilon + 2 epsilon r / (m - 1); a row of one element: p = density. DELLA,
    arXiv:2406.11617. A draw U outside these bounds decides alone. Between them, p(rank) > U means that the rank
    exceeds q = (U - low) / (2 epsilon) * (m - 1): element floor(q) of the sorted row is smaller. One sort of values
    per row replaces two argsorts.
    """
    if width == 1:
        return by_chance(density, key)
    low, high = (math.ceil(p * 2**24) for p in (density - epsilon, density + epsilon))

    def rank(draws: Any) -> Any:
        """Index of the element of the sorted row that must be smaller."""
        q = (draws * 2.0**-24 - (density - epsilon)) * ((width - 1) / (2 * epsilon or 1.0))
        return q.clip(0, width - 2)

    def keep(delta: Tensor, start: int) -> Tensor:
        sizes = delta.abs()
        if delta.device.type == "cpu":
            magnitudes, draws = sizes.numpy(), np.empty(delta.numel(), dtype=np.uint32)
            for at, part in _stream(key, start, delta.numel()):
                draws[at : at + len(part)] = np.right_shift(part, np.uint64(40), out=part)
            kept = draws < low
            between = np.flatnonzero(draws - np.uint32(low) < np.uint32(high - low))  # wraps below low
            place = between // width * width + rank(draws[between].astype(np.float64)).astype(np.int64)
            ordered = np.sort(magnitudes.reshape(-1, width), -1).reshape(-1)
            kept[between] = magnitudes[between] > ordered[place]
            return torch.from_numpy(kept.view(np.uint8))
        drawn = torch_draws(key, start, delta.numel(), delta.device)
        chosen = drawn < low
        inside = ((drawn >= low) & (drawn < high)).nonzero().squeeze(1)
        rows = sizes.view(-1, width).sort(-1).values.view(-1)
        chosen[inside] = sizes[inside] > rows[inside - inside % width + rank(drawn[inside].double()).long()]
        return chosen

    return keep


@cache
def _steps() -> Array:
    """(i + 1) * GOLDEN for the elements of one tile."""
    return np.arange(1, TILE + 1, dtype=np.uint64) * GOLDEN


def _stream(key: int, start: int, count: int) -> Any:
    """(index, numbers whose upper 24 bits are the draws) tile by tile; each tile overwrites the last.

    The last step of the stream, z ^ z >> 31, does not change those bits and is left out.
    """
    z, shifted = np.empty(TILE, dtype=np.uint64), np.empty(TILE, dtype=np.uint64)
    for at in range(0, count, TILE):
        n = min(TILE, count - at)
        first = (key + (start + at) * int(GOLDEN)) % 2**64
        part, room = z[:n], shifted[:n]
        np.add(_steps()[:n], np.uint64(first), out=part)
        for shift, factor in ((30, MIX_1), (27, MIX_2)):
            np.bitwise_xor(part, np.right_shift(part, np.uint64(shift), out=room), out=part)
            np.multiply(part, factor, out=part)
        yield at, part


def torch_draws(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """The same draws in torch, int64: wrapping products, and logical shifts made of arithmetic ones."""
    z = torch.arange(1, count + 1, dtype=torch.int64, device=device)
    z.mul_(_signed(int(GOLDEN))).add_(_signed((key + start * int(GOLDEN)) % 2**64))
    for shift, factor in ((30, MIX_1), (27, MIX_2)):
        z.bitwise_xor_(_shifted(z, shift)).mul_(_signed(int(factor)))
    z.bitwise_xor_(_shifted(z, 31))
    return _shifted(z, 40)


def _shifted(z: Tensor, by: int) -> Tensor:
    """z >> by as if z were unsigned."""
    return (z >> by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """The number with the same 64 bits."""
    return value - 2**64 if value >= 2**63 else value
