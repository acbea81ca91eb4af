"""Bytes of one stored tensor, read in parts. Without torch, since a merge that only copies does not import it."""

from __future__ import annotations

import os

from bot.errors import Failed
from bot.merge.checkpoints.checkpoint import LocalFiles
from bot.merge.checkpoints.header import TensorInfo


class StoredBytes:
    """Tensor in a file that is opened on first use."""

    def __init__(self, files: LocalFiles, tensor: TensorInfo) -> None:
        self._files, self._tensor = files, tensor
        self._opened: _Handle | None = None

    def fill(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from `start` on."""
        at, filled = self._tensor.start + start, 0
        while filled < len(buffer):
            count = os.preadv(self._handle(), [buffer[filled:][: 2**26]], at + filled)
            if not count:
                raise Failed(
                    "SOURCE_CHANGED_OR_GONE",
                    f"{self._tensor.file} of {self._files} ends inside {self._tensor.name}.",
                    "The source was changed or truncated during the merge: fetch it again.",
                    value=self._tensor.name,
                )
            filled += count

    def will_need(self) -> None:
        """Ask the operating system to read the whole tensor ahead."""
        os.posix_fadvise(self._handle(), self._tensor.start, self._tensor.nbytes, os.POSIX_FADV_WILLNEED)

    def _handle(self) -> int:
        if self._opened is None:
            self._opened = _Handle(self._files, self._tensor.file)
        return self._opened.number


class _Handle:
    """Open file, closed with its last reference."""

    def __init__(self, files: LocalFiles, name: str) -> None:
        self.number = -1
        self.number = os.open(files.locate(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)
