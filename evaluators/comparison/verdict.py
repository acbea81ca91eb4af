"""What comparing a merge with its parents found: facts to store, and the words for them.

A difference is always merge minus parent, turned so that more is better, as a fraction (0.01 is one point). Each
interval is the 95 % interval of its own number; whether a difference was shown is decided after correcting for how
many were looked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
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
    """The merge minus one parent, paired by question.

    `p` is of this difference alone; `adjusted_p` is corrected for all differences of its kind. `detectable` is the
    smallest true difference that would have been shown in four of five such measurements. `won` questions only the
    merge has right, `lost` only the parent (None where answers are not right or wrong).
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
        """A difference is shown where the corrected test and the interval both say so."""
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
    """A task that is scored but not compared; `because` is half a sentence."""

    task: str
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

    @property
    def parents(self) -> tuple[str, ...]:
        return tuple(name for name in self.keys if name)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Comparison:
        """The inverse of `as_dict`; raises ValueError for anything else."""
        return _read(values)


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Comparison)


def _read(values: Mapping[str, Any]) -> Comparison:
    made: Comparison = _adapter().validate_python(values)
    return made


# -- words -------------------------------------------------------------------------------------------------------

Show = Callable[[str], str]


def short(name: str) -> str:
    """A parent's name without the commit it is pinned to."""
    return name.partition("@")[0]


def words(differences: Sequence[Difference], show: Show = str) -> str:
    """`better than both`, `better than A, no difference to B shown (a difference under 8.2 points ...)`, and so on.

    `show` makes a parent's name safe for the place it stands in.
    """
    found = {outcome: [each for each in differences if each.outcome is outcome] for outcome in Outcome}
    said = []
    for outcome, start in ((Outcome.BETTER, "better than"), (Outcome.WORSE, "worse than")):
        if found[outcome]:
            said.append(f"{start} {_whom(found[outcome], len(differences), show)}")
    if unseen := found[Outcome.NOT_SHOWN]:
        everywhere = len(unseen) == len(differences) > 1
        to = "" if everywhere else f" to {_whom(unseen, len(differences), show)}"
        said.append(f"no difference{to} shown ({_unseen(max(each.detectable for each in unseen))})")
    return ", ".join(said)


def _whom(some: Sequence[Difference], of: int, show: Show) -> str:
    if len(some) == of > 1:
        return "both" if of == 2 else f"all {of}"
    return joined([show(short(each.parent)) for each in some])


def _unseen(detectable: float) -> str:
    if detectable >= 1:
        return "there are too few questions to show any"
    return f"a difference under {100 * detectable:.1f} points could not have been seen"


def inheritance(patterns: Sequence[Pattern], show: Show = str) -> tuple[str, ...]:
    """Whose answers the merge gives, a sentence for each kind of question that occurred."""
    total: dict[tuple[str, ...], tuple[int, int]] = {}
    for each in patterns:
        questions, kept = total.get(each.right, (0, 0))
        total[each.right] = questions + each.questions, kept + each.kept
    parents = max((len(right) for right in total), default=0)
    lines = []
    for right, (questions, kept) in sorted(total.items(), key=lambda item: -len(item[0])):
        if questions:
            lines.append(f"Where {_who(right, parents, show)}, the merge is right on {kept} of {questions}.")
    return tuple(lines)


def _who(right: tuple[str, ...], parents: int, show: Show) -> str:
    if not right:
        return "no parent is right" if parents > 1 else "its parent is wrong"
    if len(right) == parents:
        return {1: "its parent is right", 2: "both parents are right"}.get(parents, "all parents are right")
    return f"only {joined([show(short(name)) for name in right])} {'is' if len(right) == 1 else 'are'} right"


def joined(names: Sequence[str]) -> str:
    """`A`, `A and B`, `A, B and C`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
