"""Executors: run a stage of a job somewhere. A stage takes a spec and returns a result, both JSON (bot/jobs/specs.py).

    scratch/<stage>.spec.json     what to do; never a token
    scratch/<stage>.result.json   {"ok": ...} or {"error": {...}}; written whole or not at all
    logs/<scratch name>/<stage>.log    what the process printed; kept when the scratch folder goes

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

        `beat` is called at least every few seconds, with what the stage says of its progress; what it raises (a lost
        lease, a cancel) stops the stage, with everything it started, before it reaches the caller.
        Raises Refused, Failed or Transient as the stage did, Failed TIME_LIMIT, Transient WORKER_DIED.
        """
        ...
