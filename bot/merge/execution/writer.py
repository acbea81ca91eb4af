"""Output on disk: it grows in `OUT.partial` and is renamed to `OUT` once complete. docs/design/merging.md 5.4.

    OUT.partial/journal             plan digest, device, torch, source files, then one line per complete tensor
    OUT.partial/model*.safetensors  full size from the start, header first, tensors at their final offsets
    ... hashes, index, config, tokenizer, provenance, manifest; fsync; rename to OUT

A tensor enters the journal only after its bytes are on the disk, so a killed merge continues from the journal and
ends with the same bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Protocol

from bot.errors import Failed, Refused, Transient
from bot.merge.execution.hashing import Hashing
from bot.merge.execution.partial import held_bytes, hold, reclaim
from bot.merge.execution.provenance import FileFact
from bot.merge.execution.unchanged import Fact, require_same
from bot.merge.planning.plan import Plan, Step
from bot.storage import journal_entry, journal_line, size_text, sync_folder, try_lock

Progress = Callable[[int, int, str], None]  # bytes done, all bytes, name of the tensor just finished
JOURNAL = "journal"
SYNC_BYTES, SYNC_S = 256 * 2**20, 5.0
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True)
class Record:
    """Journal entry of one complete tensor: its step, the CRC-32 of its bytes, and its counts."""

    step: int
    crc: int
    nonfinite: Mapping[str, int]
    corners: Mapping[str, int] = field(default_factory=dict)

    def line(self) -> bytes:
        """Journal line of the record."""
        entry = {"step": self.step, "crc": self.crc, "nonfinite": dict(self.nonfinite), "corners": dict(self.corners)}
        return journal_line(entry)

    @classmethod
    def read(cls, line: bytes) -> Record | None:
        """Record of a line; None if the line is damaged."""
        entry = journal_entry(line)
        return None if entry is None else cls(entry["step"], entry["crc"], entry["nonfinite"], entry["corners"])


@dataclass(frozen=True, slots=True)
class StepCounts:
    """Counts of one merged tensor: NaN or infinite elements per source, special cases per notice code."""

    nonfinite: Mapping[str, int] = field(default_factory=dict)
    corners: Mapping[str, int] = field(default_factory=dict)


class TensorWriter(Protocol):
    """Destination of the output's bytes. Several threads may use it at once, one per tensor."""

    @property
    def done(self) -> Container[int]:
        """Indices of the steps that are complete already."""
        ...

    def write(self, step: Step, at: int, data: memoryview) -> None:
        """Write bytes of `step` at byte `at` of its tensor. Calls for one step come in order, without gaps.

        The caller reuses `data`.
        """
        ...

    def finished(self, step: Step, counts: StepCounts) -> None:
        """Mark `step` as complete."""
        ...


