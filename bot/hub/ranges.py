"""Byte ranges of a repo's large files: several requests at once, written into sparse files of full size.

    INTO/<file>            full size; only the ranges in its journal hold data
    INTO/.ranges/<file>    journal: identity of the file, then a line per complete range (start, end, CRC-32)

A range enters the journal when its bytes are on the disk, so a killed fetch continues with the missing ranges, and a
later plan adds to those of an earlier one. Such a folder must not be used as a model: it lies apart from complete ones,
and `is_partial` recognises it.

A range cannot be checked against the file's SHA-256. It is checked against the pinned commit, the hash and the size in
each response, and the exact span. If most of a file is needed, all of it is fetched and its hash verified.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import httpx2

from bot.errors import Failed, Refused, Transient
from bot.hub.files import FileFact, Progress, RepoFiles, answer, check_room, fetch_whole
from bot.hub.transport import HubSession, Unavailable, check_deadline
from bot.settings import failpoint
from bot.storage import (
    IN_PARTS,
    append_synced,
    exclusive,
    journal_entry,
    journal_line,
    sha256_file,
    sync_file,
    sync_folder,
    write_atomic,
)

CHUNK_BYTES = 32 * 2**20  # size of a request; a kill loses at most this much per request
PARALLEL_REQUESTS = 6
WHOLE_FROM = 0.8  # from this share on, the whole file is fetched and its hash verified
_BLOCK_BYTES = 4 * 2**20

Range = tuple[int, int]
Verified = Literal["sha256", "git", "ranges"]


def is_partial(folder: Path) -> bool:
    """Return whether a folder holds byte ranges of files only."""
    return (folder / IN_PARTS).exists()


def fetch(
    files: RepoFiles,
    into: Path,
    ranges: Mapping[str, Sequence[Range]],
    progress: Progress | None,
    limit_bytes: int,
) -> dict[str, Verified]:
    """Fetch `ranges` of the files into the folder `into`; returns the kind of verification of each file.

    Files in git itself are small and fetched whole. Raises Refused SOURCE_CHANGED_OR_GONE, DOWNLOAD_TOO_LARGE,
    Transient CORRUPT_DOWNLOAD, DISK_LOW, HUB_UNAVAILABLE, HUB_ANSWER_INVALID.
    """
    facts = _wanted_facts(files, ranges)
    into.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(into.with_name(f".{into.name}.lock")):
        (into / IN_PARTS).mkdir(parents=True, exist_ok=True)
        parts = [_Part.open(into, name, fact, ranges[name]) for name, fact in facts.items() if fact.sha256]
        small = {name: fact for name, fact in facts.items() if not fact.sha256}
        missing = sum(part.missing_bytes for part in parts)
        total = sum(part.wanted_bytes for part in parts) + sum(fact.size for fact in small.values())
        check_room(files, missing, limit_bytes, into)
        counter = _Counter(progress, total, total - missing - sum(fact.size for fact in small.values()))
        for name, fact in small.items():
            fetch_whole(files, name, fact, into / name, lambda count: None)
            counter.add(fact.size, name)
        sync_folder(into)
        _fill(files, parts, counter)
        verified: dict[str, Verified] = dict.fromkeys(small, "git")
        for part in parts:
            verified[part.name] = _checked(files, part, counter)
        return verified


def how_verified(fact: FileFact, spans: Sequence[Range]) -> Verified:
    """Kind of verification of a file with these ranges; independent of earlier fetches."""
    if fact.sha256 is None:
        return "git"
    return "sha256" if sum(end - start for start, end in spans) >= WHOLE_FROM * fact.size else "ranges"


def _wanted_facts(files: RepoFiles, ranges: Mapping[str, Sequence[Range]]) -> dict[str, FileFact]:
    """Facts of the requested files in the commit. Raises Refused if the plan was made from other files."""
    known = files.facts()
    for name, spans in ranges.items():
        if name not in known or any(not 0 <= start <= end <= known[name].size for start, end in spans):
            raise _changed(name, files)
    return {name: known[name] for name in sorted(ranges) if ranges[name]}


def _changed(name: str, files: RepoFiles) -> Refused:
    return Refused(
        "SOURCE_CHANGED_OR_GONE",
        f"{name} of {files} changed after the merge was planned.",
        "Plan the merge again.",
        value=name,
    )


# -- one file


@dataclass(slots=True)
class _Part:
    """Wanted ranges of one file, and the local ones."""

    name: str
    fact: FileFact
    place: Path
    journal: Path
    wanted: tuple[Range, ...]
    local: list[tuple[int, int, int]]  # start, end, CRC-32
    verified: bool = False  # the hash of the whole file was compared

    @classmethod
    def open(cls, into: Path, name: str, fact: FileFact, spans: Sequence[Range]) -> _Part:
        """Take over the complete ranges of an earlier fetch."""
        wanted = ((0, fact.size),) if how_verified(fact, spans) == "sha256" else tuple(spans)
        part = cls(name, fact, into / name, into / IN_PARTS / name, wanted, [])
        part._read_journal()
        return part

    @property
    def whole(self) -> bool:
        return self.wanted == ((0, self.fact.size),)

    @property
    def wanted_bytes(self) -> int:
        return sum(end - start for start, end in self.wanted)

    @property
    def missing_bytes(self) -> int:
        return sum(end - start for start, end in self.missing())

    def missing(self) -> list[Range]:
        return without(self.wanted, [(start, end) for start, end, _ in self.local])

    def head(self) -> bytes:
        """First line of the journal: hash and size of the file."""
        return json.dumps({"sha256": self.fact.sha256, "bytes": self.fact.size}).encode() + b"\n"

    def forget(self) -> None:
        """Start over with an empty file."""
        self.place.unlink(missing_ok=True)
        self.local, self.verified = [], False
        with self.place.open("xb") as file:
            file.truncate(self.fact.size)
        write_atomic(self.journal, self.head())

    def add(self, entry: Mapping[str, object]) -> None:
        """Append one line to the journal; it is on the disk when this returns."""
        append_synced(self.journal, journal_line(entry))

    def _read_journal(self) -> None:
        whole_size = self.place.is_file() and self.place.stat().st_size == self.fact.size
        content = self.journal.read_bytes() if self.journal.is_file() and whole_size else b""
        if not content.startswith(self.head()):
            self.forget()
            return
        good = len(self.head())
        for text in content[good:].splitlines(keepends=True):
            entry = journal_entry(text)
            if entry is None:  # a line cut by a kill
                break
            good += len(text)
            if entry.get("whole"):
                self.verified = True
            else:
                self.local.append((entry["start"], entry["end"], entry["crc"]))
        if good < len(content):
            os.truncate(self.journal, good)
        self._drop_damaged()

    def _drop_damaged(self) -> None:
        """Verify the local ranges that the plan needs; damaged ones are fetched again."""
        needed = [one for one in self.local if without([one[:2]], self.wanted) != [one[:2]]]
        with self.place.open("rb") as file:
            damaged = [one for one in needed if _crc(file.fileno(), one[0], one[1]) != one[2]]
        if damaged:
            self.local = [one for one in self.local if one not in damaged]
            self.verified = False
            kept = b"".join(journal_line({"start": a, "end": b, "crc": crc}) for a, b, crc in self.local)
            write_atomic(self.journal, self.head() + kept)


def without(wanted: Sequence[Range], held: Sequence[Range]) -> list[Range]:
    """Parts of `wanted` that no range of `held` covers, ascending."""
    out: list[Range] = []
    cover = sorted(held)
    for start, end in sorted(wanted):
        at = start
        for first, last in cover:
            if last <= at or first >= end:
                continue
            if first > at:
                out.append((at, first))
            at = max(at, last)
        if at < end:
            out.append((at, end))
    return out


def chunks(spans: Sequence[Range], most_bytes: int = CHUNK_BYTES) -> list[Range]:
    """`spans` cut into requests of at most `most_bytes`, the cuts of one span about equal."""
    out: list[Range] = []
    for start, end in spans:
        count = -(-(end - start) // most_bytes)
        step = -(-(end - start) // count) if count else 0
        out.extend((at, min(at + step, end)) for at in range(start, end, step or 1))
    return out


def _crc(handle: int, start: int, end: int) -> int:
    crc, at = 0, start
    while at < end and (block := os.pread(handle, min(_BLOCK_BYTES, end - at), at)):
        crc, at = zlib.crc32(block, crc), at + len(block)
    return crc


# -- the requests


class _Counter:
    """Progress from several threads."""

    def __init__(self, progress: Progress | None, total: int, done: int) -> None:
        self._progress, self._total, self._done = progress, total, done
        self._lock = threading.Lock()

    def add(self, count: int, name: str) -> None:
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(min(self._done, self._total), self._total, name)


def _fill(files: RepoFiles, parts: Sequence[_Part], counter: _Counter) -> None:
    """Fetch the missing ranges of all parts. The first failure stops the others; complete ranges stay."""
    stop = threading.Event()
    session = files.session
    if session.sleep is time.sleep:  # a wait that a failure elsewhere cuts short

        def pause(seconds: float) -> None:
            stop.wait(seconds)

        session = replace(session, sleep=pause)
    lock = threading.Lock()
    work = [(part, span) for part in parts for span in chunks(part.missing())]
    with contextlib.ExitStack() as opened, ThreadPoolExecutor(PARALLEL_REQUESTS, "fetch") as pool:
        handles = {part.name: opened.enter_context(part.place.open("rb+")).fileno() for part, _ in work}

        def one(part: _Part, span: Range) -> None:
            crc = _receive(files, session, part, span, handles[part.name], counter, stop)
            sync_file(part.place)
            with lock:
                part.add({"start": span[0], "end": span[1], "crc": crc})
                part.local.append((*span, crc))
                failpoint("download.after_range", sum(len(each.local) for each in parts))

        futures: list[Future[None]] = [pool.submit(one, part, span) for part, span in work]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _receive(
    files: RepoFiles,
    session: HubSession,
    part: _Part,
    span: Range,
    handle: int,
    counter: _Counter,
    stop: threading.Event,
) -> int:
    """Write one range to its place and return its CRC-32. A lost connection is continued."""
    at, crc = span[0], 0

    def operation() -> None:
        nonlocal at, crc
        with answer(files, part.name, (at, span[1])) as response:
            _require_same(files, part, response, (at, span[1]))
            for chunk in response.iter_bytes():
                check_deadline()
                if stop.is_set():
                    raise Failed("CANCELLED", f"Fetching {files} was stopped.", "")
                if at + len(chunk) > span[1]:
                    raise ValueError("the Hub sent more than the requested range")
                _write_at(handle, chunk, at)
                at, crc = at + len(chunk), zlib.crc32(chunk, crc)
                counter.add(len(chunk), part.name)
        if at < span[1]:
            raise Unavailable(f"it ended {span[1] - at} bytes early")

    # All requests together extend the deadline by a second per megabyte.
    deadline_s = session.deadline_s + PARALLEL_REQUESTS * (span[1] - span[0]) / 1e6
    session.call(f"{part.name} of {files}", operation, deadline_s=deadline_s)
    return crc


def _write_at(handle: int, chunk: bytes, at: int) -> None:
    view = memoryview(chunk)
    while view.nbytes:
        count = os.pwrite(handle, view, at)
        view, at = view[count:], at + count


def _require_same(files: RepoFiles, part: _Part, response: httpx2.Response, span: Range) -> None:
    """Check that the response is this range of this file at this commit; redirects carry the same headers."""
    chain = [*response.history, response]
    commit = next(_named(chain, "x-repo-commit"), files.revision)
    etag = next(_named(chain, "x-linked-etag"), response.headers.get("etag"))
    size = next(_named(chain, "x-linked-size"), str(part.fact.size))
    if etag is None:
        raise ValueError("the response has no ETag")
    if (commit, etag.removeprefix("W/").strip('"'), size) != (files.revision, part.fact.sha256, str(part.fact.size)):
        raise _changed(part.name, files)
    if response.status_code != 206:
        raise ValueError("the Hub ignored the range")
    if response.headers.get("content-range") != f"bytes {span[0]}-{span[1] - 1}/{part.fact.size}":
        raise ValueError("the Hub sent another range")
    if response.headers.get("content-length", str(span[1] - span[0])) != str(span[1] - span[0]):
        raise ValueError("the Hub announces another length")


def _named(chain: Sequence[httpx2.Response], header: str) -> Iterator[str]:
    return (each.headers[header] for each in chain if header in each.headers)


# -- whole files


def _checked(files: RepoFiles, part: _Part, counter: _Counter) -> Verified:
    """Hash a complete file; if it differs from the commit, fetch it once more."""
    if not part.whole:
        return "ranges"
    if part.verified:
        return "sha256"
    found = ""
    for attempt in range(2):
        found = sha256_file(part.place)
        if found == part.fact.sha256:
            part.add({"whole": True})
            return "sha256"
        part.forget()
        if attempt == 0:
            _fill(files, [part], counter)
    raise Transient(
        "CORRUPT_DOWNLOAD",
        f"{part.name} of {files} arrived damaged twice (expected {str(part.fact.sha256)[:8]}, received {found[:8]}).",
        "It is tried again automatically.",
    )
