"""Evaluation section of a model card in Markdown: scores, comparison with the parents, sanity checks."""

from __future__ import annotations

from collections.abc import Sequence

from bot.jobs.job import Evaluation, Job
from bot.publishing import messages
from bot.publishing.markdown import code, listed, plain, table
from evaluators import sanity_check
from evaluators.comparison import report
from evaluators.comparison.remarks import remarks
from evaluators.harness.scores import Score

PICTURE = "results/comparison.svg"


def headline(job: Job) -> str:
    """The point of the merge in one sentence."""
    assert job.evaluation is not None
    if job.evaluation.comparison is None:
        return "" if job.evaluation.not_compared else _keeping_up(job.evaluation)
    return report.headline(job.evaluation.comparison, _name)


def _name(model: str) -> str:
    return code(report.short(model))


def _keeping_up(evaluation: Evaluation) -> str:
    """Tasks in which the merge is within two standard errors of its best source."""
    if evaluation.merged is None:
        return ""
    kept: list[str] = []
    lost: list[str] = []
    for score in (score for score in evaluation.merged.scores if score.higher_is_better):
        rivals = [report.score_of(each, score.task) for each in evaluation.sources.values()]
        best = max((rival for rival in rivals if rival is not None), key=lambda rival: rival.value, default=None)
        if best is None:
            continue
        spread = 2 * ((score.stderr or 0.0) ** 2 + (best.stderr or 0.0) ** 2) ** 0.5
        (lost if score.value < best.value - spread else kept).append(code(score.task))
    told = []
    if kept:
        told.append(f"within two standard errors of its best source, or above, on {report.joined(kept)}")
    if lost:
        told.append(f"below its best source on {report.joined(lost)}")
    return f"It is {'; it is '.join(told)}." if told else ""


# -- scores ------------------------------------------------------------------------------------------------------


def scores(job: Job, repo: str) -> str:
    """The merge and its sources, task by task, each number with its interval."""
    assert job.evaluation is not None
    merged = job.evaluation.merged
    if merged is None:
        return messages.NOT_MEASURED
    models = {"": merged, **job.evaluation.sources}
    found = report.scores(models, job.evaluation.comparison)
    titles = ["model", *(code(row.title) if row.is_task else row.title for row in found)]
    rows = [
        [_name(name) if name else f"**{code(repo)}**", *(str(row.figures[name]) for row in found)] for name in models
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
    told = ""
    for count, tasks in by_count.items():
        unit = "" if told else " samples"
        told += f", {count:,}{unit}{' each' if len(tasks) > 1 else ''} of {listed(tasks)}"
    return told


# -- against the parents -----------------------------------------------------------------------------------------


def against_parents(job: Job, repo: str, *, pictured: bool) -> list[str]:
    """Comparison with the parents, or the reason for its absence; empty without either."""
    assert job.evaluation is not None
    found = job.evaluation.comparison
    title = "## Against its parents"
    if found is None:
        return [title, plain(job.evaluation.not_compared)] if job.evaluation.not_compared else []
    sections = [title, f"![{_alone(repo)} beside its parents]({PICTURE})" if pictured else ""]
    rows = [_row(row) for row in report.differences(found)]
    sections.append(table(("task", "parent", "the merge is", "difference", "p", "detectable"), rows, words=3))
    sections.append(report.legend(found))
    sections.append("\n".join(f"- {line}" for line in report.inherited(found, _name)))
    sections += report.left_out(found, code, plain)
    return [section for section in sections if section]


def _alone(repo: str) -> str:
    return plain(repo.partition("/")[2])


def _row(row: report.DifferenceRow) -> list[str]:
    return [
        code(row.title) if row.is_task else row.title,
        _name(row.parent),
        row.outcome.value,
        str(row.difference),
        row.p,
        row.detectable,
    ]


# -- vitals ------------------------------------------------------------------------------------------------------


def first_look(job: Job) -> list[str]:
    """Sanity checks, the merge first; empty without any."""
    assert job.evaluation is not None
    found = job.evaluation.vitals
    if not found:
        return []
    rows = [[_name(name) if name else "this merge", *sanity_check.cells(each)] for name, each in found.items()]
    return ["## Sanity check", table(["model", *sanity_check.COLUMNS], rows), messages.FIRST_LOOK]
