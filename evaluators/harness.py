"""lm-eval in a process of its own: one model, one suite, scores with standard errors, results kept and reused.

    cache/results/<key>/evaluation.json       the scores (ModelEvaluation)
    cache/results/<key>/lm_eval.json          lm-eval's results, without paths and names of this machine
    cache/results/<key>/samples/<task>.jsonl  every question with the model's answers
    cache/partial/<key>.jsonl                 answers of an evaluation that was interrupted
    cache/hub-<endpoint>/                     datasets as the libraries cache them
    scratch/harness.log                       what the process printed

`<key>` is the digest of the model's content, the suite and every setting that can change a number, so a parent that
many merges share is evaluated once. The process reads strangers' checkpoints: its environment is built from an
allow-list, its memory and time are limited, and it dies with its parent.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from evaluators import suites
from evaluators.errors import EvaluationError
from evaluators.scores import Environment, ModelEvaluation, Score, TaskData
from evaluators.suites import SUITES, Suite, SuiteTask

__all__ = ["SUITES", "Suite", "SuiteTask", "content_digest", "evaluate", "folder_of"]

Progress = Callable[[int, int, str], None]

# The files of a model folder that decide its answers.
_CONTENT = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
_NOT_CONTENT = frozenset({"manifest.json", "merge_provenance.json", "decode_speed.json", "lm_eval.json"})

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
class _Settings:
    """Everything besides model and suite that can change a number."""

    limit: int | None
    seed: int
    device: str
    dtype: str
    batch_size: str
    chat_template: bool
    endpoint: str | None

    @property
    def text(self) -> list[object]:
        versions = [importlib.metadata.version(name) for name in ("lm_eval", "transformers", "torch")]
        return [self.limit, self.seed, self.device, self.dtype, self.batch_size, self.chat_template, *versions]


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
    endpoint: str | None = None,
    progress: Progress | None = None,
    model_identity: str | None = None,
    environment: Mapping[str, str] | None = None,
    memory_limit_bytes: int | None = None,
) -> ModelEvaluation:
    """Measure the model in folder `model` on `suite`, or return what is stored for the same question.

    `limit` is samples a task. `seed` 0 draws as lm-eval's own command line does. `endpoint` is the Hub that datasets
    come from; None works offline, with data that are cached already. `device` "auto" takes a GPU if there is one.
    `model_identity` (a commit or a manifest's digest) spares hashing the weights. `environment` is what the process
    may inherit from, by allow-list. `progress(done, total, what)`; what it raises ends the evaluation, which a later
    call takes up again.

    Raises EvaluationError: UNKNOWN_TASK, MODEL_UNLOADABLE, DATASET_UNAVAILABLE, TIME_LIMIT, MEMORY_LIMIT,
    EVALUATION_FAILED.
    """
    files = suites.find(suite.tasks)
    chosen = _Settings(limit, seed, device, dtype, str(batch_size), chat_template, endpoint)
    identity = model_identity or content_digest(model)
    key = hashlib.sha256(json.dumps([1, identity, suite.digest, *chosen.text]).encode()).hexdigest()
    stored = _stored(cache, key)
    if stored is not None:
        return stored
    started = time.monotonic()
    scratch.mkdir(parents=True, exist_ok=True)
    (cache / "partial").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".evaluation-", dir=cache) as made:
        folder = Path(made) / key
        folder.mkdir()
        job = _job(model, suite, files, chosen, folder, cache, key) | {"memory_limit_bytes": memory_limit_bytes}
        with _Child(job, scratch, _environment(environment or {}, chosen.endpoint, cache, scratch)) as child:
            child.wait(started + timeout_s, timeout_s, progress or (lambda done, total, what: None))
        found = _read(folder, suite, key, time.monotonic() - started)
        _keep(folder, found, cache)
    (cache / "partial" / f"{key}.jsonl").unlink(missing_ok=True)
    return found


def folder_of(evaluation: ModelEvaluation, cache: Path) -> Path:
    """Where `lm_eval.json` and `samples/` of a stored evaluation lie."""
    return cache / "results" / evaluation.key


def content_digest(model: Path) -> str:
    """64 hex over the names and bytes of the files that decide a model's answers. Raises MODEL_UNLOADABLE."""
    paths = {path.name: path for pattern in _CONTENT for path in model.glob(pattern) if path.name not in _NOT_CONTENT}
    if "config.json" not in paths:
        raise EvaluationError(
            "MODEL_UNLOADABLE", f"{model.name} holds no config.json.", "Name a folder with a model in it."
        )
    content = hashlib.sha256()
    for name in sorted(paths):
        with paths[name].open("rb") as file:
            content.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return content.hexdigest()


def _stored(cache: Path, key: str) -> ModelEvaluation | None:
    try:
        text = (cache / "results" / key / "evaluation.json").read_text(encoding="utf-8")
        return ModelEvaluation.from_dict(json.loads(text))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError):
        # Not what we wrote, or written by another version: measured again and replaced.
        shutil.rmtree(cache / "results" / key, ignore_errors=True)
        return None


