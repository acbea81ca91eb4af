"""Results of an evaluation as rows of figures and as sentences, drawn by card, job page and command line.

Text is not escaped here: callers pass `show`, which shortens and escapes a model's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from evaluators.comparison.verdict import Comparison, Difference, Outcome, Pattern, TaskVerdict
from evaluators.figures import number
from evaluators.harness.scores import ModelEvaluation, Score
from evaluators.paired import Interval

Show = Callable[[str], str]
MISSING = "\N{EN DASH}"


@dataclass(frozen=True, slots=True)
class Terms:
    """Words for the evaluated model and for those it is compared with."""

    merge: str = "the merge"
    others: str = "its parents"
    other: str = "parent"


MERGED = Terms()


def short(name: str) -> str:
    """A parent's name without the commit it is pinned to."""
    return name.partition("@")[0]


# -- rows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Figure:
    """A number and its 95 % interval as text; "" without an interval."""

    value: str
    interval: str = ""

    def __str__(self) -> str:
        """`97.5 (87.1 to 99.6)`."""
        return f"{self.value} ({self.interval})" if self.interval else self.value


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """A task, or an average over tasks (`is_task` false); `figures` by model, the merge's first."""

    title: str
    about: str
    figures: Mapping[str, Figure]
    is_task: bool = True


@dataclass(frozen=True, slots=True)
class DifferenceRow:
    """Difference of the merge to one parent on a task or on average, in points.

    `p` is corrected; `detectable` is the difference that would have been shown in four of five such measurements, a
    dash if a difference was shown.
    """

    title: str
    parent: str
    outcome: Outcome
    difference: Figure
    p: str
    detectable: str
    is_task: bool = True


def scores(models: Mapping[str, ModelEvaluation], comparison: Comparison | None) -> list[ScoreRow]:
    """Tasks of the first model and the averages; `models` by the names in `comparison`.

    Intervals are those of the comparison if there is one, else each score's own.
    """
    first = next(iter(models.values()))
    rows = [ScoreRow(score.task, _about(score), _of_task(score, models, comparison)) for score in first.scores]
    whole = comparison.overall if comparison else None
    if whole is not None and len(whole.tasks) > 1:
        known = {each.model: _figure(each.value, each.interval) for each in (whole.merge, *whole.parents)}
        figures = {name: known.get(name, Figure(MISSING)) for name in models}
        rows.append(ScoreRow(_average_of(len(whole.tasks)), "", figures, is_task=False))
    from_chance = any(score.chance is not None for score in first.scores)
    if len(first.scores) > 1 and (from_chance or whole is None):
        figures = {
            name: Figure(MISSING) if each.average is None else _figure(each.average, each.average_interval95)
            for name, each in models.items()
        }
        ranked = sum(score.higher_is_better for score in first.scores)
        rows.append(ScoreRow("average from chance" if from_chance else _average_of(ranked), "", figures, is_task=False))
    return rows


def _about(score: Score) -> str:
    """`acc_norm, 25-shot, 1,172 questions`."""
    kind = "" if score.filter == "none" else f", {score.filter}"
    shots = f", {score.few_shot}-shot" if score.few_shot else ""
    return f"{score.metric}{kind}{shots}, {score.samples:,} questions"


def _of_task(score: Score, models: Mapping[str, ModelEvaluation], comparison: Comparison | None) -> dict[str, Figure]:
    known: dict[str, tuple[float, Interval | None]] = {
        each.model: (each.value, each.interval)
        for task in (comparison.tasks if comparison else ())
        if task.task == score.task
        for each in (task.merge, *task.parents)
    }
    for name, evaluation in models.items():
        if name not in known and (own := score_of(evaluation, score.task)) is not None:
            known[name] = own.value, own.interval95
    # Bits per byte may lie below 1 without being a share; all figures of a task have one unit.
    share = score.higher_is_better and all(0 <= value <= 1 for value, _ in known.values())
    return {name: _figure(*known[name], share=share) if name in known else Figure(MISSING) for name in models}


