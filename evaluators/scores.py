"""What an evaluation found: scores with their standard errors, and the environment they were taken in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one task. Fractions stay fractions; `stderr` is None where the harness gives none."""

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int
    few_shot: int
    higher_is_better: bool
    task_version: str


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


@dataclass(frozen=True, slots=True)
class ModelEvaluation:
    """One model's scores on one suite. Only equal `suite_digest`s and environments are compared."""

    suite: str
    suite_digest: str
    scores: tuple[Score, ...]
    environment: Environment
    seconds: float

    @property
    def average(self) -> float | None:
        """Mean of the primary scores (higher is better ones), None without any."""
        values = [score.value for score in self.scores if score.higher_is_better]
        return sum(values) / len(values) if values else None
