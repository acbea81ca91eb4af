"""The I/O floor: read every byte a merge reads and write as many as it writes, once, and compute nothing.

usage: python -m benchmarks.floor WORK.json OUT [--hash]   WORK: {"reads": [[file, start, stop], ...], "bytes_out": n}

The same calls as the engine's: preallocated files, pwrite, fdatasync after every 256 MiB and at the end. Reading and
writing alternate in one thread, in blocks of 8 MiB. Prints the bytes read and written as JSON. With --hash also the
SHA-256 of the output: what a record of a merge costs beyond the merge. OUT must not exist.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

BLOCK = 8 * 2**20
SYNC_BYTES = 256 * 2**20


def copy(reads: list[tuple[str, int, int]], bytes_out: int, out: Path) -> tuple[int, int]:
    """Read the ranges, write `bytes_out` bytes to `out`; returns the bytes read and written."""
    block = memoryview(bytearray(BLOCK))
    bytes_in = sum(stop - start for _, start, stop in reads)
    target = os.open(out, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o644)
    try:
        if bytes_out:
            os.posix_fallocate(target, 0, bytes_out)
        done_in = done_out = synced = 0
        for count in _blocks(reads, block):
            done_in += count
            # the output advances in step with the input, as a merge's does
            while done_out < bytes_out * done_in // max(bytes_in, 1):
                wanted = min(BLOCK, bytes_out * done_in // bytes_in - done_out)
                done_out += os.pwrite(target, block[:wanted], done_out)
            if done_out - synced >= SYNC_BYTES:
                os.fdatasync(target)
                synced = done_out
        os.fdatasync(target)
    finally:
        os.close(target)
    return done_in, done_out


def _blocks(reads: list[tuple[str, int, int]], block: memoryview) -> Iterator[int]:
    for file, start, stop in reads:
        source = os.open(file, os.O_RDONLY)
        try:
            while start < stop:
                count = os.preadv(source, [block[: min(BLOCK, stop - start)]], start)
                if not count:
                    raise EOFError(f"{file} ends before byte {stop}")
                start += count
                yield count
        finally:
            os.close(source)


def sha256(file: Path) -> str:
    """The hash of a whole file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main(arguments: list[str]) -> None:
    """Copy, and hash if that is asked for."""
    work, out = json.loads(Path(arguments[0]).read_text()), Path(arguments[1])
    reads = [(str(file), int(start), int(stop)) for file, start, stop in work["reads"]]
    read, written = copy(reads, work["bytes_out"], out)
    hashed = sha256(out) if "--hash" in arguments else None
    print(json.dumps({"read": read, "written": written, "sha256": hashed}))


if __name__ == "__main__":
    main(sys.argv[1:])