def is_share(task: TaskVerdict) -> bool:
    """Return whether a task's scores are shares of 100 %, so that differences are points.

    Lower-is-better metrics are not shares: their differences are turned round.
    """
    if not all(0 <= each.value <= 1 for each in (task.merge, *task.parents)):
        return False
    pairs = zip(task.differences, task.parents, strict=False)
    return all(each.value * (task.merge.value - parent.value) >= 0 for each, parent in pairs)


def _average_of(tasks: int) -> str:
    return f"average of {tasks} tasks"


def score_of(evaluation: ModelEvaluation, task: str) -> Score | None:
    """The score the suite ranks `task` by."""
    return next((score for score in evaluation.scores if score.task == task), None)


def _figure(value: float, interval: Interval | None, *, share: bool = True, signed: bool = False) -> Figure:
    texts = [_number(each, share, signed=signed) for each in (value, *(interval or ()))]
    return Figure(texts[0], " to ".join(texts[1:]))


def _number(value: float, share: bool, *, signed: bool = False) -> str:
    """A value in percent or points, or in the metric's own unit if it is not a share."""
    return f"{100 * value:{'+' if signed else ''}.1f}" if share else number(value, signed=signed)


def differences(comparison: Comparison) -> list[DifferenceRow]:
    """Every task against every parent, then the average."""
    rows = [_difference(task.task, each, is_share(task)) for task in comparison.tasks for each in task.differences]
    whole = comparison.overall
    if whole is not None and len(whole.tasks) > 1:
        rows += [_difference(_average_of(len(whole.tasks)), each, is_task=False) for each in whole.differences]
    return rows


def _difference(title: str, paired: Difference, share: bool = True, *, is_task: bool = True) -> DifferenceRow:
    figure = _figure(paired.value, paired.interval, share=share, signed=True)
    p = "< 0.001" if paired.adjusted_p < 0.001 else f"{paired.adjusted_p:.3f}"
    detectable = MISSING
    if paired.outcome is Outcome.NOT_SHOWN:
        detectable = "none" if _none_is(paired.detectable, share) else _number(paired.detectable, share)
    return DifferenceRow(title, paired.parent, paired.outcome, figure, p, detectable, is_task)


def _none_is(detectable: float, share: bool) -> bool:
    """Return whether no difference could have been shown, since shares differ by 1 at most."""
    return detectable >= (1 if share else math.inf)


# -- sentences ---------------------------------------------------------------------------------------------------


def headline(comparison: Comparison, show: Show = short, terms: Terms = MERGED) -> str:
    """Overall result in one sentence; "" if nothing can be averaged."""
    whole = comparison.overall
    if whole is None or not whole.differences:
        return ""
    over = f"on average over {len(whole.tasks)} tasks" if len(whole.tasks) > 1 else f"on {show(whole.tasks[0])}"
    return f"Against {terms.others}, {over}: {words(whole.differences, show)}."


def legend(comparison: Comparison, terms: Terms = MERGED) -> str:
    """Meaning of the columns of `differences`."""
    whole = comparison.overall.differences if comparison.overall else ()
    every = [each for task in comparison.tasks for each in task.differences] + list(whole)
    tests = ", ".join(sorted({each.test for each in every}))
    averaged = " Averages count every task the same; their figures are of the averages, not of a task."
    unit = "in points" if all(map(is_share, comparison.tasks)) else "in points or in the metric's own unit"
    return (
        f"Difference: {terms.merge} minus the {terms.other} on the same questions, {unit}, with its 95 % interval. "
        f"p ({tests}) is corrected for the number of comparisons (Holm); better and worse require both to agree. "
        "Not shown does not mean equal: a true difference under the detectable one would be missed in more than one "
        "of five such measurements." + averaged * (comparison.overall is not None and len(comparison.overall.tasks) > 1)
    )


