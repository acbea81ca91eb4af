"""Child process of `harness.evaluate`: lm-eval on one model. It may be killed at any time.

    python -m evaluators.harness.process < JOB     a line of JSON from evaluation.py; progress and errors go to its pipe

Tasks are evaluated one after the other. Samples and results of a task are written at its end (results.py), the model's
answers as they come, so that an interrupted evaluation can be resumed. A failing task is reported, and the others still
run.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bot.errors import EvaluationError
from evaluators.harness import model_loading, task_loading, workload
from evaluators.harness.journal import Journal, resuming
from evaluators.harness.lengths import cut_prompts
from evaluators.harness.results import answers_file, samples_file
from evaluators.harness.workload import Workload

REPORT_EVERY_S = 0.2
# lm-eval's command line draws with these seeds when it is given none; ours are counted from there.
FIRST_SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}
BOOTSTRAP_ITERATIONS = 1000


class TaskFailed(EvaluationError):
    """One task of a suite failed; the others continue."""


class Pipe:
    """Pipe to the parent: one JSON object per line."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "w", encoding="utf-8")
        self._sent_at = 0.0

    def progress(self, done: int, total: int, what: str) -> None:
        """Report the progress, rarely enough to cost nothing, and always at the end."""
        now = time.monotonic()
        if done >= total or done == 0 or now - self._sent_at > REPORT_EVERY_S:
            self._sent_at = now
            self._send({"done": done, "total": total, "what": what})

    def estimate(self, found: Mapping[str, float]) -> None:
        self._send({"estimate": dict(found)})

    def failed(self, task: str, error: EvaluationError) -> None:
        """Report the failure of a task; the others continue."""
        self._send({"failed": task, "because": [error.code, error.message, error.next_step]})

    def error(self, error: EvaluationError) -> None:
        self._send({"error": [error.code, error.message, error.next_step]})

    def _send(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def main() -> int:
    """Do the job; 0 when every task is finished or reported, 1 when the reason was sent to the parent."""
    job = json.loads(_first_line())
    pipe = Pipe(job["pipe"])
    _die_with_parent()
    try:
        _limit_memory(job["memory_limit_bytes"])
        _evaluate(job, pipe)
    except EvaluationError as error:
        pipe.error(error)
        return 1
    except Exception as error:
        if not _out_of_memory(error):
            raise
        traceback.print_exc()
        pipe.error(
            EvaluationError(
                "MEMORY_LIMIT",
                "The evaluation ran out of memory.",
                "Use a machine with more memory, or --limit and tasks with shorter questions.",
            )
        )
        return 1
    return 0


def _first_line() -> bytes:
    """First line of standard input; nothing follows it while the parent lives."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 65536)
        if not part:
            os._exit(1)  # the parent died before it sent the job
        line += part
    return line


def _die_with_parent() -> None:
    """Exit when the parent has gone: it holds the other end of standard input."""

    def wait() -> None:
        while os.read(0, 1):  # not sys.stdin: its lock would be held when Python shuts down
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _limit_memory(limit_bytes: int | None) -> None:
    if limit_bytes is not None:
        import resource

        # Data, not address space: CUDA and memory-mapped weights reserve far more addresses than they use.
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(
        sign in str(error) for sign in ("out of memory", "can't allocate memory", "Cannot allocate memory")
    )


def _evaluate(job: dict[str, Any], pipe: Pipe) -> None:
    model_loading.require_backend(job["backend"])
    pipe.progress(0, 1, "loading lm-eval")
    import lm_eval.evaluator  # noqa: F401 - here, so that what follows may be timed without it

    pipe.progress(0, 1, "loading tasks")
    tasks = _prepared(job, pipe)
    if not tasks:
        return
    pipe.progress(0, 1, "loading the model")
    lm = model_loading.language_model(job, resuming)
    if job["chat_template"]:
        require_chat_template(lm)
    work = {task.key: _amount(task, job, lm) for task in tasks}
    whole = workload.together(work.values())
    facts = {"environment": model_loading.facts(lm, job), "loaded": getattr(lm, "facts", None)}
    request_bytes = model_loading.request_bytes(lm, whole.longest)
    lm.batch_size_per_gpu = model_loading.first_batch(lm, job["batch_size"], request_bytes)
    pipe.estimate(model_loading.estimate(lm, whole, request_bytes))
    done = 0
    for task in tasks:
        try:
            _ask(task, lm, job, pipe, facts, (done, whole.requests))
        except TaskFailed as error:
            pipe.failed(task.name, error)
        done += work[task.key].requests
    pipe.progress(whole.requests, whole.requests, "done")


def require_chat_template(lm: Any) -> None:
    """Raises EvaluationError NO_CHAT_TEMPLATE unless the model's template formats a question."""
    if not lm.tokenizer.chat_template:
        raise EvaluationError(
            "NO_CHAT_TEMPLATE",
            "The model's tokenizer has no chat template.",
            "Evaluate all compared models without --chat-template.",
        )
    try:
        lm.apply_chat_template([{"role": "user", "content": "a"}])
    except Exception as error:  # templates are code of the model's
        raise EvaluationError(
            "NO_CHAT_TEMPLATE",
            f"The model's chat template cannot be applied: {(str(error).splitlines() or ['?'])[0][:200].rstrip('.')}.",
            "Correct the template, or evaluate all models without --chat-template.",
        ) from error


def _prepared(job: Mapping[str, Any], pipe: Pipe) -> list[task_loading.Prepared]:
    """The tasks that can be set up, in the job's order; the others are reported."""
    found = []
    for asked in job["tasks"]:
        try:
            task = task_loading.prepare(asked, _seeds(job), offline=job["offline"])
        except EvaluationError as error:
            traceback.print_exc()
            pipe.failed(asked["name"], error)
            continue
        # Ends all of it, before any request: a misspelt metric is reported within seconds.
        task_loading.require_metric(task, asked["metric"], asked["filter"])
        found.append(task)
    return found


def _seeds(job: Mapping[str, Any]) -> dict[str, int]:
    return {name: first + job["seed"] for name, first in FIRST_SEEDS.items()}


def _amount(task: task_loading.Prepared, job: Mapping[str, Any], lm: Any) -> Workload:
    found = []
    for leaf in task.leaves:
        with contextlib.suppress(Exception):  # a task that cannot be built says so when its turn has come
            found.append(workload.amount(leaf, job["limit"], lm.tok_encode, shared=getattr(lm, "unshared", "") is None))
    return workload.together(found)


def _ask(
    task: task_loading.Prepared,
    lm: Any,
    job: Mapping[str, Any],
    pipe: Pipe,
    facts: Mapping[str, Any],
    progress: tuple[int, int],
) -> None:
    """Evaluate one task and write its results; if memory runs out, the batch is halved. Raises TaskFailed for errors of
    this task alone."""
    before, total = progress
    began = time.monotonic()
    journal = Journal(answers_file(Path(job["folder"]), task.key))
    for folder in job["reuse"]:
        for leaf in task.leaves:
            journal.take_samples(samples_file(Path(folder), leaf.config.task))
    name = task.name

    def report(answered: int) -> None:
        pipe.progress(min(before + answered, total), total, name)

    while True:
        lm.at(journal, report)
        results = _results(task, lm, job)
        if results is not None:
            break
        lm.batch_size_per_gpu //= 2
        model_loading.free_memory()
        asked = next(each for each in job["tasks"] if each["key"] == task.key)
        task = task_loading.prepare(asked, _seeds(job), offline=job["offline"])  # the old one holds answers already
    its_own = {
        "seconds": time.monotonic() - began,
        "batch": model_loading.batch_of(lm),
        "cut": cut_prompts(lm, results["samples"]),
    }
    task_loading.write(results, task, job, {**facts, **its_own})
    answers_file(Path(job["folder"]), task.key).unlink(missing_ok=True)


def _results(task: task_loading.Prepared, lm: Any, job: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Results of lm-eval; None if memory ran out and a smaller batch may do."""
    import lm_eval.evaluator

    batch = model_loading.batch_of(lm)
    try:
        return lm_eval.evaluator.simple_evaluate(  # type: ignore[no-any-return]
            lm,
            tasks=[task.name],
            task_manager=task,
            num_fewshot=task.few_shot,
            limit=job["limit"],
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            apply_chat_template=job["chat_template"],
            batch_size=batch,
            log_samples=True,
            **_seeds(job),
        )
    except EvaluationError:
        raise
    except Exception as error:
        if not _out_of_memory(error):
            traceback.print_exc()
            raise _task_failed(task.name, error) from error
        if batch in (None, 1):
            raise
    return None


def _task_failed(name: str, error: Exception) -> TaskFailed:
    lines: Sequence[str] = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, OverflowError):  # the exponential in a perplexity
        lines = ["a score is too large for a number, as the model gives the right answers almost no probability"]
    return TaskFailed(
        "EVALUATION_FAILED",
        f"Task `{name}` stopped on an error: {lines[0][:300].rstrip('.')}.",
        "Look into the log of the evaluation, or leave the task out.",
    )


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # every file is closed, and taking torch apart takes seconds
