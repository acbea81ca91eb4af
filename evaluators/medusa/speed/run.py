"""A speed test on its way: what was asked for, how its time is shared, what it has found so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evaluators.medusa.decoding.runners import Runner
from evaluators.medusa.decoding.static_runner import fastest
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.speed.document import Report
from evaluators.medusa.speed.transfer import Given
from evaluators.medusa.trees.tree import Tree

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Asked:
    """What to time. `questions` prompts of one or two turns, each answered with up to `max_new_tokens` tokens.

    A given `tree` is timed as it is; without one each set of heads gets the one that promises most.
    """

    questions: int = 8
    max_new_tokens: int = 48
    turns: int = 1
    repeats: int = 1
    given: Sequence[Given] = ()
    dtype: str = "auto"
    tree: Tree | None = None
    runner: Callable[[Base], Runner] = fastest


@dataclass(slots=True)
class Run:
    """One measurement on its way."""

    folder: Path
    out: Path
    budget_s: float
    seed: int
    asked: Asked
    progress: Progress
    started: float = field(default_factory=time.monotonic)
    report: Report = field(default_factory=Report)

    @property
    def deadline(self) -> float:
        """The monotonic time at which the budget is spent."""
        return self.started + self.budget_s

    def until(self, share: float) -> float:
        """The monotonic time at which `share` of what loading left of the budget is gone."""
        loaded = self.started + self.report.seconds.get("load", 0.0)
        return float(loaded + share * (self.started + self.budget_s - loaded))

    def named(self, stage: str) -> Callable[[int, int], None]:
        """The progress of one stage."""
        return lambda done, total: self.progress(stage, done, total)

    def stage(self, name: str, began: float) -> float:
        """Note the seconds since `began` as those of stage `name`; returns now."""
        now = time.monotonic()
        self.note(seconds={**self.report.seconds, name: round(now - began, 2)})
        return now

    def note(self, **parts: Any) -> None:
        """Put parts of the report in their places."""
        self.report = replace(self.report, **parts)

    def warn(self, *sentences: str) -> None:
        """Add warnings to the report."""
        self.note(warnings=(*self.report.warnings, *sentences))
