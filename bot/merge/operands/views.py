"""What one input of a merge looks like while it is merged: a flat run of numbers, read piece by piece.

A view is never the whole tensor in memory. Every pass over a tensor asks each view for the same pieces again; the
second time they come from the page cache. merging.md 5.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from bot.merge.checkpoints.checkpoint import LocalFiles
from bot.merge.checkpoints.header import TensorInfo
from bot.merge.operands.stored import StoredBytes


class Scratch:
    """Tensors that are used again and again by one thread: fresh memory costs more than the arithmetic done in it."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, count: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """The tensor of that name, `count` elements long; contents undefined."""
        held = self._tensors.get((name, dtype))
        if held is None or held.numel() < count:
            held = self._tensors[name, dtype] = torch.empty(count, dtype=dtype, device=device)
        return held[:count]


class View(Protocol):
    """One operand as its method sees it: of the output's shape, in the working type (float32, or float64)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        ...

    @property
    def unit(self) -> int:
        """Pieces must start and end at multiples of this: 1, or the length of a row (the end of the tensor is one)."""
        ...

    def read(self, start: int, stop: int) -> Tensor:
        """Flat elements [start, stop), working type, on the CPU.

        The caller may overwrite the tensor; it stays valid until the next read of this view. One thread at a time.
        """
        ...


class StoredView:
    """A tensor as it lies in a file, read with pread and widened."""

    unit = 1

    def __init__(
        self, files: LocalFiles, tensor: TensorInfo, wide: torch.dtype, scratch: Scratch | None = None, name: str = ""
    ) -> None:
        self.shape = tensor.shape
        self._bytes, self._wide = StoredBytes(files, tensor), wide
        self.stored: torch.dtype = getattr(torch, tensor.dtype.name)
        self._scratch, self._name = scratch or Scratch(), name

    def read(self, start: int, stop: int) -> Tensor:
        out = self._scratch.get(self._name + " wide", stop - start, self._wide)
        if self.stored == self._wide:
            return self.fill(start, out)
        return out.copy_(self.fill(start, self._scratch.get("stored", stop - start, self.stored)))

    def fill(self, start: int, piece: Tensor) -> Tensor:
        """Read elements from `start` on into a contiguous CPU tensor of the stored type, which is returned."""
        self._bytes.fill(start * piece.element_size(), piece.view(torch.uint8).numpy().data)
        return piece


def common_unit(views: Sequence[View]) -> int:
    """The smallest number of elements that is a multiple of every view's unit."""
    return math.lcm(*(view.unit for view in views))
