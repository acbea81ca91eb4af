"""The child's side of the protocol: read the spec, report progress, write the result whole, die with the parent."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bot import storage
from bot.errors import Failed, MergebotError, Transient
from bot.jobs import specs
from bot.progress import Show
from bot.settings import Settings, activate

Stage = Callable[[Any, Settings, Show], Any]
REPORT_EVERY_S = 0.2
PR_SET_PDEATHSIG = 1


def main(stages: Mapping[str, tuple[type[Any], Stage]]) -> None:
    """Run stage `sys.argv[1]` on the spec file `sys.argv[2]` and write the result file `sys.argv[3]`.

    `stages` holds the type of each stage's spec and its function. `sys.argv[4]` is the process id of the parent.
    """
    stage, spec_file, result_file = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    _die_with_parent(int(sys.argv[4]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold what the process held
    progress = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print belongs into the log, not between the progress lines
    settings = Settings()
    activate(settings)
    try:
        kind, run = stages[stage]
        made = run(specs.decode(kind, json.loads(spec_file.read_text())), settings, _reporter(progress))
        result: dict[str, Any] = {"ok": specs.encode(made)}
    except MergebotError as error:
        traceback.print_exc()
        result = {"error": _described(error)}
    except MemoryError:
        traceback.print_exc()
        result = {
            "error": _described(
                Failed("MEMORY_LIMIT", f"The {stage} stage ran out of memory.", "Merge smaller models.")
            )
        }
    except Exception:
        traceback.print_exc()
        unexpected = Failed(
            "INTERNAL",
            f"The {stage} stage stopped on a defect of mergebot.",
            "The operator finds the details in the job's log.",
        )
        result = {"error": _described(unexpected)}
    storage.write_atomic(result_file, json.dumps(result).encode())


def _described(error: MergebotError) -> dict[str, Any]:
    kind = next(base.__name__ for base in type(error).__mro__ if base.__name__ in ("Refused", "Failed", "Transient"))
    after = error.retry_after_s if isinstance(error, Transient) else None
    return {**error.as_dict(), "kind": kind, "retry_after_s": after}


def _reporter(progress: Any) -> Show:
    last = 0.0

    def report(text: str, done: float, total: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < REPORT_EVERY_S and done < total:
            return
        last = now
        progress.write(json.dumps({"text": text, "done": done, "total": total}) + "\n")

    return report


def _die_with_parent(parent: int) -> None:
    """Two attempts must never write one scratch folder: a child whose parent was killed dies at once (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)
