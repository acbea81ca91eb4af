"""What an evaluation found, as Markdown: scores, the verdict against the parents, vitals. Pure.

Evaluations from before there was a comparison have scores with standard errors only, and are shown so.
"""

from __future__ import annotations

from collections.abc import Sequence

from bot import messages
from bot.job import Evaluation, Job
from bot.markdown import code, joined, listed, plain, table
from evaluators import vitals
from evaluators.comparison import verdict
from evaluators.comparison.verdict import Comparison, Difference, Outcome, Scored
from evaluators.harness.scores import ModelEvaluation, Score

PICTURE = "results/comparison.svg"
MISSING = "–"


def headline(job: Job) -> str:
    """The point of the merge in one sentence."""
    assert job.evaluation is not None
    if job.evaluation.comparison is None:
        return _keeping_up(job.evaluation)
    return said(job.evaluation.comparison, code)


def said(comparison: Comparison, show: verdict.Show) -> str:
    """The verdict over all tasks in one sentence; `show` makes a parent's name safe where it stands."""
    whole = comparison.overall
    if whole is None or not whole.differences:
        return ""
    over = f"on average over {len(whole.tasks)} tasks" if len(whole.tasks) > 1 else f"on {show(whole.tasks[0])}"
    return f"Against its parents, {over}: {verdict.words(whole.differences, show)}."


def _keeping_up(evaluation: Evaluation) -> str:
    """Where the merge keeps up with its best source, within two standard errors."""
    if evaluation.merged is None:
        return ""
    kept: list[str] = []
    lost: list[str] = []
    for score in evaluation.merged.scores:
        rivals = [score_of(each, score.task) for each in evaluation.sources.values()]
        best = max((rival for rival in rivals if rival is not None), key=lambda rival: rival.value, default=None)
        if best is None:
            continue
        spread = 2 * ((score.stderr or 0.0) ** 2 + (best.stderr or 0.0) ** 2) ** 0.5
        (lost if score.value < best.value - spread else kept).append(code(score.task))
    told = []
    if kept:
        told.append(f"within two standard errors of its best source, or above, on {joined(kept)}")
    if lost:
        told.append(f"below its best source on {joined(lost)}")
    return f"It is {'; it is '.join(told)}." if told else ""


# -- scores ------------------------------------------------------------------------------------------------------


def scores(job: Job, repo: str) -> str:
    """The merge and its sources, task by task, each number with its interval or its standard error."""
    assert job.evaluation is not None
    merged, comparison = job.evaluation.merged, job.evaluation.comparison
    if merged is None:
        return messages.NOT_MEASURED
    tasks = [score.task for score in merged.scores]
    mean = comparison is not None and comparison.overall is not None and len(comparison.overall.tasks) > 1
    rows = []
    for name, evaluation in {"": merged, **job.evaluation.sources}.items():
        cells = [_cell(comparison, name, score_of(evaluation, task), task) for task in tasks]
        cells += [_mean(comparison, name)] if mean else []
        rows.append([code(verdict.short(name)) if name else f"**{code(repo)}**", *cells])
    titles = ["model", *(code(task) for task in tasks), *(["mean"] if mean else [])]
    environment = merged.environment
    below = (
        ("Percent ± standard error" if comparison is None else "Percent, with 95 % intervals")
        + f"; suite {code(merged.suite)}"
        + _samples(merged.scores)
        + f"; lm-eval {environment.lm_eval}, {environment.dtype} on {environment.device}, "
        f"{'with' if environment.chat_template else 'no'} chat template, seed {environment.seed}."
    )
    return table(titles, rows) + "\n\n" + below


def _samples(scores: Sequence[Score]) -> str:
    """How many questions each task has: `, 40 samples each of a and b, 100 of c`."""
    by_count: dict[int, list[str]] = {}
    for score in scores:
        by_count.setdefault(score.samples, []).append(score.task)
    told = ""
    for count, tasks in by_count.items():
        unit = "" if told else " samples"
        told += f", {count:,}{unit}{' each' if len(tasks) > 1 else ''} of {listed(tasks)}"
    return told


def _cell(comparison: Comparison | None, name: str, score: Score | None, task: str) -> str:
    for judged in comparison.tasks if comparison else ():
        for each in (judged.merge, *judged.parents):
            if (judged.task, each.model) == (task, name):
                return with_interval(each)
    return with_error(score)


