"""Comparison of a merge with its parents from stored evaluations. Deterministic: equal facts give equal text.

Only equal questions under equal settings are compared: suite, environment and every question's identity must agree.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bot.errors import EvaluationError
from evaluators import harness, paired
from evaluators.comparison import alike, samples, stopping
from evaluators.comparison.report import short
from evaluators.comparison.samples import Answers, Unpaired
from evaluators.comparison.verdict import (
    ALPHA,
    Comparison,
    Difference,
    LeftOut,
    NotAlike,
    Overall,
    Pattern,
    Scored,
    TaskVerdict,
)
from evaluators.harness.scores import ModelEvaluation, Score, require_comparable
from evaluators.paired import Interval, Values

MERGE = ""
MCNEMAR, SIGN_FLIP = "McNemar, mid-p", "paired permutation"


def compare(merge: ModelEvaluation, parents: Mapping[str, ModelEvaluation], *, cache: Path) -> Comparison:
    """Compare `merge` with each parent on every task and overall.

    Differences on tasks are corrected together (Holm over tasks and parents), the overall ones over parents. Tasks
    whose score is not a mean over questions, and tasks and parents with other prompts than the merge's, are left out
    with the reason. Raises EvaluationError NOT_COMPARABLE if suite, environment or questions differ, if answers were
    not kept, or if no parent had the merge's prompts.
    """
    paired_tasks = _paired(merge, parents, cache)
    tasks, not_alike = paired_tasks.tasks, paired_tasks.not_alike
    compared = {name: each for name, each in parents.items() if name not in not_alike}
    if parents and not compared:
        raise _not_comparable(
            "its parents because their prompts differ",
            "; ".join(f"{short(name)} {because}" for name, because in not_alike.items()),
            "Give their tokenizers the same chat template, begin and end tokens and maximum length, and measure again.",
        )
    verdicts = corrected([_verdict(task, len(tasks) * len(compared)) for task in tasks])
    return Comparison(
        merge.suite,
        merge.suite_digest,
        {MERGE: merge.key, **{name: evaluation.key for name, evaluation in compared.items()}},
        tuple(verdicts),
        overall(tasks, verdicts, tuple(compared)),
        tuple(paired_tasks.left_out),
        tuple(NotAlike(name, because) for name, because in not_alike.items()),
    )


def differences(
    merge: ModelEvaluation, parents: Mapping[str, ModelEvaluation], *, cache: Path
) -> dict[str, list[Values]]:
    """By parent, merge minus parent [n] on each task that is a share; the input of `stopping`.

    The merge may have answered only the first questions of each task. Questions keep their own order; a group takes one
    of each task in turn, so that more questions only extend the arrays. Raises EvaluationError NOT_COMPARABLE as
    `compare`.
    """
    limit = merge.environment.limit
    limited = {
        name: replace(parent, environment=replace(parent.environment, limit=limit)) for name, parent in parents.items()
    }
    paired_tasks = _paired(merge, limited, cache, partly=True)
    tasks = [task for task in paired_tasks.tasks if _is_share(task)]
    orders = [samples.in_turn(task.answers[MERGE].questions) for task in tasks]
    return {
        name: [task.difference(name)[order] for task, order in zip(tasks, orders, strict=True)]
        for name in parents
        if name not in paired_tasks.not_alike
    }


def most_telling(models: Mapping[str, ModelEvaluation], *, cache: Path) -> list[str]:
    """Tasks in order of information per second, from stored evaluations of models like these.

    A merge differs from its parents roughly where they differ from each other. Empty for fewer than two models, or if
    times or answers were not kept.
    """
    if len(models) < 2:
        return []
    first, *others = models
    try:
        paired_tasks = _paired(models[first], {name: models[name] for name in others}, cache)
    except EvaluationError:
        return []
    information = {}
    for task in paired_tasks.tasks:
        name = task.score.task
        seconds = [spent for model in models.values() if (spent := model.seconds_of(name)) is not None]
        if seconds:
            values = [task.difference(other) for other in others if other not in paired_tasks.not_alike]
            information[name] = stopping.information(values, sum(seconds) / len(seconds))
    return sorted(information, key=lambda name: -information[name])


@dataclass(frozen=True, slots=True)
class _Paired:
    """Tasks with equal prompts for all remaining models, other tasks, and parents without any such task."""

    tasks: list[_Task]
    left_out: list[LeftOut]
    not_alike: dict[str, str]


def _paired(
    merge: ModelEvaluation, parents: Mapping[str, ModelEvaluation], cache: Path, *, partly: bool = False
) -> _Paired:
    """All tasks with the answers of all models; `partly`: the parents may have answered more than the merge."""
    require_comparable({"The merge": merge, **parents})
    models = {MERGE: merge, **parents}
    folders = {name: harness.folder_of(evaluation, cache) for name, evaluation in models.items()}
    subtasks = samples.groups(folders[MERGE])
    tasks, left_out = [], []
    for score in merge.scores:
        try:
            answers = {name: samples.read(folders[name], _same(score, models[name], name), subtasks) for name in models}
        except Unpaired as reason:
            left_out.append(LeftOut(score.task, str(reason)))
            continue
        tasks.append(_Task(score, {name: _in_order(answers, name, score.task, partly) for name in answers}))
    return _with_equal_prompts(tasks, left_out, models, partly)


def _with_equal_prompts(
    tasks: list[_Task], left_out: list[LeftOut], models: Mapping[str, ModelEvaluation], partly: bool
) -> _Paired:
    """Without the parents that had other prompts in every task, and without the tasks that others had."""

    def reason(task: _Task, name: str) -> str | None:
        return (
            alike.unlike_prompts(task.answers[MERGE], task.answers[name])
            or alike.unlike_bounds(models[MERGE], models[name])
            # Of fewer questions, fewer are too long.
            or (None if partly else alike.unlike_cuts(task.score.task, models[MERGE], models[name]))
        )

    unlike = {name: [reason(task, name) for task in tasks] for name in models if name != MERGE}
    not_alike = {
        name: "; ".join(dict.fromkeys(filter(None, reasons)))
        for name, reasons in unlike.items()
        if tasks and all(reasons)
    }
    kept = []
    for at, task in enumerate(tasks):
        clauses = [
            f"{short(name)} {reasons[at]}" for name, reasons in unlike.items() if reasons[at] and name not in not_alike
        ]
        if clauses:
            left_out.append(LeftOut(task.score.task, "; ".join(clauses)))
        else:
            kept.append(replace(task, answers={n: each for n, each in task.answers.items() if n not in not_alike}))
    return _Paired(kept, left_out, not_alike)


@dataclass(frozen=True, slots=True)
class _Task:
    """Primary score of a task and every model's answers to the same questions, in the same order."""

    score: Score
    answers: Mapping[str, Answers]

    @property
    def binary(self) -> bool:
        return all(each.binary for each in self.answers.values())

    def difference(self, parent: str) -> Values:
        """[n], more is better."""
        values: Values = self.answers[MERGE].values - self.answers[parent].values
        return values if self.score.higher_is_better else -values

    def stderr(self, parent: str) -> float:
        """Standard error of the mean difference; binary answers get the two questions of `difference_interval`."""
        values = self.difference(parent)
        if self.binary:
            return math.sqrt((np.count_nonzero(values) + 2) / (len(values) + 2) ** 2)
        return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.inf


