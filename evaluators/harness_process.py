"""The child of `harness.evaluate`: lm-eval on one model, in a process that may be killed at any time.

    python -m evaluators.harness_process JOB.json      written by harness.py; progress and errors go to its pipe

It writes `lm_eval.json` and `samples/<task>.jsonl` into the job's folder and, last, `done.json`. Answers of the model
are appended to the job's journal as they come, so that an interrupted evaluation goes on at the next sample.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evaluators.errors import EvaluationError

REPORT_EVERY_S = 0.2
# lm-eval's command line draws with these seeds when it is given none; ours are counted from there.
FIRST_SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}
BOOTSTRAP_ITERATIONS = 1000


class Pipe:
    """The way to the parent: one JSON object a line."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "w", encoding="utf-8")
        self._sent_at = 0.0

    def progress(self, done: int, total: int, what: str) -> None:
        """Tell how far it is; seldom enough to cost nothing, and always at the end."""
        now = time.monotonic()
        if done >= total or done == 0 or now - self._sent_at > REPORT_EVERY_S:
            self._sent_at = now
            self._send({"done": done, "total": total, "what": what})

    def error(self, code: str, message: str, next_step: str) -> None:
        self._send({"error": [code, message, next_step]})

    def _send(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


class Journal:
    """Answers of the model, one JSON line each, keyed by the request. A torn last line is dropped."""

    def __init__(self, path: Path) -> None:
        self._known: dict[str, Any] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    key, answer = json.loads(line)
                    self._known[key] = answer
        self._file = path.open("a", encoding="utf-8")
        self._file.write("\n")  # ends a torn line

    def get(self, method: str, arguments: Sequence[Any]) -> Any:
        answer = self._known.get(self._key(method, arguments))
        return tuple(answer) if isinstance(answer, list) else answer

    def add(self, method: str, arguments: Sequence[Any], answer: Any) -> None:
        self._file.write(json.dumps([self._key(method, arguments), answer]) + "\n")
        self._file.flush()

    @staticmethod
    def _key(method: str, arguments: Sequence[Any]) -> str:
        return hashlib.sha256(json.dumps([method, *arguments], default=str).encode()).hexdigest()


class Listener:
    """lm-eval's cache hook: hears of every answer as soon as the model has given it."""

    def __init__(self, heard: Callable[[str, Sequence[Any], Any], None]) -> None:
        self.add_partial = heard


def resuming(hflm: type[Any]) -> type[Any]:
    """`HFLM` that asks the model only what the journal does not know yet."""

    class ResumingLM(hflm):  # type: ignore[misc]
        def __init__(self, *args: Any, journal: Journal, pipe: Pipe, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._journal, self._pipe = journal, pipe
            self._done, self._total = 0, 0
            self.set_cache_hook(Listener(self._heard))

        def _heard(self, method: str, arguments: Sequence[Any], answer: Any) -> None:
            number = answer[0] if isinstance(answer, tuple) else answer
            if isinstance(number, float) and math.isnan(number):
                raise EvaluationError(
                    "EVALUATION_FAILED",
                    "The model's answers are not numbers (NaN).",
                    "Look for NaN or overflow in its weights.",
                )
            self._journal.add(method, arguments, answer)
            self._done += 1
            self._pipe.progress(self._done, self._total, method)

        def _resumed(self, method: str, requests: list[Any], ask: Callable[..., list[Any]], **kwargs: Any) -> list[Any]:
            answers = [self._journal.get(method, request.args) for request in requests]
            missing = [i for i, answer in enumerate(answers) if answer is None]
            self._done, self._total = len(requests) - len(missing), len(requests)
            self._pipe.progress(self._done, self._total, method)
            if missing:
                for i, answer in zip(missing, ask([requests[i] for i in missing], **kwargs), strict=True):
                    answers[i] = answer
            return answers

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return self._resumed("loglikelihood", requests, super().loglikelihood, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return self._resumed("loglikelihood_rolling", requests, super().loglikelihood_rolling, disable_tqdm=True)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return self._resumed("generate_until", requests, super().generate_until, disable_tqdm=True)

    return ResumingLM


def main(job_file: Path) -> int:
    """Do the job; 0 when `done.json` stands, 1 when the reason was sent to the parent."""
    job = json.loads(job_file.read_text(encoding="utf-8"))
    pipe = Pipe(job["pipe"])
    _die_with_parent()
    try:
        _limit_memory(job["memory_limit_bytes"])
        done = _evaluate(job, pipe)
        (Path(job["folder"]) / "done.json").write_text(json.dumps(done), encoding="utf-8")
    except EvaluationError as error:
        pipe.error(error.code, error.message, error.next_step)
        return 1
    except Exception as error:
        if not _out_of_memory(error):
            raise
        pipe.error("MEMORY_LIMIT", "The evaluation ran out of memory.", "Use a smaller batch or a larger machine.")
        return 1
    return 0


def _die_with_parent() -> None:
    """The parent holds the other end of standard input; when it is gone, nobody waits for this work."""

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
        sign in str(error) for sign in ("CUDA out of memory", "can't allocate memory", "Cannot allocate memory")
    )


def _evaluate(job: dict[str, Any], pipe: Pipe) -> dict[str, Any]:
    from evaluators import harness_model, harness_tasks

    pipe.progress(0, 1, "loading lm-eval")
    import lm_eval.evaluator
    from lm_eval.models.huggingface import HFLM

    tasks = harness_tasks.load(job)
    model, tokenizer = harness_model.load(Path(job["model"]), job["device"], job["dtype"])
    if job["chat_template"] and not tokenizer.chat_template:
        raise EvaluationError(
            "EVALUATION_FAILED",
            "A chat template was asked for, but the model's tokenizer has none.",
            "Evaluate without it.",
        )
    journal = Journal(Path(job["journal"]))
    batch: int | str = job["batch_size"] if job["batch_size"] == "auto" else int(job["batch_size"])
    while True:
        lm = resuming(HFLM)(pretrained=model, tokenizer=tokenizer, batch_size=batch, journal=journal, pipe=pipe)
        try:
            results = lm_eval.evaluator.simple_evaluate(
                lm,
                tasks=list(tasks),
                limit=job["limit"],
                bootstrap_iters=BOOTSTRAP_ITERATIONS,
                apply_chat_template=job["chat_template"],
                batch_size=batch,
                log_samples=True,
                **{name: first + job["seed"] for name, first in FIRST_SEEDS.items()},
            )
            break
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error) or not isinstance(batch, int) or batch == 1:
                raise
            batch //= 2
            tasks = harness_tasks.load(job)  # the old ones hold the answers so far
    facts = harness_model.facts(model, job, batch)
    return {"environment": facts, "data": harness_tasks.write(results, tasks, job)}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
