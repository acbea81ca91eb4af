"""The I/O floor: read every byte a merge reads and write as many as it writes, once, and compute nothing.

usage: python -m benchmarks.floor WORK.json OUT      WORK: {"reads": [[file, start, stop], ...], "bytes_out": n}

The same calls as the engine's: preallocated files, pwrite, fdatasync after every 256 MiB and at the end. Reading and
writing alternate in one thread, in blocks of 8 MiB. Prints the bytes read and written as JSON.
"""

from __future__ import annotations

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
    target = os.open(out, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
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


if __name__ == "__main__":
    work = json.loads(Path(sys.argv[1]).read_text())
    read, written = copy([tuple(one) for one in work["reads"]], work["bytes_out"], Path(sys.argv[2]))
    print(json.dumps({"read": read, "written": written}))
