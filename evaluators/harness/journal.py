"""Journal of a model's answers on disk, and a language model that answers only the missing requests.

Answers are written in complete batches. lm-eval sorts requests and cuts them into batches; without the answered batches
it cuts the rest as before, so an interrupted evaluation ends with the numbers of an undisturbed one, to the last bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bot.errors import EvaluationError


class Journal:
    """Answers of the model by request, one JSON line per batch.

    Equal requests keep the order of their answers, since a task may draw a question several times. Damaged lines are
    ignored, and their requests repeated.
    """

    def __init__(self, path: Path) -> None:
        self._known: dict[str, list[Any]] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                with contextlib.suppress(ValueError, TypeError):
                    self._learn([(key, answer) for key, answer in json.loads(line)])
        self._waiting: list[tuple[str, Any]] = []
        self._file = path.open("a", encoding="utf-8")
        self._file.write("\n")  # ends a torn line

    def __len__(self) -> int:
        return sum(map(len, self._known.values()))

    def known(self, requests: Sequence[Sequence[Any]]) -> list[Any]:
        """Answer of each request, by its arguments; None if missing."""
        used: Counter[str] = Counter()
        found = []
        for key in map(_key, requests):
            answers = self._known.get(key, [])
            answer = answers[used[key]] if used[key] < len(answers) else None
            used[key] += 1
            found.append(tuple(answer) if isinstance(answer, list) else answer)
        return found

    def add(self, arguments: Sequence[Any], answer: Any) -> None:
        """Hold the answer until its batch is whole."""
        self._waiting.append((_key(arguments), answer))

    def batch_ended(self) -> None:
        if self._waiting:
            self._file.write(json.dumps(self._waiting) + "\n")
            self._file.flush()
            self._learn(self._waiting)
            self._waiting = []

    def take_samples(self, path: Path) -> None:
        """Add the answers in the samples of an earlier evaluation, for instance one with fewer questions."""
        earlier: dict[str, list[Any]] = {}
        first = None
        with contextlib.suppress(FileNotFoundError), path.open(encoding="utf-8") as lines:
            for sample in map(json.loads, lines):
                first = first or sample["filter"]
                if sample["filter"] == first:  # each filter has a line of the same answers
                    for arguments, answers in zip(sample["arguments"], sample["resps"], strict=True):
                        earlier.setdefault(_key(arguments), []).extend(answers)
        self._known = earlier | self._known

    def _learn(self, answers: Iterable[tuple[str, Any]]) -> None:
        for key, answer in answers:
            self._known.setdefault(key, []).append(answer)


def _key(arguments: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(list(arguments), default=str).encode()).hexdigest()


def resuming(model_class: type[Any]) -> type[Any]:
    """`model_class`, one of lm-eval's, that runs the model only for requests missing from the journal."""

    class ResumingLM(model_class):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._journal: Journal
            self.set_cache_hook(SimpleNamespace(add_partial=self._record))

        def at(self, journal: Journal, report: Callable[[int], None]) -> None:
            """Use `journal` from here on; `report` is called after every answer."""
            self._journal, self._report = journal, report
            self._done = 0

        def _record(self, method: str, arguments: Sequence[Any], answer: Any) -> None:
            number = answer[0] if isinstance(answer, tuple) else answer
            if isinstance(number, float) and math.isnan(number):
                raise EvaluationError(
                    "EVALUATION_FAILED",
                    "The model's answers are not numbers (NaN).",
                    "Look for NaN or overflow in its weights.",
                )
            self._journal.add(arguments, answer)
            self._done += 1
            self._report(self._done)

        def _model_call(self, *args: Any, **kwargs: Any) -> Any:
            self._journal.batch_ended()
            return super()._model_call(*args, **kwargs)

        def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
            self._journal.batch_ended()
            return super()._model_generate(*args, **kwargs)

        def _resumed(self, requests: list[Any], ask: Callable[..., list[Any]], planned: bool = False) -> list[Any]:
            answers = self._journal.known([request.args for request in requests])
            missing = [i for i, answer in enumerate(answers) if answer is None]
            self._done += len(requests) - len(missing)
            self._report(self._done)
            if missing and planned and hasattr(self, "answered"):  # it plans its passes over all requests
                self.answered = set(range(len(requests))) - set(missing)
                try:
                    found = ask(requests, disable_tqdm=True)
                finally:
                    self.answered = set()  # the next task has other requests
                answers = [found[i] if answer is None else answer for i, answer in enumerate(answers)]
            elif missing:
                for i, answer in zip(missing, ask([requests[i] for i in missing], disable_tqdm=True), strict=True):
                    answers[i] = answer
            self._journal.batch_ended()
            return answers

        def batch_ended(self) -> None:
            self._journal.batch_ended()

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return self._resumed(requests, super().loglikelihood, planned=True)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return self._resumed(requests, super().loglikelihood_rolling)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return self._resumed(requests, super().generate_until, planned=True)

    return ResumingLM