# -- the same questions ---------------------------------------------------------------------------------------------


def _same(score: Score, evaluation: ModelEvaluation, name: str) -> Score:
    for other in evaluation.scores:
        if (other.task, other.metric, other.filter) == (score.task, score.metric, score.filter):
            if other.task_version != score.task_version:
                raise _not_comparable(name, f"task `{score.task}` was of version {other.task_version} there")
            return other
    raise _not_comparable(name, f"it has no score of task `{score.task}`")


def _in_order(answers: Mapping[str, Answers], name: str, task: str, partly: bool) -> Answers:
    """`name`'s answers in the order of the merge's questions."""
    questions, own = answers[MERGE].questions, answers[name]
    if own.questions == questions:
        return own
    places = {question: at for at, question in enumerate(own.questions)}
    if (len(places) != len(questions) and not partly) or any(question not in places for question in questions):
        raise _not_comparable(name, f"it has other questions of task `{task}`")
    order = [places[question] for question in questions]
    choices = None if own.choices is None else tuple(own.choices[at] for at in order)
    prompts = tuple(own.prompts[at] for at in order)
    return replace(own, questions=questions, values=own.values[order], choices=choices, prompts=prompts)


def _not_comparable(
    name: str, reason: str, next_step: str = "Measure all of them with the same suite, settings and versions."
) -> EvaluationError:
    message = f"The merge cannot be compared with {name or 'its parents'}: {reason}."
    return EvaluationError("NOT_COMPARABLE", message, next_step)


# -- one task ----------------------------------------------------------------------------------------------------


