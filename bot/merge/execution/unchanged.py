"""Check for sources that change during a merge: sizes, modification times and headers, before and after."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bot.errors import Failed, Refused
from bot.merge.checkpoints.checkpoint import TRUSTED, LocalFiles, read_header
from bot.merge.planning.plan import Copied
from bot.merge.recipe.spec import ModelRef
from bot.storage import IN_PARTS

Fact = tuple[int, int, int]  # bytes, inode, time of change in ns
Headers = Mapping[str, tuple[int, str]]  # shard -> (file bytes, SHA-256 of length and header)
_Seen = tuple[int, int, int, int]


class Watch:
    """Recorded state of a plan's files; call `require_unchanged` before the output gets its name.

    Headers are compared with the plan at both ends. Raises Failed SOURCE_CHANGED_OR_GONE.
    """

    def __init__(
        self,
        sources: Mapping[ModelRef, LocalFiles],
        headers: Mapping[ModelRef, Headers],
        copies: Iterable[Copied] = (),
    ) -> None:
        """`copies`: files copied whole; their length is compared with the plan, too."""
        self._sources, self._headers, self._copies = sources, headers, tuple(copies)
        self._before = {ref: self._look(ref) for ref in {**headers, **dict.fromkeys(c.model for c in self._copies)}}

    def require_unchanged(self) -> None:
        for ref, before in self._before.items():
            after = self._look(ref)
            changed = next((file for file in before if before[file] != after[file]), None)
            if changed is not None:
                raise _changed(ref, changed, "was changed while it was merged")

    def facts(self) -> dict[str, Fact]:
        """Facts that identify the weights in local folders, for a merge that is resumed later.

        Files of the Hub are pinned by their commit and left out. The change time of the inode does not count: links and
        permissions change it.
        """
        return {
            f"{ref}/{file}": seen[:3]
            for ref, files in self._before.items()
            for file, seen in files.items()
            if file in self._headers.get(ref, {}) and not ref.revision and seen[2]
        }

    def _look(self, ref: ModelRef) -> dict[str, _Seen]:
        files = self._sources[ref]
        in_parts = (files.path / IN_PARTS).exists()
        found = {}
        for file, (size, digest) in self._headers.get(ref, {}).items():
            try:
                facts = files.locate(file).stat()
            except OSError:
                raise _changed(ref, file, "is gone") from None
            if facts.st_size != size or read_header(files, file, size, str(files), TRUSTED)[1] != digest:
                raise _changed(ref, file, "has changed since the plan was made")
            found[file] = _seen(facts, in_parts)
        for copied in self._copies:
            if copied.model == ref:
                found[copied.file] = self._look_at_copy(copied, in_parts)
        return found

    def _look_at_copy(self, copied: Copied, in_parts: bool) -> _Seen:
        try:
            facts = self._sources[copied.model].locate(copied.file).stat()
        except OSError:
            raise _changed(copied.model, copied.file, "is gone") from None
        if facts.st_size != copied.nbytes:
            raise _changed(copied.model, copied.file, "has changed since the plan was made")
        return _seen(facts, in_parts)


def _seen(facts: os.stat_result, in_parts: bool) -> _Seen:
    times = (0, 0) if in_parts else (facts.st_mtime_ns, facts.st_ctime_ns)
    return (facts.st_size, facts.st_ino, *times)


def require_same(before: Mapping[str, Sequence[int]], now: Mapping[str, Fact], remove: Path) -> None:
    """Compare the facts recorded at the start of a merge with the current ones.

    Raises Refused SOURCE_CHANGED_OR_GONE: a resumed merge must not mix different sources.
    """
    differing = (file for file in sorted({*before, *now}) if tuple(before.get(file, ())) != now.get(file, ()))
    if (changed := next(differing, None)) is not None:
        raise Refused(
            "SOURCE_CHANGED_OR_GONE",
            f"{changed} differs from the file that the interrupted merge in {remove} was started with.",
            f"Remove {remove} and merge again, or restore the file.",
            value=changed,
        )


def _changed(ref: ModelRef, file: str, how: str) -> Failed:
    return Failed(
        "SOURCE_CHANGED_OR_GONE",
        f"{file} of {ref} {how}.",
        "Merge again, and do not change the sources meanwhile.",
        value=str(ref),
    )