def _job(
    model: Path, suite: Suite, files: Mapping[str, Path], chosen: _Settings, folder: Path, cache: Path, key: str
) -> dict[str, Any]:
    tasks = [{"name": task.name, "few_shot": task.few_shot, "file": str(files[task.name])} for task in suite.tasks]
    private = {str(model.resolve().parent), str(cache.resolve()), str(Path(__file__).resolve().parent.parent)}
    private |= {str(Path(path).parent.parent) for path in files.values()} | {str(Path.home()), sys.prefix}
    return {
        "model": str(model.resolve()),
        "tasks": tasks,
        "limit": chosen.limit,
        "seed": chosen.seed,
        "device": chosen.device,
        "dtype": chosen.dtype,
        "batch_size": chosen.batch_size,
        "chat_template": chosen.chat_template,
        "offline": chosen.endpoint is None,
        "folder": str(folder.resolve()),
        "journal": str((cache / "partial" / f"{key}.jsonl").resolve()),
        "hub_cache": str(_hub_home(cache, chosen.endpoint) / "hub"),
        "private_paths": sorted(private - {"/"}, key=len, reverse=True),
    }


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
    made["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
    made["HF_ENDPOINT"] = endpoint or _LIVE_HUB
    if endpoint is None:
        made |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    elif endpoint != _LIVE_HUB:
        made["HF_HUB_DISABLE_XET"] = "1"  # other Hubs need not speak the Xet protocol
    return made


class _Child:
    """The process that runs lm-eval, its pipe and its end."""

    def __init__(self, job: Mapping[str, Any], scratch: Path, environment: Mapping[str, str]) -> None:
        self._log_path = scratch / "harness.log"
        reader, writer = os.pipe()
        job_file = scratch / "harness.job.json"
        job_file.write_text(json.dumps({**job, "pipe": writer}), encoding="utf-8")
        self._pipe: IO[bytes] = os.fdopen(reader, "rb", buffering=0)
        try:
            with self._log_path.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "evaluators.harness_process", str(job_file.resolve())],
                    stdin=subprocess.PIPE,  # its end tells the child that we are gone
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=dict(environment),
                    cwd=scratch,
                    pass_fds=(writer,),
                    start_new_session=True,
                )
        finally:
            os.close(writer)

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *reason: object) -> None:
        # The whole group, whatever ended the wait: nothing of an evaluation outlives it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._pipe.close()

    def wait(self, deadline: float, timeout_s: float, progress: Progress) -> None:
        """Pass progress on until the process ends; raises EvaluationError with the reason unless it ended well."""
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
                _pass_on(json.loads(line), progress)
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


def _pass_on(line: Mapping[str, Any], progress: Progress) -> None:
    if "error" in line:
        raise EvaluationError(*line["error"])
    progress(line["done"], line["total"], line["what"])


def _read(folder: Path, suite: Suite, key: str, seconds: float) -> ModelEvaluation:
    """The scores of what the process wrote."""
    results = json.loads((folder / "lm_eval.json").read_text(encoding="utf-8"))
    done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
    scores: list[Score] = []
    others: list[Score] = []
    for task in suite.tasks:
        for score in _scores(task.name, results, done["data"]):
            ranked = (score.metric, score.filter) == (task.metric, task.filter)
            (scores if ranked else others).append(score)
        if not scores or scores[-1].task != task.name:
            raise EvaluationError(
                "EVALUATION_FAILED",
                f"Task `{task.name}` gave no metric `{task.metric},{task.filter}`.",
                "Name one of the task's own metrics in the suite.",
            )
    environment = Environment(**done["environment"])
    return ModelEvaluation(suite.name, suite.digest, tuple(scores), environment, seconds, others=tuple(others), key=key)


def _scores(task: str, results: Mapping[str, Any], data: Mapping[str, Any]) -> Sequence[Score]:
    found = results["results"][task]
    samples = results.get("n-samples", {}).get(task, {}).get("effective") or found.get("sample_len") or 0
    made = []
    for name, value in found.items():
        metric, comma, kind = name.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = found.get(f"{metric}_stderr,{kind}")
        made.append(
            Score(
                task=task,
                metric=metric,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
                samples=int(samples),
                few_shot=int(results.get("n-shot", {}).get(task) or 0),
                higher_is_better=results.get("higher_is_better", {}).get(task, {}).get(metric) is not False,
                task_version=str(results.get("versions", {}).get(task)),
                filter=kind,
                data=None if data.get(task) is None else TaskData(**data[task]),
            )
        )
    return made


def _keep(folder: Path, found: ModelEvaluation, cache: Path) -> None:
    """Make the folder of results whole, then give it its name; another process's equal one may stand already."""
    (folder / "done.json").unlink()
    (folder / "evaluation.json").write_text(json.dumps(found.as_dict(), indent=1), encoding="utf-8")
    for path in folder.rglob("*.json*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    (cache / "results").mkdir(exist_ok=True)
    try:
        folder.rename(cache / "results" / found.key)
    except OSError:
        if _stored(cache, found.key) is None:
            raise
