"""Whether a source stayed as it was while it was merged: sizes, times of change and headers, before and after."""

from __future__ import annotations

from collections.abc import Mapping

from bot.errors import Failed
from bot.merge.checkpoint import OPERATOR, LocalFiles, read_header
from bot.merge.spec import ModelRef

# A folder with this inside holds parts of files only; what it lacks may be added at any time, so times say nothing.
IN_PARTS = ".ranges"
Headers = Mapping[str, tuple[int, str]]  # shard -> (file bytes, SHA-256 of length and header)
_Seen = tuple[int, int, int, int]


class Watch:
    """Remembers what a plan's files look like; ask `require_unchanged` before the result gets its name.

    The headers are held against the plan's at both ends. Raises Failed SOURCE_CHANGED_OR_GONE.
    """

    def __init__(self, sources: Mapping[ModelRef, LocalFiles], headers: Mapping[ModelRef, Headers]) -> None:
        self._sources, self._headers = sources, headers
        self._before = {ref: self._look(ref) for ref in headers}

    def require_unchanged(self) -> None:
        for ref, before in self._before.items():
            after = self._look(ref)
            changed = next((file for file in before if before[file] != after[file]), None)
            if changed is not None:
                raise _changed(ref, changed, "was changed while it was merged")

    def _look(self, ref: ModelRef) -> dict[str, _Seen]:
        files = self._sources[ref]
        in_parts = (files.path / IN_PARTS).exists()
        found = {}
        for file, (size, digest) in self._headers[ref].items():
            try:
                facts = files.locate(file).stat()
            except OSError:
                raise _changed(ref, file, "is gone") from None
            if facts.st_size != size or read_header(files, file, size, str(files), OPERATOR)[1] != digest:
                raise _changed(ref, file, "has changed since the plan was made")
            times = (0, 0) if in_parts else (facts.st_mtime_ns, facts.st_ctime_ns)
            found[file] = (facts.st_size, facts.st_ino, *times)
        return found


def _changed(ref: ModelRef, file: str, how: str) -> Failed:
    return Failed(
        "SOURCE_CHANGED_OR_GONE", f"{file} of {ref} {how}.", "Leave it in peace and merge again.", value=str(ref)
    )
