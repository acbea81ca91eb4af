"""Evaluation of one model on one suite: lm-eval in its own process, with stored results reused.

    cache/results, tasks, partial      whole results, finished tasks, single answers (results.py)
    cache/hub-<endpoint>/              datasets as the libraries cache them
    scratch/harness.log                output of the process

The key of a result covers the model's content, the suite and every condition that can change a number, so a parent
shared by many merges is evaluated once. The key of a finished task leaves the suite out, so all suites share it. The
process reads untrusted checkpoints: its environment is built from an allow-list, its memory and time are limited, and
it ends with its parent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from bot.errors import EvaluationError
from evaluators import memory
from evaluators.content import content_digest
from evaluators.harness import results, suites
from evaluators.harness.eval_config import EvalConfig, Question
from evaluators.harness.results import folder_of
from evaluators.harness.scores import ModelEvaluation
from evaluators.harness.suites import Suite
from evaluators.harness.task_files import Located

_CODE = Path(__file__).resolve().parents[2]

Progress = Callable[[int, int, str], None]

_INHERITED = (
    *("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "NO_PROXY", "SSL_CERT_FILE"),
    *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS"),
)
_QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_EXPERIMENTAL_WARNING": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "DISABLE_SAFETENSORS_CONVERSION": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0",
    "PYTHONUNBUFFERED": "1",
    "GIT_TERMINAL_PROMPT": "0",
}
_LIVE_HUB = "https://huggingface.co"


@dataclass(frozen=True, slots=True)
class Estimate:
    """Expected cost of an evaluation: requests to the model, tokens read, new tokens at most, seconds, bytes of memory.

    None where the backend does not allow an estimate.
    """

    requests: int
    tokens: int
    new_tokens: int
    seconds: float | None = None
    memory_bytes: int | None = None


def _ignored(*_arguments: object) -> None:
    """Default callback."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of a run that change none of its numbers.

    `cache` holds stored results, `scratch` the process's log and home. `endpoint` is the Hub that datasets come from;
    None works offline, from the cache. `environment` is filtered by an allow-list before the process inherits it.
    `progress(done, total, what)` and `estimated` are called during the run; an exception of theirs ends the
    evaluation, and a later call resumes it.
    """

    cache: Path
    scratch: Path
    timeout_s: float
    endpoint: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    memory_limit_bytes: int | None = None
    progress: Progress = _ignored
    estimated: Callable[[Estimate], None] = _ignored


def evaluate(
    model: Path,
    question: Question,
    run: RunOptions,
    *,
    identity: str | None = None,
    order: Sequence[str] = (),
    reuse: Sequence[ModelEvaluation] = (),
) -> ModelEvaluation:
    """Evaluate the model in folder `model`, or return the stored result of the same question.

    `identity` (a commit or a manifest's digest) spares hashing the weights. `order` names the tasks that run first.
    `reuse` are stored evaluations of the same model on fewer samples; their requests are not repeated. Tasks
    that finished before an error are kept.

    Raises EvaluationError: VALUE_OUT_OF_RANGE, UNKNOWN_TASK, DEVICE_UNAVAILABLE, BACKEND_UNAVAILABLE, MODEL_UNLOADABLE,
    NO_CHAT_TEMPLATE, DATASET_UNAVAILABLE, DATASET_GATED, TIME_LIMIT, MEMORY_LIMIT, EVALUATION_FAILED.
    """
    suite, conditions = question.suite, question.conditions
    located = suites.find(suite.tasks)
    conditions.check()
    identity = identity or content_digest(model)
    key = question.key(identity)
    if (found := results.stored(run.cache, key)) is not None:
        return found
    deadline = time.monotonic() + run.timeout_s
    with results.under_way(run.cache, key, deadline) as folder:
        found = results.stored(run.cache, key)  # another process may have finished it during the wait
        if found is not None:
            return found
        task_keys = [conditions.key(identity, task.digest) for task in suite.tasks]
        tasks = _tasks(suite, task_keys, located, run)
        tasks = [each for each in tasks if results.finished(run.cache, each["key"]) is None]
        if tasks:
            memory.require_memory(model, conditions.dtype, conditions.device, run.memory_limit_bytes)
            job = _job(model, located.values(), conditions, folder, run, _ordered(tasks, order), reuse)
            _require_all(_run(job, run, deadline), len(suite.tasks))
        found = results.read(run.cache, suite, task_keys, key)
        results.keep(run.cache, found, task_keys)
    return found


def _run(job: Mapping[str, Any], run: RunOptions, deadline: float) -> Mapping[str, Sequence[str]]:
    """Run the process to its end and return the tasks that failed, by name."""
    run.scratch.mkdir(parents=True, exist_ok=True)
    messages = _Messages(run.progress, run.estimated)
    environment = _environment(run.environment, run.endpoint, run.cache, run.scratch)
    with _Child(job, run.scratch, environment) as child:
        child.wait(deadline, run.timeout_s, messages)
    return messages.failed


def _ordered(tasks: Sequence[dict[str, Any]], first: Sequence[str]) -> list[dict[str, Any]]:
    places = {name: place for place, name in enumerate(first)}
    return sorted(tasks, key=lambda task: places.get(task["name"], len(places)))


def _require_all(failed: Mapping[str, Sequence[str]], count: int) -> None:
    """Raise the first failure, with the outcome of the other tasks, if any failed."""
    for code, message, next_step in failed.values():
        others = [f"`{name}`" for name in list(failed)[1:]]
        also = f" {', '.join(others)} failed, too." if others else ""
        kept = count - len(failed)
        done = f" The other {kept} of {count} tasks are measured and kept." if kept else ""
        raise EvaluationError(code, f"{message}{also}{done}", next_step)


def _job(
    model: Path,
    located: Iterable[Located],
    conditions: EvalConfig,
    folder: Path,
    run: RunOptions,
    tasks: Sequence[dict[str, Any]],
    reuse: Sequence[ModelEvaluation],
) -> dict[str, Any]:
    private = {str(model.resolve().parent), str(run.cache.resolve()), str(_CODE), str(Path.home()), sys.prefix}
    private |= {str(file.parent.parent) for task in located for file in task.files.values()}
    private |= {str(task.folder) for task in located if task.folder}
    return {
        **asdict(conditions),
        "model": str(model.resolve()),
        "offline": run.endpoint is None,
        "cache": str(run.cache.resolve()),
        "folder": str(folder.resolve()),
        "hub_cache": str(_hub_home(run.cache, run.endpoint) / "hub"),
        "memory_limit_bytes": run.memory_limit_bytes,
        "tasks": tasks,
        "reuse": [str(folder_of(each, run.cache).resolve()) for each in reuse],
        "private_paths": sorted(private - {"/"}, key=len, reverse=True),
    }


def _tasks(
    suite: Suite, task_keys: Sequence[str], located: Mapping[str, Located], run: RunOptions
) -> list[dict[str, Any]]:
    """Tasks of the job's JSON."""
    return [
        {
            "name": task.name,
            "key": task_key,
            "few_shot": task.few_shot,
            "files": {name: str(file) for name, file in located[task.name].files.items()},
            "tags": located[task.name].tags,
            "folder": str((located[task.name].folder or run.scratch).resolve()),
            "metric": None if task.metric == suites.ANY else task.metric,
            "filter": task.filter,
        }
        for task, task_key in zip(suite.tasks, task_keys, strict=True)
    ]


def _hub_home(cache: Path, endpoint: str | None) -> Path:
    """Dataset cache of one Hub: a name on two Hubs is two datasets."""
    place = hashlib.sha256((endpoint or _LIVE_HUB).encode()).hexdigest()[:12]
    return (cache / f"hub-{place}").resolve()


def _environment(given: Mapping[str, str], endpoint: str | None, cache: Path, scratch: Path) -> dict[str, str]:
    """Complete environment of the process; nothing else is inherited."""
    made = {"PATH": os.defpath, "LANG": "C.UTF-8", "NO_PROXY": "127.0.0.1,localhost"} | _QUIET
    made |= {name: given[name] for name in _INHERITED if name in given}
    made["HOME"] = str(scratch.resolve())
    made["HF_HOME"] = str(_hub_home(cache, endpoint))
    made["PYTHONPATH"] = str(_CODE)
    made["HF_ENDPOINT"] = endpoint or _LIVE_HUB
    if endpoint is None:
        made |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    elif endpoint != _LIVE_HUB:
        made["HF_HUB_DISABLE_XET"] = "1"  # other Hubs may lack the Xet protocol
    return made


@dataclass(slots=True)
class _Messages:
    """Messages of the process: progress goes to the callbacks, failed tasks are collected."""

    progress: Progress
    estimated: Callable[[Estimate], None]
    failed: dict[str, Sequence[str]] = field(default_factory=dict)

    def handle(self, message: Mapping[str, Any]) -> None:
        if "error" in message:
            raise EvaluationError(*message["error"])
        if "failed" in message:
            self.failed[message["failed"]] = message["because"]
        elif "estimate" in message:
            self.estimated(Estimate(**message["estimate"]))
        else:
            self.progress(message["done"], message["total"], message["what"])


class _Child:
    """Process that runs lm-eval, with its message pipe."""

    def __init__(self, job: Mapping[str, Any], scratch: Path, environment: Mapping[str, str]) -> None:
        self._log_path = scratch / "harness.log"
        reader, writer = os.pipe()
        self._pipe: IO[bytes] = os.fdopen(reader, "rb", buffering=0)
        try:
            with self._log_path.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "evaluators.harness.process"],
                    stdin=subprocess.PIPE,  # the job; its end signals the end of this process
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=dict(environment),
                    cwd=scratch,
                    pass_fds=(writer,),
                    start_new_session=True,
                )
        finally:
            os.close(writer)
        self._send({**job, "pipe": writer})

    def _send(self, job: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process died already; `wait` reports the reason
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *reason: object) -> None:
        # Kill the whole group: no process may outlive the evaluation.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._pipe.close()

    def wait(self, deadline: float, timeout_s: float, messages: _Messages) -> None:
        """Handle messages until the process ends. Raises EvaluationError with the reason of a failure."""
        waiting = b""
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise EvaluationError(
                    "TIME_LIMIT",
                    f"The evaluation was stopped after its {timeout_s:g} seconds.",
                    "Allow more time, or set a limit on samples.",
                )
            if not select.select([self._pipe], [], [], left)[0]:
                continue
            chunk = self._pipe.read(65536)
            if not chunk:
                break
            *lines, waiting = (waiting + chunk).split(b"\n")
            for line in lines:
                messages.handle(json.loads(line))
        self._ended(max(1.0, deadline - time.monotonic()))

    def _ended(self, left_s: float) -> None:
        try:
            code = self._process.wait(timeout=left_s)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        if code == -signal.SIGKILL:
            raise EvaluationError(
                "MEMORY_LIMIT",
                "The evaluation was killed by the system, which it does when memory runs out.",
                "Use a smaller batch or a machine with more memory.",
            )
        if code != 0:
            how = f"died of signal {signal.Signals(-code).name}" if code < 0 else "stopped on an error"
            raise EvaluationError(
                "EVALUATION_FAILED", f"lm-eval {how}{self._last_words()}.", f"Look into {self._log_path.name}."
            )

    def _last_words(self) -> str:
        """Last line of the log if it names an exception and contains no path."""
        lines = self._log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1].strip() if lines else ""
        return f": {last[:200].rstrip('.')}" if ": " in last and "/" not in last else ""
