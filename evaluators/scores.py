"""What an evaluation found: scores with their standard errors, and the environment they were taken in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class TaskData:
    """The data a task was asked from: a dataset repo, its configuration and split, and the commit that was read."""

    repo: str
    config: str | None
    split: str | None
    revision: str | None


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one task. Fractions stay fractions; `stderr` is None where the harness gives none.

    `filter` is lm-eval's name for the way an answer was cut out of the model's text ("none" for multiple choice).
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


@dataclass(frozen=True, slots=True)
class Environment:
    """Everything that must be equal before two scores are compared."""

    device: str
    dtype: str
    batch_size: str
    chat_template: bool
    seed: int
    lm_eval: str
    transformers: str
    torch: str
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class ModelEvaluation:
    """One model's scores on one suite. Only equal `suite_digest`s and environments are compared.

    `scores` holds the one metric of each task that the suite ranks by, in the suite's order; `others` every other
    metric that lm-eval computed on the way. `key` names the stored result: the model's content, the suite and every
    setting (64 hex).
    """

    suite: str
    suite_digest: str
    scores: tuple[Score, ...]
    environment: Environment
    seconds: float
    others: tuple[Score, ...] = ()
    key: str = ""

    @property
    def average(self) -> float | None:
        """Mean of the primary scores (higher is better ones), None without any."""
        values = [score.value for score in self.scores if score.higher_is_better]
        return sum(values) / len(values) if values else None

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
        }
        return cls(**{**values, **parts})
