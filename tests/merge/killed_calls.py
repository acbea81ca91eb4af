"""Run by test_tough_kills.py as its own process: merges that die at a chosen call to the system, and are run again.

usage: killed_calls.py FOLDER RECIPE [CALL ...]
A point is (before | after, call, number): the process sends itself SIGKILL when it makes, or has made, its number-th
such call, in whatever thread. The calls of an undisturbed run are counted first; points lie before the first, after
the middle and before the last of each kind: inside tensors, between data and journal, in the hashing, around the
rename. The merges run as an ordinary user, to whom a read-only file is read-only. Prints one JSON object.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiny_checkpoints import plan_of

from bot.errors import Refused
from bot.merge.execution import stages
from bot.merge.execution.options import MergeOptions

CALLS = ("pwrite", "fdatasync", "fsync", "write", "update", "chmod", "unlink", "rename", "posix_fallocate", "mkdir")
NOBODY = 65534
EXISTS = 3
Seen = Callable[[str, str], None]  # before or after, call


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def watch(seen: Seen) -> None:
    """Report every call of CALLS made by this process from now on."""
    moments = {"c_call": "before", "c_return": "after"}

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event in moments and getattr(argument, "__name__", "") in CALLS:
            seen(moments[event], argument.__name__)  # type: ignore[attr-defined]

    threading.setprofile(profile)
    sys.setprofile(profile)


def child(text: str, folder: Path, out: Path, seen: Seen | None, finished: Callable[[], None] = lambda: None) -> int:
    """Fork a real process that merges under another user's name; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            planned, folders = plan_of(text, folder, shard_limit_bytes=6000)
            if seen is not None:
                watch(seen)
            stages.merge(planned, folders, out, MergeOptions(sync_bytes=600))
            finished()
            code = 0
        except Refused as error:
            code = EXISTS if error.code == "OUTPUT_EXISTS" else 1
            print(error.code, error, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def count_calls(text: str, folder: Path, out: Path) -> Counter[str]:
    """How many calls of each kind an undisturbed run makes."""
    counts: Counter[str] = Counter()
    told = folder / "counts.json"

    def seen(moment: str, call: str) -> None:
        counts[call] += moment == "before"

    assert child(text, folder, out, seen, lambda: told.write_text(json.dumps(counts))) == 0
    return Counter(json.loads(told.read_text()))


def killer(moment: str, call: str, number: int) -> Seen:
    made = 0

    def seen(now: str, name: str) -> None:
        nonlocal made
        made += (now, name) == (moment, call)
        if made == number and (now, name) == (moment, call):
            os.kill(os.getpid(), signal.SIGKILL)

    return seen


def main() -> None:
    torch.set_num_threads(1)
    folder, text = Path(sys.argv[1]), Path(sys.argv[2]).read_text()
    counts = count_calls(text, folder, folder / "whole")
    counts = Counter({call: counts[call] for call in sys.argv[3:] or counts})
    report: dict[str, object] = {"whole": digests(folder / "whole"), "counts": counts}
    points = {}
    for call, total in counts.items():
        for number, moment in {(1, "before"), (total // 2, "after"), (total, "before"), (total, "after")}:
            if number and (moment == "before" or number < total or call == "rename"):
                out = folder / f"{moment}-{call}-{number}"
                first = child(text, folder, out, killer(moment, call, number))
                appeared = digests(out) if out.exists() else None
                second = child(text, folder, out, None)
                points[out.name] = {
                    "died_of": os.WTERMSIG(first), "appeared": appeared, "second": os.waitstatus_to_exitcode(second),
                    "digests": digests(out) if out.exists() else None,
                    "left": sorted(path.name for path in folder.glob(f"{out.name}.*")),
                }  # fmt: skip
    report["points"] = points
    print(json.dumps(report))


if __name__ == "__main__":
    main()