def words(differences: Sequence[Difference], show: Show = short, *, brief: bool = False, share: bool = True) -> str:
    """`better than both`, `better than A, no difference to B shown (a true one under 8.2 points ...)`, and so on.

    `brief` leaves the explanation of the detectable difference to the legend; `share` says whether `is_share` holds.
    """
    by_outcome = {outcome: [each for each in differences if each.outcome is outcome] for outcome in Outcome}
    clauses = [
        f"{outcome.value} than {_whom(by_outcome[outcome], len(differences), show)}"
        for outcome in (Outcome.BETTER, Outcome.WORSE)
        if by_outcome[outcome]
    ]
    if unseen := by_outcome[Outcome.NOT_SHOWN]:
        everywhere = len(unseen) == len(differences) > 1
        to = "" if everywhere else f" to {_whom(unseen, len(differences), show)}"
        clauses.append(f"no difference{to} shown ({_unseen([each.detectable for each in unseen], brief, share)})")
    return ", ".join(clauses)


def _whom(some: Sequence[Difference], of: int, show: Show) -> str:
    if len(some) == of > 1:
        return "both" if of == 2 else f"all {of}"
    return joined([show(each.parent) for each in some])


def _unseen(detectable: Sequence[float], brief: bool, share: bool) -> str:
    if _none_is(min(detectable), share):
        return "there are too few questions to show any"
    least, most = (_number(min(1.0, each) if share else each, share) for each in (min(detectable), max(detectable)))
    points = (least if least == most else f"{least} to {most}") + " points" * share
    if brief:
        return f"detectable: {points}"
    points += "" if least == most else ", by model,"
    return f"a true one under {points} would be missed in more than one of five such measurements"


def inherited(comparison: Comparison, show: Show = short, terms: Terms = MERGED) -> list[str]:
    """Agreement of the merge's answers with each parent's, over all tasks."""
    lines = list(inheritance([each for task in comparison.tasks for each in task.patterns], show, terms))
    for name in comparison.parents:
        known = [task for task in comparison.tasks if name in task.same_choice]
        questions, same = sum(task.samples for task in known), sum(task.same_choice[name] for task in known)
        if questions:
            lines.append(f"Same answer as {show(name)}, right or wrong: {same} of {questions} questions.")
    return lines


def inheritance(patterns: Sequence[Pattern], show: Show = short, terms: Terms = MERGED) -> tuple[str, ...]:
    """A sentence for each kind of question that occurred."""
    total: dict[tuple[str, ...], tuple[int, int]] = {}
    for each in patterns:
        questions, kept = total.get(each.right, (0, 0))
        total[each.right] = questions + each.questions, kept + each.kept
    parents = max((len(right) for right in total), default=0)
    return tuple(
        f"Where {_who(right, parents, show, terms)}, {terms.merge} is right on {kept} of {questions}."
        for right, (questions, kept) in sorted(total.items(), key=lambda item: -len(item[0]))
        if questions
    )


def _who(right: tuple[str, ...], parents: int, show: Show, terms: Terms) -> str:
    if not right:
        return f"no {terms.other} is right" if parents > 1 else f"the {terms.other} is wrong"
    if len(right) == parents:
        return (
            f"the {terms.other} is right"
            if parents == 1
            else f"{'both' if parents == 2 else 'all'} {terms.other}s are right"
        )
    return f"only {joined([show(name) for name in right])} {'is' if len(right) == 1 else 'are'} right"


def left_out(comparison: Comparison, show: Show = short, escape: Show = str) -> list[str]:
    """Reasons for scored tasks and parents that are not compared; `escape` escapes the reason."""
    parents = [f"{show(each.parent)} is not compared: it {each.because}." for each in comparison.not_alike]
    return [*parents, *(f"{show(each.task)} is not compared: {escape(each.because)}." for each in comparison.left_out)]


def joined(names: Sequence[str]) -> str:
    """`A`, `A and B`, `A, B and C`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
