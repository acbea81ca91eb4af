"""Check before a comparison that all models received the same, complete prompts.

Suite, settings and questions are compared elsewhere (`scores.require_comparable`, `comparing`); differences there
forbid a comparison. Prompts can still differ by the chat template or by the context length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evaluators.comparison.samples import Answers
from evaluators.harness.scores import Cut, ModelEvaluation


def unlike_prompts(merge: Answers, parent: Answers) -> str | None:
    """Clause with the number of questions whose prompts differ; None if all are equal."""
    pairs = [(ours, theirs) for ours, theirs in zip(merge.prompts, parent.prompts, strict=True) if ours and theirs]
    other = sum(ours != theirs for ours, theirs in pairs)
    return f"had other prompts for {other} of {len(pairs)} questions" if other else None


def unlike_cuts(task: str, merge: ModelEvaluation, parent: ModelEvaluation) -> str | None:
    """Clause on prompts of a task that were shortened differently; None if they were not."""
    ours, theirs = (next((each for each in model.cut if each.task == task), None) for model in (merge, parent))
    if (ours and _lost(ours)) == (theirs and _lost(theirs)):
        return None
    parents, merges = (each.requests if each else 0 for each in (theirs, ours))
    return f"read {parents} prompts without their start, and the merge {merges}"


def unlike_bounds(merge: ModelEvaluation, parent: ModelEvaluation) -> str | None:
    """Clause on tokens that only one tokenizer adds before or after every text; None if there are none.

    The tokens themselves may differ between vocabularies. A chat template writes its own begin token.
    """
    ours, theirs = merge.loaded, parent.loaded
    if ours is None or theirs is None or merge.environment.chat_template:
        return None
    for verb, its, other in (
        ("begins", theirs.begins_with, ours.begins_with),
        ("ends", theirs.ends_with, ours.ends_with),
    ):
        if bool(its) != bool(other):
            return (
                f"{verb} every text with {' '.join(its) or 'no token'}, and the merge with {' '.join(other) or 'none'}"
            )
    return None


def _lost(cut: Cut) -> tuple[int, int]:
    """Equal for models that lost the same tokens."""
    return cut.requests, cut.longest - cut.limit


def excluded(unlike: Mapping[str, Mapping[str, str]], tasks: Sequence[str]) -> dict[str, str]:
    """The parents whose prompts differ from the merge's in every one of `tasks`, with the reason.

    `unlike` has half a sentence by parent and task.
    """
    return {
        name: "; ".join(dict.fromkeys(reasons.values()))
        for name, reasons in unlike.items()
        if tasks and len(reasons) == len(tasks)
    }
