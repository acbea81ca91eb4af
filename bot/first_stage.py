"""The first stage of an evaluation: a merge that cannot beat its parents any more is stopped after few questions.

Off unless the operator sets `first_stage`. The merge and its parents answer the first questions of every task, twice
as many at every look, as long as that is no more than half of all; then the whole suite follows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from bot.errors import Failed
from bot.settings import Settings
from evaluators import comparison, harness, stopping
from evaluators.errors import EvaluationError
from evaluators.scores import ModelEvaluation

Measured = tuple[ModelEvaluation, Mapping[str, ModelEvaluation]]


def require_hope(ask: Callable[[int], Measured], settings: Settings, limit: int | None) -> None:
    """`ask(n)` measures the merge and its sources on n questions a task; `limit` is how many are asked for in the end.

    Raises Failed NOT_BETTER where the merge would end `first_stage_margin` better than every source with a
    probability of `first_stage_error` at most, and what `ask` raises. The rate supposes that the order of a dataset
    says nothing about its questions.
    """
    rule = stopping.Rule(settings.first_stage_margin, settings.first_stage_error)
    asked, whole = settings.first_stage, limit
    while asked and (whole is None or 2 * asked <= whole):
        merged, sources = ask(asked)
        sizes = _sizes(merged, settings.evaluations, limit)
        whole = max(sizes, default=0)
        decision = decided(merged, sources, sum(sizes), rule, settings.evaluations)
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
    """The decision after what was measured; `questions` is no fewer than the largest task will have in the end.

    Evaluations that cannot be compared decide nothing.
    """
    try:
        found = comparison.differences(merged, sources, cache=cache)
    except EvaluationError:
        return stopping.Decision(None, 0, questions, 1.0)
    return stopping.decide({name: stopping.rounds(tasks) for name, tasks in found.items()}, questions, rule)


def _sizes(merged: ModelEvaluation, cache: Path, limit: int | None) -> list[int]:
    """How many questions each task, also of a group, will have been asked in the end."""
    results = json.loads((harness.folder_of(merged, cache) / "lm_eval.json").read_text(encoding="utf-8"))
    sizes = [int(each["original"]) for each in results.get("n-samples", {}).values()]
    return sizes if limit is None else [min(limit, size) for size in sizes]


def _better(margin: float) -> str:
    return f"{100 * margin:g} points better" if margin else "better"
