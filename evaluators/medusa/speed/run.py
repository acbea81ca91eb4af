"""Options of the speed test, and the state of a running one: its time budget and the report so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evaluators.medusa.speed.report import Report
from evaluators.medusa.trees.tree import Tree

if TYPE_CHECKING:
    from evaluators.medusa.decoding.runners import Runner
    from evaluators.medusa.model.causal_lm import Base

Progress = Callable[[str, int, int], None]
Origin = Literal["parent", "merged", "fresh"]


@dataclass(frozen=True, slots=True)
class Given:
    """Heads supplied by the caller. Without a `folder` they are a row with a reason (`absent_because`)."""

    id: str
    origin: Origin
    folder: Path | None
    absent_because: str | None = None
    source: str | None = None


@dataclass(frozen=True, slots=True)
class SpeedOptions:
    """Options of one speed test: its questions, its budget, the heads and the tree to time.

    `prompts` (MT-bench layout) replaces the built-in test questions; training prompts that leak from it are dropped.
    The first `questions` of them are used for one or two `turns`, each answered with up to `max_new_tokens` tokens.
    `budget_s` bounds everything from loading to writing; checking texts that differ from the baseline's may take a
    twentieth more. A short budget means less training text and fewer or shorter answers, but at least one question of
    16 tokens, twice as the baseline and twice with the heads.
    `given` heads are compared with those trained here; where some have origin "fresh", none are trained.
    `dtype` is auto, float32, bfloat16 or float16. `tree` is a file with the tree to time (tree_files); without one each
    set of heads gets the tree with the highest predicted gain. `runner` defaults to the fastest one of the device.
    """

    prompts: Path | None = None
    budget_s: float = 60
    questions: int = 8
    max_new_tokens: int = 48
    turns: int = 1
    seed: int = 0
    repeats: int = 1
    device: str = "cpu"
    given: Sequence[Given] = ()
    dtype: str = "auto"
    tree: Path | None = None
    runner: Callable[[Base], Runner] | None = None


@dataclass(slots=True)
class Run:
    """State of one speed test. `tree` is the tree of the options, read from its file."""

    folder: Path
    out: Path
    options: SpeedOptions
    progress: Progress
    tree: Tree | None = None
    started: float = field(default_factory=time.monotonic)
    report: Report = field(default_factory=Report)

    @property
    def deadline(self) -> float:
        """The monotonic time at which the budget ends."""
        return self.started + self.options.budget_s

    def until(self, share: float) -> float:
        """The monotonic time at which `share` of the budget after loading has passed."""
        loaded = self.started + self.report.seconds.get("load", 0.0)
        return loaded + share * (self.deadline - loaded)

    def named(self, stage: str) -> Callable[[int, int], None]:
        """Progress callback of one stage."""
        return lambda done, total: self.progress(stage, done, total)

    def stage(self, name: str, began: float) -> float:
        """Record the seconds since `began` under stage `name`; return the current time."""
        now = time.monotonic()
        self.note(seconds={**self.report.seconds, name: round(now - began, 2)})
        return now

    def note(self, **fields: Any) -> None:
        """Set fields of the report."""
        self.report = replace(self.report, **fields)

    def warn(self, *sentences: str) -> None:
        """Add warnings to the report."""
        self.note(warnings=(*self.report.warnings, *sentences))
