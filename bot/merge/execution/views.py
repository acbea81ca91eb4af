"""Views of stored tensors, read chunk by chunk; a view never holds the whole tensor in memory.

Every pass over a tensor reads the same chunks again. From the second pass on they come from the page cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bot.merge.checkpoints.checkpoint import LocalFiles
from bot.merge.checkpoints.header import TensorInfo
from bot.merge.execution.stored import StoredBytes
from bot.merge.streaming.inputs import Scratch


class StoredView:
    """View of a stored tensor, read with pread and widened."""

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

    def fill(self, start: int, out: Tensor) -> Tensor:
        """Read elements from `start` on into `out`, a contiguous CPU tensor of the stored dtype, and return it."""
        self._bytes.fill(start * out.element_size(), out.view(torch.uint8).numpy().data)
        return out
