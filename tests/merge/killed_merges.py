"""Run by test_writing.py as its own process: merges that are killed with SIGKILL and run again.

usage: killed_merges.py FOLDER RECIPE POINT...
A point is EVENT:K, the K-th time that the engine tells of that event; the process dies there, other threads being
anywhere in their work. Prints one JSON line: digests of the undisturbed output, and per point what happened and the
digests of the resumed output.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiny_checkpoints import merge


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def child(text: str, folder: Path, out: Path, point: str | None) -> int:
    """Fork a real process that merges, and dies by SIGKILL at `point`; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        seen: Counter[str] = Counter()

        def on_event(event: str) -> None:
            seen[event] += 1
            if f"{event}:{seen[event]}" == point:
                os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            merge(text, folder, out, on_event=on_event, sync_bytes=600, shard_limit_bytes=3000)
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
        name = "killed-" + point.replace(":", "-")
        out = folder / name
        first = child(text, folder, out, point)
        appeared = out.exists()
        journal = (folder / f"{name}.partial" / "journal").read_bytes().count(b"\n")
        second = child(text, folder, out, None)
        report["points"][point] = {
            "signal": os.WTERMSIG(first), "appeared": appeared, "journal_lines": journal, "second": second,
            "digests": digests(out),
        }  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    main()
