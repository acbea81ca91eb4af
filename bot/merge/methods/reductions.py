"""Sums over whole tensors that do not depend on threads: float32 within a chunk, float64 across chunks, in order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from bot.merge.planning.memory import CHUNK


def dot(x: Tensor, y: Tensor) -> float:
    """sum(x * y) over all elements of two tensors of one shape."""
    total = 0.0
    x, y = x.reshape(-1), y.reshape(-1)
    for start in range(0, x.numel(), CHUNK):
        total += float((x[start : start + CHUNK] * y[start : start + CHUNK]).sum())
    return total


def l1(x: Tensor) -> float:
    """sum |x| over all elements."""
    total = 0.0
    x = x.reshape(-1)
    for start in range(0, x.numel(), CHUNK):
        total += float(x[start : start + CHUNK].abs().sum())
    return total


def sorted_element(magnitudes: Tensor, rank: int) -> float:
    """Element number `rank` (from 0) of the ascending order of a flat tensor, exactly."""
    if magnitudes.dtype in (torch.bfloat16, torch.float16):
        magnitudes = magnitudes.float()
    if magnitudes.device.type == "cpu":
        return float(numpy.partition(magnitudes.numpy(), rank)[rank])
    return float(torch.kthvalue(magnitudes, rank + 1).values)


@dataclass(slots=True)
class Selection:
    """Which elements are among the k largest, told piece by piece: above `threshold`, and the first `equal` at it.

    `excess` is how many more elements lie exactly at the threshold than are wanted.
    """

    threshold: float
    equal: int
    excess: int = 0

    def mask(self, magnitudes: Tensor) -> Tensor:
        """Mask of the next piece of the flat tensor; pieces must come in order."""
        keep = magnitudes > self.threshold
        if self.equal > 0:
            at = (magnitudes == self.threshold).nonzero().squeeze(1)[: self.equal]
            keep[at] = True
            self.equal -= len(at)
        return keep


def selection(magnitudes: Tensor, k: int) -> Selection:
    """The selection of exactly the k largest of a flat tensor; among equals the lowest index wins."""
    n = magnitudes.numel()
    if k <= 0:
        return Selection(math.inf, 0)
    if k >= n:
        return Selection(-math.inf, 0)
    threshold = sorted_element(magnitudes, n - k)
    equal = k - int((magnitudes > threshold).sum())
    return Selection(threshold, equal, int((magnitudes == threshold).sum()) - equal)


def bucket(counts: numpy.ndarray[Any, numpy.dtype[numpy.int64]], k: int) -> tuple[int, int]:
    """The bucket that holds the k-th largest, and how many lie in the buckets above it."""
    from_top = numpy.cumsum(counts[::-1])
    i = int(numpy.searchsorted(from_top, k))
    return len(counts) - 1 - i, int(from_top[i - 1]) if i else 0


def first_largest(magnitudes: Tensor, k: int) -> Tensor:
    """Mask of exactly the k largest of a flat tensor; among equals the lowest index wins."""
    return selection(magnitudes, k).mask(magnitudes)
