"""The first stage of an evaluation: a merge that cannot beat its parents any more is stopped after few questions.

Off unless the operator sets `first_stage`. The parents are measured in full, once for all their merges. A merge answers
the first questions of every task, twice as many at every look, as long as that is no more than half of all; then the
whole suite follows.
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
    """`ask(n)` measures the merge on the first n questions of each task; `sources` are measured in full.

    Raises Failed NOT_BETTER, which happens to a merge that would end `first_stage_margin` better than every source
    with a probability of `first_stage_error` at most, and what `ask` raises. The rate supposes that the order of a
    dataset says nothing about its questions.
    """
    rule = stopping.Rule(settings.first_stage_margin, settings.first_stage_error)
    sizes = [score.samples for source in [*sources.values()][:1] for score in source.scores]
    asked = settings.first_stage
    while asked and sizes and 2 * sum(min(asked, size) for size in sizes) <= sum(sizes):
        decision = decided(ask(asked), sources, max(sizes), rule, settings.evaluations)
        if decision.beaten_by is not None:
            raise Failed(
                "NOT_BETTER",
                f"After {asked} questions a task the merge cannot end {_better(rule.margin)} than "
                f"{decision.beaten_by.partition('@')[0]} any more (error rate {rule.error:.0%}).",
                "Change the recipe, or ask the operator to measure such merges to their end.",
            )
        asked *= 2


def decided(
    merged: ModelEvaluation, sources: Mapping[str, ModelEvaluation], questions: int, rule: stopping.Rule, cache: Path
) -> stopping.Decision:
    """The decision after what was measured; `questions` is how many the largest task has.

    Evaluations that cannot be compared decide nothing.
    """
    try:
        found = comparison.differences(merged, sources, cache=cache)
    except EvaluationError:
        return stopping.Decision(None, 0, questions, 1.0)
    return stopping.decide({name: stopping.rounds(tasks) for name, tasks in found.items()}, questions, rule)


def _better(margin: float) -> str:
    return f"{100 * margin:g} points better" if margin else "better"
