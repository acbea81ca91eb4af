"""Scores of an evaluation with their standard errors and the environment in which they were taken.

Two evaluations are compared only if `differences` is empty: same questions, same settings, same computation.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bot.errors import EvaluationError

_Z95 = 1.959964


WHOLE = "each request whole"  # as lm-eval does


@dataclass(frozen=True, slots=True)
class TaskData:
    """Data of a task: a dataset repo, its configuration and split, and the commit that was read."""

    repo: str
    config: str | None
    split: str | None
    revision: str | None


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one task. Fractions stay fractions; `stderr` is None if the harness gives none.

    `filter` is lm-eval's name for the extraction of the answer ("none" for multiple choice). `chance` is the score of
    guessing, if the suite counts from there.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int
    few_shot: int
    higher_is_better: bool
    task_version: str
    filter: str = "none"
    data: TaskData | None = None
    chance: float | None = None

    @property
    def normalised(self) -> float:
        """The value from chance on."""
        return self.from_chance(self.value)

    @property
    def interval95(self) -> tuple[float, float] | None:
        """The 95 % interval; None without a standard error.

        Wilson's (JASA 22, 1927) for a share of right answers, so that 0 of 40 has an interval; else the value and 1.96
        standard errors to both sides.
        """
        if self.stderr is None or not math.isfinite(self.stderr):
            return None
        share, count = self.value, self.samples
        if count > 1 and 0 <= share <= 1 and abs(self.stderr**2 * (count - 1) - share * (1 - share)) < 1e-9:
            from evaluators.paired import proportion_interval

            return proportion_interval(round(share * count), count)
        return self.value - _Z95 * self.stderr, self.value + _Z95 * self.stderr

    def from_chance(self, value: float) -> float:
        """0 at chance, 1 at the best, never below 0; the plain value if the suite names no chance."""
        return value if self.chance is None else max(0.0, (value - self.chance) / (1 - self.chance))


@dataclass(frozen=True, slots=True)
class Environment:
    """Settings and libraries of the computation; all of it is equal before two scores are compared.

    `batch_size` is the requested one. `reading` says whether requests share the prefixes that they have in common; in
    float32 the numbers are the same up to rounding, in 16 bits they are not. Older evaluations took the softmax in the
    model's dtype and generated under the model's own settings.
    """

    device: str
    dtype: str
    batch_size: str
    chat_template: bool
    seed: int
    lm_eval: str
    transformers: str
    torch: str
    limit: int | None = None
    backend: str = "hf"
    softmax_dtype: str = "the model's type"
    generation: str = "the model's own"
    reading: str = WHOLE


@dataclass(frozen=True, slots=True)
class Cut:
    """Prompts of a task that were longer than the context: `requests` of all `of` lost their start.

    The longest had `longest` tokens, and `limit` fit beside the answer.
    """

    task: str
    requests: int
    of: int
    longest: int
    limit: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """Properties of the loaded model that affect its answers.

    It reads `context` tokens. `kept_apart` are parameters that the config ties but the files store with other values.
    `ignored_settings` of generation_config.json (`name=value`) would have changed greedy answers. Answers end at the
    ids `ends`. The tokenizer adds the tokens `begins_with` before a text and `ends_with` after it, and would append
    `dropped_end`; a text that is scored as a whole follows `before_whole`. With `cleans_spaces` it removes spaces
    before punctuation from the answers. `splits` is a digest of the tokens of a fixed text. A decoder with an encoder
    starts with the ids `starts`. `attention` is transformers' name of the attention implementation.
    """

    context: int
    kept_apart: tuple[str, ...] = ()
    ignored_settings: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()
    begins_with: tuple[str, ...] = ()
    dropped_end: tuple[str, ...] = ()
    cleans_spaces: bool = False
    ends_with: tuple[str, ...] = ()
    before_whole: tuple[str, ...] = ()
    splits: str = ""
    starts: tuple[int, ...] = ()
    attention: str = ""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Loaded:
        """From JSON, which has lists; raises TypeError for anything else."""
        read: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**read)


@dataclass(frozen=True, slots=True)
class ModelEvaluation:
    """Scores of one model on one suite. Only equal `suite_digest`s and environments are compared.

    `scores` holds the ranking metric of each task, in the suite's order; `others` every other metric that lm-eval
    computed. `key` names the stored result: the model's content, the suite and every setting (64 hex). `smallest_batch`
    is the batch that memory allowed. `task_seconds` are in the order of `scores`, or empty if unknown. `loaded` is None
    for backends that do not report it, and in older results; `cut` lists the tasks with prompts that were too long.
    """

    suite: str
    suite_digest: str
    scores: tuple[Score, ...]
    environment: Environment
    seconds: float
    others: tuple[Score, ...] = ()
    key: str = ""
    smallest_batch: int | None = None
    task_seconds: tuple[float, ...] = ()
    loaded: Loaded | None = None
    cut: tuple[Cut, ...] = ()

    @property
    def average(self) -> float | None:
        """Mean of the primary scores (higher-is-better ones), above chance if the suite counts so; None without any."""
        values = [score.normalised for score in self.scores if score.higher_is_better]
        return sum(values) / len(values) if values else None

    @property
    def average_interval95(self) -> tuple[float, float] | None:
        """Interval of `average` for independent tasks; None if a task has no interval."""
        from evaluators.paired import average_interval

        ranked = [score for score in self.scores if score.higher_is_better]
        intervals = [score.interval95 for score in ranked]
        known = [interval for interval in intervals if interval is not None]
        if not ranked or len(known) < len(ranked):
            return None
        bounds = [tuple(map(score.from_chance, each)) for score, each in zip(ranked, known, strict=True)]
        return average_interval([score.normalised for score in ranked], [(low, high) for low, high in bounds])

    def seconds_of(self, task: str) -> float | None:
        """Seconds of a task; None if unknown."""
        names = [score.task for score in self.scores]
        return dict(zip(names, self.task_seconds, strict=False)).get(task)

    @property
    def board(self) -> str:
        """Ranking key, 16 hex: models with equal keys are ranked together, whichever machine measured them.

        It covers the questions, lm-eval's version, dtype, chat mode, seed and limit; not the device and the other
        libraries, whose numbers differ by rounding only.
        """
        here = self.environment
        rule = [self.suite_digest, here.lm_eval, here.dtype, here.chat_template, here.seed, here.limit, here.backend]
        rule += [here.softmax_dtype, here.generation]
        if here.dtype != "float32" and here.reading != WHOLE:
            rule += [here.reading]
        return hashlib.sha256(json.dumps(rule).encode()).hexdigest()[:16]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelEvaluation:
        """The inverse of `as_dict`; raises KeyError or TypeError for anything else."""

        def read(rows: Sequence[Mapping[str, Any]]) -> tuple[Score, ...]:
            return tuple(Score(**{**row, "data": TaskData(**row["data"]) if row.get("data") else None}) for row in rows)

        parts = {
            "scores": read(values["scores"]),
            "others": read(values.get("others", ())),
            "environment": Environment(**values["environment"]),
            "task_seconds": tuple(values.get("task_seconds", ())),
            "loaded": Loaded.from_dict(values["loaded"]) if values.get("loaded") else None,
            "cut": tuple(Cut(**each) for each in values.get("cut", ())),
        }
        return cls(**{**values, **parts})


_WORDS = {
    "device": "on {}",
    "dtype": "in {}",
    "batch_size": "in batches of {}",
    "seed": "with seed {}",
    "limit": "with {} samples per task",
    "backend": "by {}",
    "softmax_dtype": "with a softmax in {}",
    "generation": "under {} generation settings",
    "reading": "reading {}",
}


def differences(first: ModelEvaluation, second: ModelEvaluation) -> tuple[str, ...]:
    """Differences that forbid a comparison, a clause each: "in float32 and in bfloat16". Empty if comparable."""
    found = []
    if first.suite_digest != second.suite_digest:
        found.append(f"on suite {first.suite} and on {second.suite}, which are not the same questions")
    here, there = asdict(first.environment), asdict(second.environment)
    for name, value in here.items():
        other = there[name]
        if name == "device":
            value, other = str(value).partition(":")[0], str(other).partition(":")[0]
        if value == other or (name == "reading" and here["dtype"] == there["dtype"] == "float32"):
            continue
        if name == "chat_template":
            modes = ("with its chat template", "as plain text")
            found.append(" and ".join(modes if value else reversed(modes)))
        else:
            words = _WORDS.get(name, f"with {name} {{}}")
            found.append(f"{words.format(_shown(value))} and {words.format(_shown(other))}")
    return (*found, *_moved(first, second))


def require_comparable(evaluations: Mapping[str, ModelEvaluation]) -> None:
    """Refuse to compare models that were evaluated differently. Raises NOT_COMPARABLE."""
    names = list(evaluations)
    for name in names[1:]:
        first, second = evaluations[names[0]], evaluations[name]
        found = differences(first, second)
        if found:
            next_step = "Evaluate both again under the same settings."
            if found == _moved(first, second):  # under the same conditions what is stored is the answer
                stored = f"results/{first.key[:12]}… and results/{second.key[:12]}…"
                next_step = f"Remove the one on older data from the stored evaluations, {stored}, and measure again."
            raise EvaluationError(
                "NOT_COMPARABLE",
                f"{names[0]} and {name} cannot be compared: they were measured {'; '.join(found)}.",
                next_step,
            )


def _moved(first: ModelEvaluation, second: ModelEvaluation) -> tuple[str, ...]:
    """The clause on tasks whose data were of another commit, if there are such."""
    data = {score.task: score.data for score in second.scores}
    moved = [score.task for score in first.scores if data.get(score.task, score.data) != score.data]
    return (f"on different versions of the data of {', '.join(moved)}",) if moved else ()


def _shown(value: object) -> str:
    return "all" if value is None else str(value)
