"""Evaluation section of a model card in Markdown: scores, comparison with the parents, sanity checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bot.jobs.job import Evaluation
from bot.publishing import messages
from bot.publishing.markdown import code, listed, plain, table
from evaluators import sanity_check
from evaluators.comparison import report
from evaluators.comparison.remarks import remarks
from evaluators.harness.scores import Score

PICTURE = "results/comparison.svg"


def headline(evaluation: Evaluation) -> str:
    """The result of the merge in one sentence."""
    if evaluation.comparison is None:
        return "" if evaluation.not_compared else _beside_best_source(evaluation)
    return report.headline(evaluation.comparison, _name)


def _name(model: str) -> str:
    return code(report.short(model))


def _beside_best_source(evaluation: Evaluation) -> str:
    """Tasks on which the merge is within two standard errors of its best source."""
    if evaluation.merged is None:
        return ""
    kept: list[str] = []
    lost: list[str] = []
    for score in (score for score in evaluation.merged.scores if score.higher_is_better):
        others = [report.score_of(each, score.task) for each in evaluation.sources.values()]
        best = max((other for other in others if other is not None), key=lambda other: other.value, default=None)
        if best is None:
            continue
        spread = 2 * ((score.stderr or 0.0) ** 2 + (best.stderr or 0.0) ** 2) ** 0.5
        (lost if score.value < best.value - spread else kept).append(code(score.task))
    clauses = []
    if kept:
        clauses.append(f"within two standard errors of its best source, or above, on {report.joined(kept)}")
    if lost:
        clauses.append(f"below its best source on {report.joined(lost)}")
    return f"It is {'; it is '.join(clauses)}." if clauses else ""


# -- scores ------------------------------------------------------------------------------------------------------


def scores(evaluation: Evaluation, repo: str) -> str:
    """The merge and its sources, task by task, each number with its interval."""
    merged = evaluation.merged
    if merged is None:
        return messages.NOT_MEASURED
    models = {"": merged, **evaluation.sources}
    columns = report.scores(models, evaluation.comparison)
    titles = ["model", *(code(each.title) if each.is_task else each.title for each in columns)]
    rows = [
        [_name(name) if name else f"**{code(repo)}**", *(str(each.figures[name]) for each in columns)]
        for name in models
    ]
    environment = merged.environment
    below = (
        f"Percent, with 95 % intervals; suite {code(merged.suite)}"
        + _samples(merged.scores)
        + f"; lm-eval {environment.lm_eval}, {environment.dtype} on {environment.device}, "
        f"{'with' if environment.chat_template else 'no'} chat template, seed {environment.seed}. "
        f"Evaluated under {environment.generation} generation settings, softmax in {environment.softmax_dtype}."
    )
    notes = remarks(models, lambda name: _name(name) if name else code(repo), plain)
    return "\n\n".join([table(titles, rows), below, *(["\n".join(f"- {each}" for each in notes)] if notes else [])])


def _samples(scores: Sequence[Score]) -> str:
    """Samples per task: `, 40 samples each of a and b, 100 of c`."""
    by_count: dict[int, list[str]] = {}
    for score in scores:
        by_count.setdefault(score.samples, []).append(score.task)
    counts = ""
    for count, tasks in by_count.items():
        unit = "" if counts else " samples"
        counts += f", {count:,}{unit}{' each' if len(tasks) > 1 else ''} of {listed(tasks)}"
    return counts


# -- against the parents -----------------------------------------------------------------------------------------


def against_parents(evaluation: Evaluation, repo: str, *, pictured: bool) -> list[str]:
    """Comparison with the parents, or the reason for its absence; empty without either."""
    comparison = evaluation.comparison
    title = "## Against its parents"
    if comparison is None:
        return [title, plain(evaluation.not_compared)] if evaluation.not_compared else []
    rows = [_row(row) for row in report.differences(comparison)]
    sections = [
        title,
        f"![{plain(repo.partition('/')[2])} beside its parents]({PICTURE})" if pictured else "",
        table(("task", "parent", "the merge is", "difference", "p", "detectable"), rows, words=3),
        report.legend(comparison),
        "\n".join(f"- {line}" for line in report.inherited(comparison, _name)),
        *report.left_out(comparison, code, plain),
    ]
    return [section for section in sections if section]


def _row(row: report.DifferenceRow) -> list[str]:
    return [
        code(row.title) if row.is_task else row.title,
        _name(row.parent),
        row.outcome.value,
        str(row.difference),
        row.p,
        row.detectable,
    ]


# -- sanity checks -----------------------------------------------------------------------------------------------


def sanity_checks(checks: Mapping[str, sanity_check.SanityCheck]) -> list[str]:
    """Sanity checks, the merge first; empty without any."""
    if not checks:
        return []
    rows = [[_name(name) if name else "this merge", *sanity_check.cells(each)] for name, each in checks.items()]
    return ["## Sanity check", table(["model", *sanity_check.COLUMNS], rows), messages.FIRST_LOOK]