def _mean(comparison: Comparison | None, name: str) -> str:
    whole = comparison.overall if comparison else None
    models = () if whole is None else (whole.merge, *whole.parents)
    return next((with_interval(each) for each in models if each.model == name), MISSING)


def score_of(evaluation: ModelEvaluation, task: str) -> Score | None:
    return next((score for score in evaluation.scores if score.task == task), None)


def with_error(score: Score | None) -> str:
    """`83.1 ± 5.9` in percent; a dash where nothing was measured."""
    if score is None:
        return MISSING
    return f"{score.value:.1%}".rstrip("%") + (f" ± {score.stderr * 100:.1f}" if score.stderr is not None else "")


def with_interval(score: Scored) -> str:
    """`97.5 (87.1 to 99.6)` in percent, or in the metric's own unit where it is no share."""
    low, high = score.interval
    if 0 <= score.value <= 1:
        return f"{100 * score.value:.1f} ({100 * low:.1f} to {100 * high:.1f})"
    return f"{score.value:.3g} ({low:.3g} to {high:.3g})"


# -- against the parents -----------------------------------------------------------------------------------------


def against_parents(job: Job, repo: str, *, pictured: bool) -> list[str]:
    """The section on the verdict; nothing where nothing was compared and nothing stood in the way."""
    assert job.evaluation is not None
    found = job.evaluation.comparison
    title = "## Against its parents"
    if found is None:
        return [title, plain(job.evaluation.not_compared)] if job.evaluation.not_compared else []
    rows = [_row(task.task, each) for task in found.tasks for each in task.differences]
    if found.overall is not None and len(found.overall.tasks) > 1:
        rows += [_row(None, each) for each in found.overall.differences]
    sections = [title, f"![{_alone(repo)} beside its parents]({PICTURE})" if pictured else ""]
    sections.append(table(("task", "parent", "the merge is", "difference, points", "p", "seen from"), rows, words=3))
    sections.append(messages.VERDICT.format(tests=", ".join(sorted({each.test for each in _all(found)}))))
    sections += [_inherited(found), *(_left_out(found))]
    return [section for section in sections if section]


def _alone(repo: str) -> str:
    return plain(repo.partition("/")[2])


def _all(found: Comparison) -> list[Difference]:
    whole = found.overall.differences if found.overall else ()
    return [each for task in found.tasks for each in task.differences] + list(whole)


def _row(task: str | None, found: Difference) -> list[str]:
    low, high = found.interval
    return [
        "**mean**" if task is None else code(task),
        code(verdict.short(found.parent)),
        found.outcome.value,
        f"{100 * found.value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
        chance(found),
        seen_from(found),
    ]


def chance(found: Difference) -> str:
    """The corrected p."""
    return "< 0.001" if found.adjusted_p < 0.001 else f"{found.adjusted_p:.3f}"


def seen_from(found: Difference) -> str:
    """Which difference, in points, would have been shown where none was; a dash where one was."""
    if found.outcome is not Outcome.NOT_SHOWN:
        return MISSING
    return "never" if found.detectable >= 1 else f"{100 * found.detectable:.1f}"


def _inherited(found: Comparison) -> str:
    """Whose answers the merge gives, over all tasks with right and wrong answers."""
    lines = verdict.inheritance([each for task in found.tasks for each in task.patterns], code)
    told = list(lines)
    for name in found.parents:
        known = [task for task in found.tasks if name in task.same_choice]
        asked = sum(task.samples for task in known)
        same = sum(task.same_choice[name] for task in known)
        if asked:
            whom = code(verdict.short(name))
            told.append(f"It gives the same answer as {whom}, right or wrong, on {same} of {asked} questions.")
    return "\n".join(f"- {line}" for line in told)


def _left_out(found: Comparison) -> list[str]:
    return [f"{code(each.task)} is not compared: {plain(each.because)}." for each in found.left_out]


# -- vitals ------------------------------------------------------------------------------------------------------


def first_look(job: Job) -> list[str]:
    """The section on vitals, the merge first; nothing where nobody looked."""
    assert job.evaluation is not None
    found = job.evaluation.vitals
    if not found:
        return []
    rows = [[code(verdict.short(name)) if name else "this merge", *vitals.cells(each)] for name, each in found.items()]
    return ["## First look", table(["model", *vitals.COLUMNS], rows), messages.FIRST_LOOK]
