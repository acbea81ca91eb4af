"""What an evaluation found, on a page: scores with intervals, the verdict against the parents, the first look."""

from __future__ import annotations

from collections.abc import Mapping

from bot import findings, messages
from bot.job import Evaluation
from evaluators import vitals
from evaluators.comparison import verdict
from evaluators.comparison.verdict import Comparison, Difference, Outcome, Scored
from evaluators.harness.scores import ModelEvaluation
from evaluators.pictures.score_figure import figure
from space import words
from space.markup import Markup, join, tag
from space.pieces import picture, rows_table


def evaluation(found: Evaluation | None, name: str) -> Markup | None:
    """Everything about `found`, the evaluation of the merge called `name`; None where nothing was measured."""
    if found is None or found.merged is None:
        return None
    return join(
        [
            tag("h3", "Evaluation"),
            _verdict(found, name),
            _scores(found, found.merged),
            _against(found.comparison) if found.comparison else None,
            _vitals(found),
        ]
    )


def _verdict(found: Evaluation, name: str) -> Markup | None:
    """The sentence first, then the picture."""
    if found.comparison is None:
        return tag("p", found.not_compared, class_="fine") if found.not_compared else None
    said, drawn = findings.said(found.comparison, str), figure(found.comparison, name)
    shown = picture(drawn, f"{name} beside its parents") if drawn else None
    return join([tag("p", said, class_="verdict") if said else None, shown])


def _scores(found: Evaluation, merged: ModelEvaluation) -> Markup:
    """The merge beside its sources, task by task."""
    columns = {"": merged, **found.sources}
    rows = [_row(score.task, [_cell(found, name, score.task) for name in columns]) for score in merged.scores]
    averages = [_average(found.comparison, name, each) for name, each in columns.items()]
    rows.append(_row("Average", averages, class_="total"))
    taken, kind = merged.environment, "± one standard error" if found.comparison is None else "with 95\u00a0% intervals"
    told = f"lm-eval {taken.lm_eval} on {taken.device} in {taken.dtype}; percent {kind}."
    titles = ("Task", "This merge", *(verdict.short(name) for name in found.sources))
    return join([rows_table(titles, rows), tag("p", told, class_="fine")])


def _row(task: str, cells: list[str], class_: str | None = None) -> Markup:
    return tag("tr", tag("th", task, scope="row"), [tag("td", cell, class_="number") for cell in cells], class_=class_)


def _cell(found: Evaluation, name: str, task: str) -> str:
    judged = next((each for each in found.comparison.tasks if each.task == task), None) if found.comparison else None
    if judged is not None:
        return _of(name, (judged.merge, *judged.parents))
    score = findings.score_of(found.sources[name] if name else found.merged, task) if found.merged else None
    return words.MISSING if score is None else words.percent(score.value, score.stderr)


def _average(comparison: Comparison | None, name: str, evaluation: ModelEvaluation) -> str:
    if comparison is not None and comparison.overall is not None:
        return _of(name, (comparison.overall.merge, *comparison.overall.parents))
    return words.percent(evaluation.average)


def _of(name: str, models: tuple[Scored, ...]) -> str:
    return next((findings.with_interval(each) for each in models if each.model == name), words.MISSING)


def _against(found: Comparison) -> Markup:
    """Every difference, then whose answers the merge gives."""
    rows = [_difference(task.task, each) for task in found.tasks for each in task.differences]
    if found.overall is not None and len(found.overall.tasks) > 1:
        rows += [_difference("Mean", each) for each in found.overall.differences]
    titles = ("Task", "Against", "The merge is", "Difference", "p", "Seen from")
    told = (
        "Merge minus parent on the same questions in points, with 95\u00a0% intervals; p is corrected for the number "
        "of comparisons. Not shown does not mean equal: a smaller true difference than in the last column would be "
        "missed in more than one of five such measurements."
    )
    lines = verdict.inheritance([each for task in found.tasks for each in task.patterns])
    return join(
        [
            tag("h3", "Against its parents"),
            rows_table(titles, rows),
            tag("p", told, class_="fine"),
            tag("ul", [tag("li", line) for line in lines], class_="notes") if lines else None,
            [tag("p", f"{each.task} is not compared: {each.because}.", class_="fine") for each in found.left_out],
        ]
    )


def _difference(task: str, found: Difference) -> Markup:
    low, high = found.interval
    shown = found.outcome is not Outcome.NOT_SHOWN
    return tag(
        "tr",
        tag("th", task, scope="row"),
        tag("td", verdict.short(found.parent)),
        tag("td", tag("b", found.outcome.value) if shown else found.outcome.value),
        tag("td", f"{100 * found.value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})", class_="number"),
        tag("td", findings.chance(found), class_="number"),
        tag("td", findings.seen_from(found), class_="number"),
    )


def _vitals(found: Evaluation) -> Markup | None:
    signs: Mapping[str, vitals.Vitals] = found.vitals
    if not signs:
        return None
    rows = [_row(verdict.short(name) or "This merge", list(vitals.cells(each))) for name, each in signs.items()]
    titles = ("Model", *(title[0].upper() + title[1:] for title in vitals.COLUMNS))
    return join([tag("h3", "First look"), rows_table(titles, rows), tag("p", messages.FIRST_LOOK, class_="fine")])
