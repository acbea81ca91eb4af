"""Contents addressed by hash: large files by sha256, shared by all repos; small ones by git blob id, per repo.

A repo may use a shared blob only after an upload *to that repo* (a marker file below `lfs/`): otherwise a
sha256 seen on a private repo's listing would be enough to copy the file out of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from bot.localhub.answers import HubError
from bot.storage import move_into_place, sha256_file, sync_folder, write_atomic

CHUNK_BYTES = 1 << 20


def git_blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """The text git stores in place of a large file; its blob id is the file's `oid` in tree listings."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


class Incoming:
    """An upload in progress: hashed while it streams, visible once it is complete and verified."""

    def __init__(self, blobs: Blobs, sha256: str, size: int) -> None:
        self._blobs, self._sha256, self._size = blobs, sha256, size
        blobs.incoming.mkdir(parents=True, exist_ok=True)
        self.path = blobs.incoming / secrets.token_hex(12)
        self._file = self.path.open("xb")
        self._hash = hashlib.sha256()
        self._received = 0

    def write(self, chunk: bytes) -> None:
        self._received += len(chunk)
        if self._received > self._size:
            raise HubError(400, f"more than the announced {self._size} bytes arrived")
        self._hash.update(chunk)
        self._file.write(chunk)

    def finish(self) -> None:
        """Move the blob into place, or refuse bytes that differ from the announced ones."""
        if self._received != self._size:
            raise HubError(400, f"{self._received} bytes arrived, {self._size} were announced")
        if self._hash.hexdigest() != self._sha256:
            raise HubError(400, "the uploaded bytes do not have the announced sha256")
        self._file.close()
        self._blobs.adopt(self.path, self._sha256)

    def close(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)


class Blobs:
    """ROOT/blobs/ab/<sha256>, and the unfinished uploads."""

    def __init__(self, root: Path) -> None:
        self.root = root / "blobs"
        self.incoming = self.root / "incoming"

    def path(self, sha256: str) -> Path:
        return self.root / sha256[:2] / sha256

    def has(self, sha256: str) -> bool:
        return self.path(sha256).is_file()

    def adopt(self, finished: Path, sha256: str) -> None:
        """Move a complete and verified file into place."""
        place = self.path(sha256)
        place.parent.mkdir(parents=True, exist_ok=True)
        finished.chmod(0o444)
        move_into_place(finished, place)
        sync_folder(place.parent)

    def receive(self, sha256: str, size: int) -> Incoming:
        return Incoming(self, sha256, size)

    def store(self, chunks: Iterable[bytes], sha256: str, size: int) -> None:
        """Store a local file (seeding)."""
        with contextlib.closing(self.receive(sha256, size)) as incoming:
            for chunk in chunks:
                incoming.write(chunk)
            incoming.finish()

    def parts_path(self, upload: str) -> Path:
        """File of a multipart upload; each part is written at its own offset."""
        self.incoming.mkdir(parents=True, exist_ok=True)
        return self.incoming / f"{upload}.parts"

    def write_part(self, upload: str, offset: int, data: bytes) -> None:
        handle = os.open(self.parts_path(upload), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            view = memoryview(data)
            while view:
                written = os.pwrite(handle, view, offset)
                view, offset = view[written:], offset + written
        finally:
            os.close(handle)

    def finish_parts(self, upload: str, sha256: str, size: int) -> None:
        path = self.parts_path(upload)
        if not path.is_file():
            if self.has(sha256):
                return  # a repeated completion after a lost answer
            raise HubError(400, "no part of this upload has arrived")
        digest = sha256_file(path)
        if path.stat().st_size != size or digest != sha256:
            path.unlink(missing_ok=True)
            raise HubError(400, "the uploaded parts do not have the announced size and sha256")
        self.adopt(path, sha256)


class Objects:
    """Small files of one repo, by git blob id."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, data: bytes) -> str:
        oid = git_blob_id(data)
        path = self._folder / oid
        if not path.is_file():
            write_atomic(path, data)
        return oid

    def path(self, oid: str) -> Path:
        return self._folder / oid
