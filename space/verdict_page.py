"""Page of an evaluation: scores with intervals, comparison with the parents, sanity checks."""

from __future__ import annotations

from bot.jobs.job import Evaluation
from bot.publishing import messages
from evaluators import sanity_check
from evaluators.comparison import report
from evaluators.comparison.remarks import remarks
from evaluators.comparison.verdict import Comparison, Outcome
from evaluators.harness.scores import ModelEvaluation
from evaluators.pictures.score_figure import score_figure
from space.markup import Markup, join, tag
from space.pieces import picture, rows_table


def evaluation(found: Evaluation | None, name: str) -> Markup | None:
    """Page of `found`, the evaluation of the merge called `name`; None if nothing was measured."""
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
    sentence, drawn = report.headline(found.comparison), score_figure(found.comparison, name)
    shown = picture(drawn, f"{name} beside its parents") if drawn else None
    return join([tag("p", sentence, class_="verdict") if sentence else None, shown])


def _scores(found: Evaluation, merged: ModelEvaluation) -> Markup:
    """The merge beside its sources, task by task."""
    models = {"": merged, **found.sources}
    rows = [
        _row(_title(row), [str(row.figures[name]) for name in models], None if row.is_task else "total")
        for row in report.scores(models, found.comparison)
    ]
    taken = merged.environment
    config = f"lm-eval {taken.lm_eval} on {taken.device} in {taken.dtype}; percent with 95\u00a0% intervals."
    titles = ("Task", "This merge", *(report.short(name) for name in found.sources))
    notes = remarks(models, lambda name: report.short(name) or "This merge")
    return join(
        [
            rows_table(titles, rows),
            tag("p", config, class_="fine"),
            tag("ul", [tag("li", line) for line in notes], class_="notes") if notes else None,
        ]
    )


def _title(row: report.ScoreRow | report.DifferenceRow) -> str:
    return row.title if row.is_task else row.title.capitalize()


def _row(task: str, cells: list[str], class_: str | None = None) -> Markup:
    return tag("tr", tag("th", task, scope="row"), [tag("td", cell, class_="number") for cell in cells], class_=class_)


def _against(found: Comparison) -> Markup:
    """All differences, then the agreement of answers."""
    titles = ("Task", "Against", "The merge is", "Difference", "p", "Detectable")
    lines = report.inherited(found)
    return join(
        [
            tag("h3", "Against its parents"),
            rows_table(titles, [_difference(row) for row in report.differences(found)]),
            tag("p", report.legend(found), class_="fine"),
            tag("ul", [tag("li", line) for line in lines], class_="notes") if lines else None,
            [tag("p", line, class_="fine") for line in report.left_out(found)],
        ]
    )


def _difference(row: report.DifferenceRow) -> Markup:
    shown = row.outcome is not Outcome.NOT_SHOWN
    return tag(
        "tr",
        tag("th", _title(row), scope="row"),
        tag("td", report.short(row.parent)),
        tag("td", tag("b", row.outcome.value) if shown else row.outcome.value),
        tag("td", str(row.difference), class_="number"),
        tag("td", row.p, class_="number"),
        tag("td", row.detectable, class_="number"),
    )


def _vitals(found: Evaluation) -> Markup | None:
    if not found.vitals:
        return None
    rows = [
        _row(report.short(name) or "This merge", list(sanity_check.cells(each))) for name, each in found.vitals.items()
    ]
    titles = ("Model", *(title[0].upper() + title[1:] for title in sanity_check.COLUMNS))
    return join([tag("h3", "Sanity check"), rows_table(titles, rows), tag("p", messages.FIRST_LOOK, class_="fine")])
