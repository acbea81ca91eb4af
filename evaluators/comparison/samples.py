"""Stored samples of an evaluation: lm-eval's sample files as arrays that can be paired.

results/<key>/samples/<task>.jsonl   doc_id, doc_hash, target_hash, filter, filtered_resps, <metric>: 0.0 or 1.0
results/<key>/lm_eval.json           group_subtasks: the files of a group's score
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bot.errors import EvaluationError
from evaluators.harness.results import samples_file
from evaluators.harness.scores import Score
from evaluators.paired import Values

# Errors of reading an incomplete file, or one that no evaluation has written.
_BROKEN = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
_CHOSEN = frozenset({"acc", "acc_norm"})  # metrics of which a blind guess among the choices has a known mean


class Unpaired(Exception):
    """A task's score cannot be compared question by question; the message is a clause with the reason."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers of one model to one task, in the order of its n questions.

    `questions` names each by task, number and digest of its text and solution; `values` [n] are the metric's; `choices`
    is the chosen answer or the extracted text, None if not kept; `chance` is the score of guessing, if known; `prompts`
    are digests of the prompts, "" if not kept.
    """

    questions: tuple[str, ...]
    values: Values
    choices: tuple[str, ...] | None
    chance: float | None
    prompts: tuple[str, ...] = ()

    @property
    def binary(self) -> bool:
        """Return whether every question was either right or wrong."""
        return bool(np.isin(self.values, (0.0, 1.0)).all())


def groups(folder: Path) -> dict[str, list[str]]:
    """The tasks and groups within each group, from the results folder of an evaluation made here."""
    try:
        results = json.loads((folder / "lm_eval.json").read_text(encoding="utf-8"))
        return {name: list(within) for name, within in (results.get("group_subtasks") or {}).items()}
    except (FileNotFoundError, *_BROKEN):
        return {}


def read(folder: Path, score: Score, subtasks: Mapping[str, Sequence[str]]) -> Answers:
    """Answers behind `score`, from the results folder of its evaluation; `subtasks` are its `groups`.

    Raises Unpaired if the score is not the mean of its questions' values, EvaluationError NOT_COMPARABLE if the answers
    are missing or unreadable.
    """
    files = _files(folder, score.task, subtasks)
    if not files:
        raise _unusable(score.task, "were not kept")
    try:
        rows = [row for task, path in files for row in _rows(task, path, score)]
    except _BROKEN as error:
        raise _unusable(score.task, "cannot be read") from error
    values = np.array([row.value for row in rows])
    if not rows or not math.isclose(values.mean(), score.value, abs_tol=1e-6):
        raise Unpaired("its score is not the mean of its questions' values")
    choices = [row.choice for row in rows if row.choice is not None]
    kept = tuple(choices) if len(choices) == len(rows) else None
    answers = Answers(tuple(row.question for row in rows), values, kept, None, tuple(row.prompt for row in rows))
    guesses = [row.guess for row in rows if row.guess is not None]
    if score.metric in _CHOSEN and answers.binary and len(guesses) == len(rows):
        return replace(answers, chance=sum(guesses) / len(rows))
    return answers


def _unusable(task: str, how: str) -> EvaluationError:
    return EvaluationError(
        "NOT_COMPARABLE", f"The answers to task `{task}` {how}.", "Remove the stored evaluation and measure again."
    )


def in_turn(questions: Sequence[str]) -> list[int]:
    """Places of questions in the order of their numbers, one of each task in turn."""
    named = [json.loads(question) for question in questions]
    return sorted(range(len(named)), key=lambda at: (named[at][1], named[at][0]))


@dataclass(frozen=True, slots=True)
class _Row:
    question: str
    value: float
    choice: str | None
    guess: float | None
    prompt: str


def _files(folder: Path, task: str, subtasks: Mapping[str, Sequence[str]]) -> list[tuple[str, Path]]:
    """Sample files of a task, or of all tasks within a group, by name."""
    names = [task]
    for name in names:  # grows while it is read
        names += [each for each in subtasks.get(name, ()) if each not in names]
    files = [(name, samples_file(folder, name)) for name in sorted(set(names)) if not subtasks.get(name)]
    return files if all(path.is_file() for _, path in files) else []


def _rows(task: str, path: Path, score: Score) -> Iterator[_Row]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            sample = json.loads(line)
            if sample.get("filter", "none") != score.filter:
                continue
            value = sample.get(score.metric)
            if not isinstance(value, (bool, int, float)) or not math.isfinite(value):
                raise Unpaired("its metric gives no number for each question")
            target = hashlib.sha256(json.dumps(sample.get("target"), sort_keys=True).encode()).hexdigest()
            identity = [task, sample["doc_id"], sample.get("doc_hash"), target]
            choice, guess = _choice(sample, score.metric)
            yield _Row(json.dumps(identity), float(value), choice, guess, str(sample.get("prompt_hash") or ""))


def _choice(sample: Mapping[str, Any], metric: str) -> tuple[str | None, float | None]:
    """Chosen answer and the probability of a right guess, as lm-eval scores multiple choice."""
    answers = sample.get("filtered_resps")
    if not answers:
        return None, None
    if len(answers) > 1 and all(isinstance(each, list) and len(each) == 2 for each in answers):
        likelihoods = np.array([float(each[0]) for each in answers])
        if metric == "acc_norm":
            arguments = sample.get("arguments")
            if not arguments:
                return None, 1 / len(answers)
            likelihoods = likelihoods / np.array([_length(each) for each in arguments[: len(answers)]])
        return str(int(np.argmax(likelihoods))), 1 / len(answers)
    return json.dumps(answers, sort_keys=True), None


def _length(arguments: list[str]) -> float:
    """Characters of a choice, without the space that separates it from the question."""
    return float(max(1, len(arguments[1].removeprefix(" "))))
