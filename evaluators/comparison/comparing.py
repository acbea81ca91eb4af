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
    found = _paired(merge, parents, cache)
    compared = {name: each for name, each in parents.items() if name not in found.not_alike}
    if parents and not compared:
        raise _not_comparable_by_prompts(found.not_alike)
    tasks = found.tasks
    judged = corrected([_judged(task, len(tasks) * len(compared)) for task in tasks])
    keys = {MERGE: merge.key, **{name: evaluation.key for name, evaluation in compared.items()}}
    return Comparison(
        merge.suite,
        merge.suite_digest,
        keys,
        tuple(judged),
        overall(tasks, judged, tuple(compared)),
        tuple(found.left_out),
        tuple(NotAlike(name, because) for name, because in found.not_alike.items()),
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
    found = _paired(merge, limited, cache, partly=True)
    tasks = [task for task in found.tasks if _is_share(task)]
    orders = [samples.in_turn(task.answers[MERGE].questions) for task in tasks]
    return {
        name: [task.difference(name)[order] for task, order in zip(tasks, orders, strict=True)]
        for name in parents
        if name not in found.not_alike
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
        found = _paired(models[first], {name: models[name] for name in others}, cache)
    except EvaluationError:
        return []
    tasks, others = found.tasks, [name for name in others if name not in found.not_alike]
    paces = {}
    for task in tasks:
        seconds = [took for each in models.values() if (took := each.seconds_of(task.score.task)) is not None]
        if seconds:
            differences = [task.difference(name) for name in others]
            paces[task.score.task] = stopping.pace(differences, sum(seconds) / len(seconds))
    return stopping.by_information(paces)


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
    return _only_alike(tasks, left_out, models, partly)


@dataclass(frozen=True, slots=True)
class _Paired:
    """Tasks with equal prompts for all remaining models, other tasks, and parents without any such task."""

    tasks: list[_Task]
    left_out: list[LeftOut]
    not_alike: dict[str, str]


def _only_alike(
    tasks: list[_Task], left_out: list[LeftOut], models: Mapping[str, ModelEvaluation], partly: bool
) -> _Paired:
    """Without the parents that had other prompts in every task, and without the tasks that others had."""
    unlike: dict[str, dict[str, str]] = {name: {} for name in models if name != MERGE}
    for task, (name, reasons) in itertools.product(tasks, unlike.items()):
        reason = alike.unlike_prompts(task.answers[MERGE], task.answers[name])
        reason = reason or alike.unlike_bounds(models[MERGE], models[name])
        if reason is None and not partly:  # of fewer questions fewer are too long
            reason = alike.unlike_cuts(task.score.task, models[MERGE], models[name])
        if reason is not None:
            reasons[task.score.task] = reason
    not_alike = alike.excluded(unlike, [task.score.task for task in tasks])
    kept = []
    for task in tasks:
        others = {name: reasons[task.score.task] for name, reasons in unlike.items() if task.score.task in reasons}
        reasons_here = [
            f"{name.partition('@')[0]} {reason}" for name, reason in others.items() if name not in not_alike
        ]
        if reasons_here:
            left_out.append(LeftOut(task.score.task, "; ".join(reasons_here)))
        else:
            answers = {name: found for name, found in task.answers.items() if name not in not_alike}
            kept.append(replace(task, answers=answers))
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
        found: Values = self.answers[MERGE].values - self.answers[parent].values
        return found if self.score.higher_is_better else -found

    def stderr(self, parent: str) -> float:
        """Standard error of the mean difference; binary answers get the two questions of `difference_interval`."""
        found = self.difference(parent)
        if self.binary:
            return math.sqrt((np.count_nonzero(found) + 2) / (len(found) + 2) ** 2)
        return float(found.std(ddof=1) / math.sqrt(len(found))) if len(found) > 1 else math.inf


# -- the same questions ---------------------------------------------------------------------------------------------


def _same(score: Score, evaluation: ModelEvaluation, name: str) -> Score:
    for found in evaluation.scores:
        if (found.task, found.metric, found.filter) == (score.task, score.metric, score.filter):
            if found.task_version != score.task_version:
                raise _not_comparable(name, f"task `{score.task}` was of version {found.task_version} there")
            return found
    raise _not_comparable(name, f"it has no score of task `{score.task}`")


def _in_order(answers: Mapping[str, Answers], name: str, task: str, partly: bool) -> Answers:
    """`name`'s answers in the order of the merge's questions."""
    wanted, found = answers[MERGE].questions, answers[name]
    if found.questions == wanted:
        return found
    places = {question: at for at, question in enumerate(found.questions)}
    if (len(places) != len(wanted) and not partly) or any(question not in places for question in wanted):
        raise _not_comparable(name, f"it has other questions of task `{task}`")
    order = [places[question] for question in wanted]
    choices = None if found.choices is None else tuple(found.choices[at] for at in order)
    prompts = tuple(found.prompts[at] for at in order)
    return replace(found, questions=wanted, values=found.values[order], choices=choices, prompts=prompts)


def _not_comparable(name: str, reason: str) -> EvaluationError:
    return EvaluationError(
        "NOT_COMPARABLE",
        f"The merge cannot be compared with {name or 'its parents'}: {reason}.",
        "Measure all of them with the same suite, settings and versions.",
    )


def _not_comparable_by_prompts(reasons: Mapping[str, str]) -> EvaluationError:
    reason = "; ".join(f"{name.partition('@')[0]} {because}" for name, because in reasons.items())
    return EvaluationError(
        "NOT_COMPARABLE",
        f"The merge cannot be compared with its parents because their prompts differ: {reason}.",
        "Give their tokenizers the same chat template, begin and end tokens and maximum length, and measure again.",
    )


# -- one task ----------------------------------------------------------------------------------------------------


def _judged(task: _Task, comparisons: int) -> TaskVerdict:
    parents = [name for name in task.answers if name != MERGE]
    return TaskVerdict(
        task=task.score.task,
        metric=task.score.metric,
        samples=len(task.answers[MERGE].values),
        chance=task.answers[MERGE].chance,
        merge=_scored(MERGE, task),
        parents=tuple(_scored(name, task) for name in parents),
        differences=tuple(_difference(task, name, comparisons) for name in parents),
        patterns=patterns({name: task.answers[name].values for name in parents}, task.answers[MERGE].values)
        if task.binary
        else (),
        same_choice=_same_choices(task, parents),
    )


def _same_choices(task: _Task, parents: Sequence[str]) -> dict[str, int]:
    """Number of questions on which each parent chose the merge's answer; only parents with stored answers."""
    ours = task.answers[MERGE].choices
    chosen = {name: task.answers[name].choices for name in parents}
    return {
        name: sum(map(str.__eq__, theirs, ours))
        for name, theirs in chosen.items()
        if theirs is not None and ours is not None
    }


def _scored(name: str, task: _Task) -> Scored:
    values = task.answers[name].values
    if task.answers[name].binary:
        interval = paired.proportion_interval(int(values.sum()), len(values))
    else:
        interval = paired.mean_interval(values)
    return Scored(name, float(values.mean()), interval)


def _difference(task: _Task, parent: str, comparisons: int) -> Difference:
    """Difference on a task; `comparisons` is the number of differences that are corrected together."""
    found, level = task.difference(parent), ALPHA / max(1, comparisons)
    if task.binary:
        won, lost = int((found > 0).sum()), int((found < 0).sum())
        chance = paired.mcnemar(won, lost)
        detectable = paired.detectable_share((won + lost + 2) / (len(found) + 2), len(found), level)
        interval = paired.difference_interval(won, lost, len(found))
        return Difference(parent, float(found.mean()), interval, chance, chance, detectable, MCNEMAR, won, lost)
    chance = paired.sign_flip([found])
    detectable = paired.detectable_mean(task.stderr(parent), level)
    return Difference(parent, float(found.mean()), paired.mean_interval(found), chance, chance, detectable, SIGN_FLIP)


def corrected(tasks: Sequence[TaskVerdict]) -> list[TaskVerdict]:
    """The same verdicts with their p values corrected for all differences of all tasks."""
    adjusted = iter(paired.holm([each.p for task in tasks for each in task.differences]))
    return [
        replace(task, differences=tuple(replace(each, adjusted_p=next(adjusted)) for each in task.differences))
        for task in tasks
    ]


def patterns(parents: Mapping[str, Values], merge: Values) -> tuple[Pattern, ...]:
    """Sets of parents that are right together, largest first, with their counts for parents and merge."""
    found = []
    names = tuple(parents)
    for size in range(len(names), -1, -1):
        for right in itertools.combinations(names, size):
            here = np.ones(len(merge), dtype=bool)
            for name in names:
                here &= (parents[name] == 1) == (name in right)
            found.append(Pattern(right, int(here.sum()), int((here & (merge == 1)).sum())))
    return tuple(found)


# -- all tasks ---------------------------------------------------------------------------------------------------


def overall(tasks: Sequence[_Task], judged: Sequence[TaskVerdict], parents: tuple[str, ...]) -> Overall | None:
    """Mean over the tasks that are higher-is-better shares; None without any."""
    chosen = [(task, verdict) for task, verdict in zip(tasks, judged, strict=True) if _is_share(task)]
    if not chosen:
        return None
    differences = []
    for place, parent in enumerate(parents):
        found = [verdict.differences[place] for _, verdict in chosen]
        strata = [task.difference(parent) for task, _ in chosen]
        stderr = math.sqrt(sum(task.stderr(parent) ** 2 for task, _ in chosen)) / len(chosen)
        value, interval = _average([(each.value, each.interval) for each in found])
        chance = found[0].p if len(found) == 1 else paired.sign_flip(strata)
        detectable = found[0].detectable if len(found) == 1 else paired.detectable_mean(stderr, ALPHA / len(parents))
        test = found[0].test if len(found) == 1 else SIGN_FLIP
        differences.append(Difference(parent, value, interval, chance, chance, min(1.0, detectable), test))
    adjusted = paired.holm([each.p for each in differences])
    models = zip(*([verdict.merge, *verdict.parents] for _, verdict in chosen), strict=True)
    merge, *others = [
        Scored(scores[0].model, *_average([(each.value, each.interval) for each in scores])) for scores in models
    ]
    return Overall(
        tuple(verdict.task for _, verdict in chosen),
        merge,
        tuple(others),
        tuple(replace(each, adjusted_p=chance) for each, chance in zip(differences, adjusted, strict=True)),
    )


def _average(found: Sequence[tuple[float, Interval]]) -> tuple[float, Interval]:
    values, intervals = [value for value, _ in found], [interval for _, interval in found]
    return sum(values) / len(values), paired.average_interval(values, intervals)


def _is_share(task: _Task) -> bool:
    values = [answers.values for answers in task.answers.values()]
    return task.score.higher_is_better and all(((each >= 0) & (each <= 1)).all() for each in values)
