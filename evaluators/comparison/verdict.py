"""Result of a comparison of a merge with its parents: the stored facts. `report` turns them into words.

A difference is always merge minus parent, turned so that more is better, as a fraction (0.01 is one point). Each
interval is the 95 % interval of its own number; whether a difference is shown is decided after correcting for the
number of differences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import cache
from typing import Any

ALPHA = 0.05


class Outcome(StrEnum):
    BETTER = "better"
    WORSE = "worse"
    NOT_SHOWN = "no difference shown"


@dataclass(frozen=True, slots=True)
class Scored:
    """A model's score with its 95 % interval, in the metric's own unit. `model` is "" for the merge."""

    model: str
    value: float
    interval: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Difference:
    """Difference of the merge to one parent, paired by question.

    `p` is of this difference alone; `adjusted_p` is corrected for all differences of its kind. `detectable` is the
    smallest true difference that would have been shown in four of five such measurements. `won` counts questions that
    only the merge has right, `lost` those of only the parent (None for answers that are not right or wrong).
    """

    parent: str
    value: float
    interval: tuple[float, float]
    p: float
    adjusted_p: float
    detectable: float
    test: str
    won: int | None = None
    lost: int | None = None

    @property
    def outcome(self) -> Outcome:
        """Outcome of a difference, which is shown only if both the corrected test and the interval agree."""
        low, high = self.interval
        if self.adjusted_p > ALPHA or low <= 0 <= high:
            return Outcome.NOT_SHOWN
        return Outcome.BETTER if low > 0 else Outcome.WORSE


@dataclass(frozen=True, slots=True)
class Pattern:
    """Of `questions` that exactly the parents in `right` answered right, the merge has `kept` right."""

    right: tuple[str, ...]
    questions: int
    kept: int


@dataclass(frozen=True, slots=True)
class TaskVerdict:
    """One task. `same_choice` counts the questions on which merge and parent gave the same answer, right or wrong, for
    parents whose answers were kept."""

    task: str
    metric: str
    samples: int
    chance: float | None
    merge: Scored
    parents: tuple[Scored, ...]
    differences: tuple[Difference, ...]
    patterns: tuple[Pattern, ...]
    same_choice: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Overall:
    """The mean over `tasks`, each of them counting the same."""

    tasks: tuple[str, ...]
    merge: Scored
    parents: tuple[Scored, ...]
    differences: tuple[Difference, ...]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A scored task that is not compared; `because` is a clause."""

    task: str
    because: str


@dataclass(frozen=True, slots=True)
class NotAlike:
    """A parent that is not compared, as its prompts differ from the merge's; `because` is half a sentence."""

    parent: str
    because: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """A merge beside its parents on one suite; `keys` name the stored evaluations by model ("" is the merge)."""

    suite: str
    suite_digest: str
    keys: Mapping[str, str]
    tasks: tuple[TaskVerdict, ...]
    overall: Overall | None
    left_out: tuple[LeftOut, ...] = ()
    not_alike: tuple[NotAlike, ...] = ()

    @property
    def parents(self) -> tuple[str, ...]:
        return tuple(name for name in self.keys if name)

    def named(self, merge: str) -> Comparison:
        """The same comparison with a name for the merge."""

        def called(scored: Scored) -> Scored:
            return replace(scored, model=merge)

        return replace(
            self,
            keys={name or merge: key for name, key in self.keys.items()},
            tasks=tuple(replace(task, merge=called(task.merge)) for task in self.tasks),
            overall=None if self.overall is None else replace(self.overall, merge=called(self.overall.merge)),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Comparison:
        """The inverse of `as_dict`; raises ValueError for anything else."""
        comparison: Comparison = _adapter().validate_python(values)
        return comparison


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Comparison)
