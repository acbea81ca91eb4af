"""Early stopping for futility: an evaluation ends early if the merge can no longer beat its parents.

Off unless `first_stage` is set. The parents are measured in full, once for all their merges. The merge answers the
first questions of every task, twice as many in each round, up to half of all questions; then the whole suite follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from bot.errors import EvaluationError, Failed
from bot.settings import Settings
from evaluators import comparison
from evaluators.comparison import stopping
from evaluators.harness.scores import ModelEvaluation


def require_hope(
    ask: Callable[[int], ModelEvaluation], sources: Mapping[str, ModelEvaluation], settings: Settings
) -> None:
    """Measure the merge by `ask(n)`, on the first n questions of each task; `sources` are measured in full.

    Raises Failed NOT_BETTER, and the errors of `ask`. A merge that would end `first_stage_margin` better than every
    source is stopped with a probability of at most `first_stage_error`, if the order of a dataset is independent of its
    content.
    """
    rule = stopping.Rule(settings.first_stage_margin, settings.first_stage_error)
    sizes = [score.samples for source in [*sources.values()][:1] for score in source.scores]
    asked = settings.first_stage
    while asked and sizes and 2 * sum(min(asked, size) for size in sizes) <= sum(sizes):
        decision = decided(ask(asked), sources, max(sizes), rule, settings.evaluations)
        if decision.beaten_by is not None:
            raise Failed(
                "NOT_BETTER",
                f"After {asked} questions per task the merge cannot end {_better(rule.margin)} than "
                f"{decision.beaten_by.partition('@')[0]} any more (error rate {rule.error:.0%}).",
                "Change the recipe, or ask the operator to measure such merges to their end.",
            )
        asked *= 2


def decided(
    merged: ModelEvaluation, sources: Mapping[str, ModelEvaluation], questions: int, rule: stopping.Rule, cache: Path
) -> stopping.Decision:
    """Decision after a round; `questions` is the number of the largest task.

    Evaluations that cannot be compared decide nothing.
    """
    try:
        found = comparison.differences(merged, sources, cache=cache)
    except EvaluationError:
        return stopping.Decision(None, 0, questions, 1.0)
    return stopping.decide({name: stopping.rounds(tasks) for name, tasks in found.items()}, questions, rule)


def _better(margin: float) -> str:
    return f"{100 * margin:g} points better" if margin else "better"
