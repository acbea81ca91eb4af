"""State of a running speed test: its options, the time it may use, the report so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evaluators.medusa.speed.document import Report
from evaluators.medusa.speed.options import SpeedOptions
from evaluators.medusa.trees.tree import Tree

Progress = Callable[[str, int, int], None]


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
        return float(loaded + share * (self.started + self.options.budget_s - loaded))

    def named(self, stage: str) -> Callable[[int, int], None]:
        """Progress callback of one stage."""
        return lambda done, total: self.progress(stage, done, total)

    def stage(self, name: str, began: float) -> float:
        """Record the seconds since `began` under stage `name`; return the current time."""
        now = time.monotonic()
        self.note(seconds={**self.report.seconds, name: round(now - began, 2)})
        return now

    def note(self, **parts: Any) -> None:
        """Set fields of the report."""
        self.report = replace(self.report, **parts)

    def warn(self, *sentences: str) -> None:
        """Add warnings to the report."""
        self.note(warnings=(*self.report.warnings, *sentences))