def _verdict(task: _Task, comparisons: int) -> TaskVerdict:
    """Verdict on a task; `comparisons` is the number of differences that are corrected together."""
    merge = task.answers[MERGE]
    parents = {name: answers for name, answers in task.answers.items() if name != MERGE}
    return TaskVerdict(
        task=task.score.task,
        metric=task.score.metric,
        samples=len(merge.values),
        chance=merge.chance,
        merge=_scored(MERGE, merge),
        parents=tuple(_scored(name, answers) for name, answers in parents.items()),
        differences=tuple(_difference(task, name, ALPHA / max(1, comparisons)) for name in parents),
        patterns=patterns({name: each.values for name, each in parents.items()}, merge.values) if task.binary else (),
        same_choice={
            name: sum(map(str.__eq__, answers.choices, merge.choices))
            for name, answers in parents.items()
            if answers.choices is not None and merge.choices is not None
        },
    )


def _scored(name: str, answers: Answers) -> Scored:
    values = answers.values
    if answers.binary:
        interval = paired.proportion_interval(int(values.sum()), len(values))
    else:
        interval = paired.mean_interval(values)
    return Scored(name, float(values.mean()), interval)


def _difference(task: _Task, parent: str, level: float) -> Difference:
    values = task.difference(parent)
    mean, questions = float(values.mean()), len(values)
    if task.binary:
        won, lost = int((values > 0).sum()), int((values < 0).sum())
        p = paired.mcnemar(won, lost)
        detectable = paired.detectable_share((won + lost + 2) / (questions + 2), questions, level)
        interval = paired.difference_interval(won, lost, questions)
        return Difference(parent, mean, interval, p, p, detectable, MCNEMAR, won, lost)
    p, detectable = paired.sign_flip([values]), paired.detectable_mean(task.stderr(parent), level)
    return Difference(parent, mean, paired.mean_interval(values), p, p, detectable, SIGN_FLIP)


def corrected(tasks: Sequence[TaskVerdict]) -> list[TaskVerdict]:
    """The same verdicts with their p values corrected for all differences of all tasks."""
    adjusted = iter(paired.holm([each.p for task in tasks for each in task.differences]))
    return [
        replace(task, differences=tuple(replace(each, adjusted_p=next(adjusted)) for each in task.differences))
        for task in tasks
    ]


def patterns(parents: Mapping[str, Values], merge: Values) -> tuple[Pattern, ...]:
    """Sets of parents that are right together, largest first, with their counts for parents and merge."""
    counts = []
    for size in range(len(parents), -1, -1):
        for right in itertools.combinations(parents, size):
            here = np.ones(len(merge), dtype=bool)
            for name, values in parents.items():
                here &= (values == 1) == (name in right)
            counts.append(Pattern(right, int(here.sum()), int((here & (merge == 1)).sum())))
    return tuple(counts)


# -- all tasks ---------------------------------------------------------------------------------------------------


def overall(tasks: Sequence[_Task], verdicts: Sequence[TaskVerdict], parents: tuple[str, ...]) -> Overall | None:
    """Mean over the tasks that are higher-is-better shares; None without any."""
    shares = [(task, verdict) for task, verdict in zip(tasks, verdicts, strict=True) if _is_share(task)]
    if not shares:
        return None
    differences = []
    for place, parent in enumerate(parents):
        first, *others = by_task = [verdict.differences[place] for _, verdict in shares]
        p, detectable, test = first.p, first.detectable, first.test
        if others:
            p, test = paired.sign_flip([task.difference(parent) for task, _ in shares]), SIGN_FLIP
            stderr = math.sqrt(sum(task.stderr(parent) ** 2 for task, _ in shares)) / len(shares)
            detectable = paired.detectable_mean(stderr, ALPHA / len(parents))
        differences.append(Difference(parent, *_average(by_task), p, p, min(1.0, detectable), test))
    adjusted = paired.holm([each.p for each in differences])
    models = zip(*([verdict.merge, *verdict.parents] for _, verdict in shares), strict=True)
    merge, *of_parents = [Scored(scores[0].model, *_average(scores)) for scores in models]
    return Overall(
        tuple(verdict.task for _, verdict in shares),
        merge,
        tuple(of_parents),
        tuple(replace(each, adjusted_p=p) for each, p in zip(differences, adjusted, strict=True)),
    )


def _average(by_task: Sequence[Scored] | Sequence[Difference]) -> tuple[float, Interval]:
    values = [each.value for each in by_task]
    return sum(values) / len(values), paired.average_interval(values, [each.interval for each in by_task])


def _is_share(task: _Task) -> bool:
    values = [answers.values for answers in task.answers.values()]
    return task.score.higher_is_better and all(((each >= 0) & (each <= 1)).all() for each in values)
