"""What one input of a merge looks like while it is merged: a flat run of numbers, read piece by piece.

A view is never the whole tensor in memory. Every pass over a tensor asks each view for the same pieces again; the
second time they come from the page cache. merging.md 5.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from bot.errors import Failed
from bot.merge.checkpoint import LocalFiles
from bot.merge.header import TensorInfo


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

    def __init__(self, files: LocalFiles, tensor: TensorInfo, wide: torch.dtype) -> None:
        self.shape = tensor.shape
        self._files, self._tensor, self._wide = files, tensor, wide
        self._stored: torch.dtype = getattr(torch, tensor.dtype.name)
        self._raw = torch.empty(0, dtype=self._stored)
        self._out = torch.empty(0, dtype=wide)

    def read(self, start: int, stop: int) -> Tensor:
        count = stop - start
        if self._out.numel() < count:
            self._out = torch.empty(count, dtype=self._wide)
            self._raw = self._out if self._stored == self._wide else torch.empty(count, dtype=self._stored)
        self._fill(start, self._raw[:count])
        if self._raw is not self._out:
            self._out[:count].copy_(self._raw[:count])
        return self._out[:count]

    def _fill(self, start: int, piece: Tensor) -> None:
        tensor, size = self._tensor, piece.element_size()
        buffer = piece.view(torch.uint8).numpy().data
        if self._files.read_into(tensor.file, tensor.start + start * size, buffer) != len(buffer):
            raise Failed(
                "SOURCE_CHANGED_OR_GONE", f"{tensor.file} of {self._files} ends inside {tensor.name}.",
                "The source was changed or cut while merging: fetch it again.", value=tensor.name,
            )  # fmt: skip


class HeldView:
    """A tensor that lies in memory, in any floating type."""

    unit = 1

    def __init__(self, tensor: Tensor, wide: torch.dtype) -> None:
        self.shape = tuple(tensor.shape)
        self._flat, self._wide = tensor.reshape(-1), wide

    def read(self, start: int, stop: int) -> Tensor:
        return self._flat[start:stop].to(self._wide, copy=True)


def common_unit(views: Sequence[View]) -> int:
    """The smallest number of elements that is a multiple of every view's unit."""
    return max((view.unit for view in views), default=1)
