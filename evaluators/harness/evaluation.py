"""lm-eval in a process of its own: one model, one suite, scores with standard errors, results kept and reused.

    cache/results, tasks, partial      what was found: whole, finished tasks, answers (results.py)
    cache/hub-<endpoint>/              datasets as the libraries cache them
    scratch/harness.log                what the process printed

A result is named by the model's content, the suite and every condition that can change a number, so a parent that many
merges share is evaluated once. A finished task is named likewise but for the suite, and every suite that has it takes
it. The process reads strangers' checkpoints: its environment is built from an allow-list,
its memory and time are limited, and it dies with its parent.
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

from evaluators import memory
from evaluators.content import content_digest
from evaluators.errors import EvaluationError
from evaluators.harness import results, suites
from evaluators.harness.conditions import Conditions
from evaluators.harness.results import folder_of
from evaluators.harness.scores import ModelEvaluation
from evaluators.harness.suites import Suite
from evaluators.harness.task_files import Located

_CODE = Path(__file__).resolve().parents[2]

Progress = Callable[[int, int, str], None]

_INHERITED = (
    "PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NO_PROXY", "SSL_CERT_FILE",
)  # fmt: skip
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
    """What an evaluation will take, as it begins: requests to the model, tokens it reads and at most writes, seconds
    and bytes of memory; None where the backend does not let them be told ahead."""

    requests: int
    tokens: int
    new_tokens: int
    seconds: float | None = None
    memory_bytes: int | None = None


def evaluate(
    model: Path,
    suite: Suite,
    *,
    cache: Path,
    scratch: Path,
    timeout_s: float,
    limit: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "auto",
    batch_size: int | str = 16,
    chat_template: bool = False,
    backend: str = "hf",
    endpoint: str | None = None,
    progress: Progress | None = None,
    estimated: Callable[[Estimate], None] | None = None,
    model_identity: str | None = None,
    environment: Mapping[str, str] | None = None,
    memory_limit_bytes: int | None = None,
    order: Sequence[str] = (),
    reuse: Sequence[ModelEvaluation] = (),
) -> ModelEvaluation:
    """Measure the model in folder `model` on `suite`, or return what is stored for the same question.

    The conditions are those of `conditions.Conditions`. `endpoint` is the Hub that datasets come from; None works
    offline, with data that are cached already. `model_identity` (a commit or a manifest's digest) spares hashing the
    weights. `environment` is what the process may inherit from, by allow-list. `progress(done, total, what)` and
    `estimated` are told as it goes; what they raise ends the evaluation, which a later call takes up again. `order`
    names tasks to begin with. `reuse` are stored evaluations of the same model on fewer samples: what they asked is
    not asked again.

    Raises EvaluationError: VALUE_OUT_OF_RANGE, UNKNOWN_TASK, DEVICE_UNAVAILABLE, BACKEND_UNAVAILABLE, MODEL_UNLOADABLE,
    NO_CHAT_TEMPLATE, DATASET_UNAVAILABLE, DATASET_GATED, TIME_LIMIT, MEMORY_LIMIT, EVALUATION_FAILED. Tasks that are
    finished are kept, whatever is raised.
    """
    located = suites.find(suite.tasks)
    conditions = Conditions(limit, seed, device, dtype, str(batch_size), chat_template, backend)
    conditions.check()
    identity = model_identity or content_digest(model)
    key = conditions.key(identity, suite.digest)
    found = results.stored(cache, key)
    if found is not None:
        return found
    deadline = time.monotonic() + timeout_s
    with results.under_way(cache, key, deadline) as folder:
        found = results.stored(cache, key)  # by the process that was waited for
        if found is not None:
            return found
        task_keys = [conditions.key(identity, task.digest) for task in suite.tasks]
        missing = [task_key for task_key in task_keys if results.finished(cache, task_key) is None]
        if missing:
            memory.require_memory(model, dtype, device, memory_limit_bytes)
            scratch.mkdir(parents=True, exist_ok=True)
            job = _job(model, located.values(), conditions, folder, cache, endpoint)
            tasks = _tasks(suite, task_keys, located, scratch)
            job["tasks"] = [each for each in _ordered(tasks, order) if each["key"] in missing]
            job["reuse"] = [str(folder_of(each, cache).resolve()) for each in reuse]
            job["memory_limit_bytes"] = memory_limit_bytes
            heard = _Heard(progress or _unheard, estimated or _unheard)
            with _Child(job, scratch, _environment(environment or {}, endpoint, cache, scratch)) as child:
                child.wait(deadline, timeout_s, heard)
            _require_all(heard.failed, len(suite.tasks))
        found = results.read(cache, suite, task_keys, key)
        results.keep(cache, found, task_keys)
    return found


def _unheard(*_told: object) -> None:
    """Nobody listens."""


def _ordered(tasks: Sequence[dict[str, Any]], first: Sequence[str]) -> list[dict[str, Any]]:
    places = {name: place for place, name in enumerate(first)}
    return sorted(tasks, key=lambda task: places.get(task["name"], len(places)))


def _require_all(failed: Mapping[str, Sequence[str]], count: int) -> None:
    """Raise the first task's failure, saying what became of the others."""
    for code, message, next_step in failed.values():
        others = [f"`{name}`" for name in list(failed)[1:]]
        also = f" {', '.join(others)} failed, too." if others else ""
        kept = count - len(failed)
        done = f" The other {kept} of {count} tasks are measured and kept." if kept else ""
        raise EvaluationError(code, f"{message}{also}{done}", next_step)


def _job(
    model: Path,
    located: Iterable[Located],
    conditions: Conditions,
    folder: Path,
    cache: Path,
    endpoint: str | None,
) -> dict[str, Any]:
    private = {str(model.resolve().parent), str(cache.resolve()), str(_CODE), str(Path.home()), sys.prefix}
    private |= {str(file.parent.parent) for task in located for file in task.files.values()}
    private |= {str(task.folder) for task in located if task.folder}
    return {
        **asdict(conditions),
        "model": str(model.resolve()),
        "offline": endpoint is None,
        "cache": str(cache.resolve()),
        "folder": str(folder.resolve()),
        "hub_cache": str(_hub_home(cache, endpoint) / "hub"),
        "private_paths": sorted(private - {"/"}, key=len, reverse=True),
    }


def _tasks(
    suite: Suite, task_keys: Sequence[str], located: Mapping[str, Located], scratch: Path
) -> list[dict[str, Any]]:
    """The suite's tasks as the process reads them."""
    return [
        {
            "name": task.name,
            "key": task_key,
            "few_shot": task.few_shot,
            "files": {name: str(file) for name, file in located[task.name].files.items()},
            "tags": located[task.name].tags,
            "folder": str((located[task.name].folder or scratch).resolve()),
            "metric": None if task.metric == suites.ANY else task.metric,
            "filter": task.filter,
        }
        for task, task_key in zip(suite.tasks, task_keys, strict=True)
    ]


def _hub_home(cache: Path, endpoint: str | None) -> Path:
    """Hubs are kept apart: the same name on two of them is two datasets."""
    place = hashlib.sha256((endpoint or _LIVE_HUB).encode()).hexdigest()[:12]
    return (cache / f"hub-{place}").resolve()


def _environment(given: Mapping[str, str], endpoint: str | None, cache: Path, scratch: Path) -> dict[str, str]:
    """The whole environment of the process, built from nothing."""
    made = {"PATH": os.defpath, "LANG": "C.UTF-8", "NO_PROXY": "127.0.0.1,localhost"} | _QUIET
    made |= {name: given[name] for name in _INHERITED if name in given}
    made["HOME"] = str(scratch.resolve())
    made["HF_HOME"] = str(_hub_home(cache, endpoint))
    made["PYTHONPATH"] = str(_CODE)
    made["HF_ENDPOINT"] = endpoint or _LIVE_HUB
    if endpoint is None:
        made |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    elif endpoint != _LIVE_HUB:
        made["HF_HUB_DISABLE_XET"] = "1"  # other Hubs need not speak the Xet protocol
    return made


@dataclass(slots=True)
class _Heard:
    """What the process says: how far it is goes on to the caller, failed tasks are noted."""

    progress: Progress
    estimated: Callable[[Estimate], None]
    failed: dict[str, Sequence[str]] = field(default_factory=dict)

    def line(self, told: Mapping[str, Any]) -> None:
        if "error" in told:
            raise EvaluationError(*told["error"])
        if "failed" in told:
            self.failed[told["failed"]] = told["because"]
        elif "estimate" in told:
            self.estimated(Estimate(**told["estimate"]))
        else:
            self.progress(told["done"], told["total"], told["what"])


class _Child:
    """The process that runs lm-eval, its pipe and its end."""

    def __init__(self, job: Mapping[str, Any], scratch: Path, environment: Mapping[str, str]) -> None:
        self._log_path = scratch / "harness.log"
        reader, writer = os.pipe()
        self._pipe: IO[bytes] = os.fdopen(reader, "rb", buffering=0)
        try:
            with self._log_path.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "evaluators.harness.process"],
                    stdin=subprocess.PIPE,  # the job, and then its end tells the child that we are gone
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
        with contextlib.suppress(BrokenPipeError):  # it died already: `wait` says of what
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *reason: object) -> None:
        # The whole group, whatever ended the wait: nothing of an evaluation outlives it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._pipe.close()

    def wait(self, deadline: float, timeout_s: float, heard: _Heard) -> None:
        """Pass on what it says until the process ends; raises EvaluationError with the reason unless it ended well."""
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
                heard.line(json.loads(line))
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
        """The last line of the log when it names an exception, without paths."""
        lines = self._log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1].strip() if lines else ""
        return f": {last[:200].rstrip('.')}" if ": " in last and "/" not in last else ""
