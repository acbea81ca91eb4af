"""Run by test_writing.py as its own process: merges that are killed with SIGKILL and run again.

usage: killed_merges.py FOLDER RECIPE POINT...
A point is a number K: the process dies when K tensors are done, other workers being anywhere in theirs. Prints one
JSON line: digests of the undisturbed output, and per point what happened and the digests of the resumed output.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiny_checkpoints import merge


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def child(text: str, folder: Path, out: Path, kill_after: int | None) -> int:
    """Fork a real process that merges, and dies by SIGKILL after `kill_after` tensors; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        seen = 0

        def progress(done: int, total: int, name: str) -> None:
            nonlocal seen
            seen += 1
            if seen == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            merge(text, folder, out, progress=progress, sync_bytes=600, shard_limit_bytes=3000)
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def main() -> None:
    torch.set_num_threads(1)
    folder, text = Path(sys.argv[1]), Path(sys.argv[2]).read_text()
    assert child(text, folder, folder / "whole", None) == 0
    report = {"whole": digests(folder / "whole"), "points": {}}
    for point in sys.argv[3:]:
        out = folder / f"killed-{point}"
        first = child(text, folder, out, int(point))
        appeared = out.exists()
        journal = (folder / f"killed-{point}.partial" / "journal").read_bytes().count(b"\n")
        second = child(text, folder, out, None)
        report["points"][point] = {
            "signal": os.WTERMSIG(first), "appeared": appeared, "journal_lines": journal, "second": second,
            "digests": digests(out),
        }  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    main()
