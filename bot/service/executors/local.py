"""Local executor: a stage as a child process in its own process group, with an allow-listed environment."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bot.errors import Failed, MergebotError, Refused, Transient
from bot.jobs.job import Progress
from bot.jobs.specs import encode
from bot.settings import Settings, Zone, child_environment

MODULES: dict[Zone, str] = {"worker": "bot.stages.worker", "publisher": "bot.publishing.publisher"}
BEAT_S = 2.0
GRACE_S = 5.0
EXIT_S = 60.0
LINE_LIMIT_BYTES = 64 * 1024
KINDS: dict[str, type[MergebotError]] = {"Refused": Refused, "Failed": Failed, "Transient": Transient}


class LocalExecutor:
    """Runs stages on this machine. See `Executor`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def command(self, zone: Zone) -> list[str]:
        """The program of a zone. -P: the folder we were started in must not be able to shadow a module."""
        return [sys.executable, "-P", "-m", MODULES[zone]]

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
        scratch.mkdir(parents=True, exist_ok=True)
        spec_file, result_file = scratch / f"{stage}.spec.json", scratch / f"{stage}.result.json"
        result_file.unlink(missing_ok=True)
        spec_file.write_text(json.dumps(encode(spec)))
        logs = self._settings.logs / scratch.name
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / f"{stage}.log").open("ab") as log:
            child = subprocess.Popen(
                [*self.command(zone), stage, str(spec_file), str(result_file), str(os.getpid())],
                env=child_environment(self._settings, zone),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
            try:
                _follow(child, stage, time.monotonic() + timeout_s, timeout_s, beat)
                child.wait(timeout=EXIT_S)
            finally:
                _stop(child)
        return _result(result_file, stage, child.returncode)


def _follow(
    child: subprocess.Popen[bytes],
    stage: str,
    deadline: float,
    timeout_s: float,
    beat: Callable[[Progress | None], None],
) -> None:
    """Pass on the child's progress lines until it closes its output."""
    assert child.stdout is not None
    os.set_blocking(child.stdout.fileno(), False)
    buffer = b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while True:
            ready = selector.select(timeout=BEAT_S)
            if time.monotonic() > deadline:
                raise Failed(
                    "TIME_LIMIT", f"The {stage} stage ran longer than its limit of {timeout_s:.0f} s.",
                    "Ask for less work, or ask the operator for a longer limit.",
                )  # fmt: skip
            if not ready:
                beat(None)
                continue
            chunk = child.stdout.read(LINE_LIMIT_BYTES)
            if not chunk:
                return
            *lines, buffer = (buffer + chunk).split(b"\n")
            buffer = buffer[-LINE_LIMIT_BYTES:]
            reports = [report for report in map(_progress, lines) if report is not None]
            if reports:
                beat(reports[-1])


def _progress(line: bytes) -> Progress | None:
    """A progress line is `{"text": ..., "done": ..., "total": ...}`; anything else a library printed is ignored."""
    try:
        report = json.loads(line)
        return Progress(str(report["text"])[:200], float(report["done"]), float(report["total"]))
    except (ValueError, KeyError, TypeError):
        return None


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End the child and everything it started: first politely, then not."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=GRACE_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if child.stdout is not None:
        child.stdout.close()


def _result(result_file: Path, stage: str, code: int) -> Any:
    if not result_file.exists():
        cause = f"signal {-code}" if code < 0 else f"exit status {code}"
        raise Transient(
            "WORKER_DIED", f"The process of the {stage} stage ended without a result ({cause}).",
            "It is started again while attempts are left.", retry_after_s=0.0,
        )  # fmt: skip
    result: dict[str, Any] = json.loads(result_file.read_text())
    error = result.get("error")
    if error is None:
        return result["ok"]
    kind = KINDS.get(error["kind"], Failed)
    if kind is Transient:
        raise Transient(
            error["code"], error["message"], error["next"], value=error["value"], retry_after_s=error["retry_after_s"]
        )
    raise kind(error["code"], error["message"], error["next"], value=error["value"])
