"""Executors: run a stage of a job somewhere. A stage takes a spec and returns a result, both JSON (bot/jobs/specs.py).

    scratch/<stage>.spec.json     the spec, without tokens
    scratch/<stage>.result.json   {"ok": ...} or {"error": {...}}; complete or absent
    logs/<scratch name>/<stage>.log    output of the process; kept when the scratch folder is removed

`local.LocalExecutor` runs a child process.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from bot.jobs.job import Progress
from bot.settings import Zone


class Executor(Protocol):
    def run(
        self,
        stage: str,
        spec: Any,
        scratch: Path,
        *,
        zone: Zone,
        timeout_s: float,
        beat: Callable[[Progress | None], None],
    ) -> Any:
        """Run `stage` on `spec` to its end and return its result, both as in `bot.jobs.specs`.

        `beat` is called at least every few seconds with the progress of the stage. An exception of `beat` (a lost
        lease, a cancel) first stops the stage and all its processes. Raises Refused, Failed or Transient as the stage
        did, Failed TIME_LIMIT, Transient WORKER_DIED.
        """
        ...
