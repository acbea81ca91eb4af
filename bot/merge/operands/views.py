"""What one input of a merge looks like while it is merged: a flat run of numbers, read piece by piece.

A view is never the whole tensor in memory. Every pass over a tensor asks each view for the same pieces again; the
second time they come from the page cache. merging.md 5.3.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from bot.errors import Failed
from bot.merge.checkpoints.checkpoint import LocalFiles
from bot.merge.checkpoints.header import TensorInfo


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
        self._files, self._tensor, self._wide = files, tensor, wide
        self.stored: torch.dtype = getattr(torch, tensor.dtype.name)
        self._scratch, self._name = scratch or Scratch(), name
        self._handle: _Handle | None = None

    def read(self, start: int, stop: int) -> Tensor:
        out = self._scratch.get(self._name + " wide", stop - start, self._wide)
        if self.stored == self._wide:
            return self.fill(start, out)
        return out.copy_(self.fill(start, self._scratch.get("stored", stop - start, self.stored)))

    def fill(self, start: int, piece: Tensor) -> Tensor:
        """Read elements from `start` on into a contiguous CPU tensor of the stored type, which is returned."""
        if self._handle is None:
            self._handle = _Handle(self._files, self._tensor.file)
        at = self._tensor.start + start * piece.element_size()
        buffer = piece.view(torch.uint8).numpy().data
        filled = 0
        while filled < len(buffer):
            count = os.preadv(self._handle.number, [buffer[filled:][: 2**26]], at + filled)
            if not count:
                self._ended()
            filled += count
        return piece

    def _ended(self) -> NoReturn:
        raise Failed(
            "SOURCE_CHANGED_OR_GONE", f"{self._tensor.file} of {self._files} ends inside {self._tensor.name}.",
            "The source was changed or cut while merging: fetch it again.", value=self._tensor.name,
        )  # fmt: skip

    def will_need(self) -> None:
        """Let the system read the whole tensor ahead."""
        if self._handle is None:
            self._handle = _Handle(self._files, self._tensor.file)
        os.posix_fadvise(self._handle.number, self._tensor.start, self._tensor.nbytes, os.POSIX_FADV_WILLNEED)


class _Handle:
    """An open file, closed when nobody uses it any more."""

    def __init__(self, files: LocalFiles, name: str) -> None:
        self.number = -1
        self.number = os.open(files.locate(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def common_unit(views: Sequence[View]) -> int:
    """The smallest number of elements that is a multiple of every view's unit."""
    return math.lcm(*(view.unit for view in views))