class Writer:
    """Writes one output folder. Use as a context manager: leaving it early keeps the partial folder for a resume."""

    def __init__(
        self,
        plan: Plan,
        out: Path,
        identity: str,
        sources: Mapping[str, Fact] = MappingProxyType({}),
        *,
        sync_bytes: int = SYNC_BYTES,
        on_event: Callable[[str], None] = lambda event: None,
    ) -> None:
        self.plan, self.out, self.sync_bytes, self._on_event = plan, out, sync_bytes, on_event
        self.partial = out.with_name(out.name + ".partial")
        self.identity, self._sources = identity, sources
        self.done: dict[int, Record] = {}
        self._shards: dict[int, int] = {}
        self._journal = self._folder = -1
        self._wake = threading.Condition()  # guards the fields below
        self._crcs: dict[int, int] = {}
        self._pending: list[Record] = []
        self._pending_bytes = 0
        self._closing = False
        self._failure: Exception | None = None
        self._one_sync = threading.Lock()
        self._syncer: threading.Thread | None = None
        self._hashing: Hashing | None = None

    def __enter__(self) -> Writer:
        if self.out.exists() or self.out.is_symlink():
            raise Refused(
                "OUTPUT_EXISTS",
                f"{self.out} exists already.",
                "Name another folder, or remove it.",
                value=str(self.out),
            )
        try:
            with self._explaining():
                self._open()
        except BaseException:
            self.close()
            raise
        self._hashing = Hashing(self.plan, self._shards, self.done)
        self._syncer = threading.Thread(target=self._keep_syncing, name="sync", daemon=True)
        self._syncer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._journal >= 0:
            with suppress(OSError, Failed):  # tensors that the journal lacks are computed again
                self.sync()
        self.close()

    def close(self) -> None:
        """Stop the threads and close every file; the partial folder stays."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._hashing is not None:
            self._hashing.stop()
        if self._syncer is not None:
            self._syncer.join()
        for handle in (*self._shards.values(), self._journal, self._folder):
            if handle >= 0:
                os.close(handle)
        self._shards, self._journal, self._folder = {}, -1, -1

    def write(self, step: Step, at: int, data: memoryview) -> None:
        """Write bytes of one tensor at their final offset. See `TensorWriter`."""
        if self._failure is not None:
            raise self._failure
        self._crcs[step.index] = zlib.crc32(data, self._crcs[step.index] if at else 0)
        place, view = step.offset + at, data
        with self._explaining():
            while view.nbytes:
                count = os.pwrite(self._shards[step.shard], view[: 2**26], place)
                place, view = place + count, view[count:]

    def finished(self, step: Step, counts: StepCounts) -> None:
        """Record that a tensor is complete; it enters the journal once it is durable, without blocking the caller."""
        record = Record(step.index, self._crcs.pop(step.index, 0), counts.nonfinite, counts.corners)
        with self._wake:
            self._pending.append(record)
            self._pending_bytes += step.nbytes
            if self._pending_bytes >= self.sync_bytes:
                self._wake.notify_all()
        if self._hashing is not None:
            self._hashing.finished(step.index)

    def _keep_syncing(self) -> None:
        """Sync every `sync_bytes` bytes or SYNC_S seconds, until the end."""
        while not self._closing:
            with self._wake:
                if self._pending_bytes < self.sync_bytes and not self._closing:
                    self._wake.wait(SYNC_S)
            if self._pending and not self._closing:
                try:
                    self.sync()
                except Exception as error:
                    self._failure = error
                    return

    def sync(self) -> None:
        """Make the written tensors durable, then enter them into the journal and into `done`."""
        if self._failure is not None:
            raise self._failure
        with self._one_sync:
            with self._wake:
                records, self._pending, self._pending_bytes = self._pending, [], 0
            if not records:
                return
            with self._explaining():
                for shard in sorted({self.plan.steps[record.step].shard for record in records}):
                    os.fdatasync(self._shards[shard])
                _write_all(self._journal, b"".join(record.line() for record in records))
                os.fdatasync(self._journal)
            self.done.update({record.step: record for record in records})
        self._on_event("writer.after_journal")

    def hash_shards(self) -> dict[str, FileFact]:
        """Size and SHA-256 of every shard; every tensor must be finished."""
        if self._hashing is None:
            return {}
        with self._explaining():
            hashes = zip(self.plan.shards, self._hashing.result(), strict=True)
        return {shard.file: FileFact(shard.nbytes, digest) for shard, digest in hashes}

    def add(self, name: str, content: bytes) -> FileFact:
        """Write a small file durably."""
        with self._explaining():
            handle = os.open(self.partial / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                _write_all(handle, content)
                os.fsync(handle)
            finally:
                os.close(handle)
        return FileFact(len(content), hashlib.sha256(content).hexdigest())

    def finish(self) -> None:
        """Make all files durable, remove the journal, rename the folder to its final name."""
        with self._explaining():
            for handle in self._shards.values():
                os.fsync(handle)
            if self.out.exists():
                raise Refused(
                    "OUTPUT_EXISTS", f"{self.out} was created by another process meanwhile.", "Remove it and run again."
                )
            (self.partial / JOURNAL).unlink()
            sync_folder(self.partial)
            self.partial.rename(self.out)
            sync_folder(self.out.parent)

    def _open(self) -> None:
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        fresh = not (self.partial / JOURNAL).exists()
        if fresh:
            self._refuse_without_space()
        self.partial.mkdir(exist_ok=True)
        self._folder = hold(self.partial)
        reclaim(self.partial, JOURNAL)
        self._journal = os.open(self.partial / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if not try_lock(self._journal):
            raise Refused(
                "OUTPUT_EXISTS", f"another process is merging into {self.out}.", "Wait for it, or name another folder."
            )
        self._read_journal()
        self._open_shards()
        self._drop_damaged_tensors()
        sync_folder(self.partial)

    def _open_shards(self) -> None:
        for number, shard in enumerate(self.plan.shards):
            handle = os.open(self.partial / shard.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._shards[number] = handle
            os.posix_fallocate(handle, 0, shard.nbytes)
            os.ftruncate(handle, shard.nbytes)
            os.pwrite(handle, shard.header, 0)

    def _drop_damaged_tensors(self) -> None:
        """Read back the tensors in the journal; those that differ from their CRC are computed again.

        A later line about the same tensor takes precedence, so the journal itself can stay as it is.
        """
        for index, record in list(self.done.items()):
            step, crc, at = self.plan.steps[index], 0, 0
            while at < step.nbytes:
                part = os.pread(self._shards[step.shard], min(2**22, step.nbytes - at), step.offset + at)
                crc, at = zlib.crc32(part, crc), at + len(part)
            if crc != record.crc:
                del self.done[index]

    def _read_journal(self) -> None:
        """Take over the complete tensors of an interrupted run of the same plan; drop a damaged tail."""
        content = b""
        while part := os.pread(self._journal, 2**20, len(content)):
            content += part
        same = b"mergebot-journal/2 " + self.identity.encode() + b" "
        head = same + json.dumps(self._sources).encode() + b"\n"
        first, newline, _ = content.partition(b"\n")
        if not newline and (first.startswith(same) or same.startswith(first)):
            content = b""  # killed while writing the first line
        elif first.startswith(same):
            require_same(json.loads(first[len(same) :]), self._sources, self.partial)
        else:
            raise Refused(
                "OUTPUT_EXISTS",
                f"{self.partial} holds an interrupted merge of another plan.",
                "Remove that folder, or name another output.",
                value=str(self.partial),
            )
        good = len(first) + 1 if content else len(head)
        for line in content[good:].splitlines(keepends=True):
            record = Record.read(line)
            if record is None:
                break
            self.done[record.step] = record
            good += len(line)
        if not content:
            os.ftruncate(self._journal, 0)
            _write_all(self._journal, head)
            os.fdatasync(self._journal)
        os.ftruncate(self._journal, good)
        os.lseek(self._journal, good, os.SEEK_SET)

    def _refuse_without_space(self) -> None:
        usage = shutil.disk_usage(self.partial.parent)
        need = self.plan.disk_bytes
        if need > usage.total:
            raise Refused(
                "TOO_LARGE",
                f"the merge needs {size_text(need)} of disk; the whole disk has {size_text(usage.total)}.",
                "Use a larger disk, or merge smaller models.",
            )
        if need - held_bytes(self.partial) > usage.free:
            raise Transient(
                "DISK_LOW",
                f"the merge needs {size_text(need)} of disk; {size_text(usage.free)} are free.",
                "Free some space, or name a folder on another disk.",
                retry_after_s=600.0,
            )

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Turn an OSError into Failed DISK_FULL or OUTPUT_UNWRITABLE."""
        try:
            yield
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise Failed(
                    "DISK_FULL",
                    f"the disk filled up while writing {self.partial.name}; nothing was left at {self.out}.",
                    "Free some space and run the same command again: it continues where it stopped.",
                ) from error
            raise Failed(
                "OUTPUT_UNWRITABLE",
                f"{self.partial} cannot be written: {os.strerror(error.errno or 0)}.",
                "Check the folder's permissions, or name another one.",
            ) from error


def _write_all(handle: int, content: bytes) -> None:
    view = memoryview(content)
    while view.nbytes:
        view = view[os.write(handle, view) :]
