"""Files that survive a crash: atomic writes, fsync, file locks, SHA-256 of a file, journal lines, sizes as text."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

IN_PARTS = ".ranges"  # a folder that holds this holds parts of files only


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON in one step."""
    write_atomic(path, json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1).encode())


def read_json(path: Path) -> Any | None:
    """The JSON value at `path`; None if the file is missing."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def try_lock(handle: int) -> bool:
    """Lock an open file or folder; False if another descriptor holds the lock. Closing the descriptor releases it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def exclusive(lock_file: Path) -> Iterator[None]:
    """Hold a lock against other threads and processes; each call opens its own descriptor."""
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make the content of a file survive a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Make the files of a flat folder and their names survive a power cut."""
    for path in folder.iterdir():
        sync_file(path)
    sync_folder(folder)


def move_into_place(temporary: Path, final: Path) -> None:
    """Replace `final` by the complete file `temporary`, its content on the disk first."""
    sync_file(temporary)
    temporary.replace(final)


def append_synced(path: Path, data: bytes) -> None:
    """Append `data` to an existing file in one write; it is on the disk when this returns."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        os.write(handle, data)
        os.fdatasync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, 64 hex characters."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def journal_line(entry: Mapping[str, object]) -> bytes:
    """A line of a journal: the entry as JSON, a space, and the CRC-32 of the JSON."""
    text = json.dumps(entry).encode()
    return b"%s %08x\n" % (text, zlib.crc32(text))


def journal_entry(line: bytes) -> dict[str, Any] | None:
    """The entry of a journal line; None if the line was cut or damaged."""
    text, _, crc = line.removesuffix(b"\n").rpartition(b" ")
    if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(text):
        return None
    return dict(json.loads(text))


def size_text(size_bytes: float) -> str:
    """A number of bytes for people: `282 GB`, `1.3 GB`, `270 MB`, `6 kB`, `12 bytes`."""
    if size_bytes >= 10_000_000_000:
        return f"{size_bytes / 1e9:,.0f} GB"
    if size_bytes >= 1_000_000_000:
        return f"{size_bytes / 1e9:.1f} GB"
    if size_bytes >= 1_000_000:
        return f"{size_bytes / 1e6:,.0f} MB"
    return f"{size_bytes / 1e3:,.0f} kB" if size_bytes >= 1000 else f"{size_bytes:.0f} bytes"
