"""Check before a comparison that two models received the same, complete prompts.

Suite, settings and questions are compared elsewhere (`scores.require_comparable`, `comparing`); differences there
forbid a comparison. Prompts can still differ by the chat template or by the context length.
"""

from __future__ import annotations

from evaluators.comparison.samples import Answers
from evaluators.harness.scores import ModelEvaluation


def unlike_prompts(merge: Answers, parent: Answers) -> str | None:
    """Clause with the number of questions whose prompts differ; None if all are equal."""
    pairs = [(ours, theirs) for ours, theirs in zip(merge.prompts, parent.prompts, strict=True) if ours and theirs]
    other = sum(ours != theirs for ours, theirs in pairs)
    return f"had other prompts for {other} of {len(pairs)} questions" if other else None


def unlike_cuts(task: str, merge: ModelEvaluation, parent: ModelEvaluation) -> str | None:
    """Clause on prompts of a task that were shortened differently; None if they were not."""
    ours, theirs = (
        next(((cut.requests, cut.longest - cut.limit) for cut in model.cut if cut.task == task), (0, 0))
        for model in (merge, parent)
    )
    return None if ours == theirs else f"read {theirs[0]} prompts without their start, and the merge {ours[0]}"


def unlike_bounds(merge: ModelEvaluation, parent: ModelEvaluation) -> str | None:
    """Clause on tokens that only one tokenizer adds before or after every text; None if there are none.

    The tokens themselves may differ between vocabularies. A chat template writes its own begin token.
    """
    ours, theirs = merge.loaded, parent.loaded
    if ours is None or theirs is None or merge.environment.chat_template:
        return None
    for verb, tokens, of_merge in (
        ("begins", theirs.begins_with, ours.begins_with),
        ("ends", theirs.ends_with, ours.ends_with),
    ):
        if bool(tokens) != bool(of_merge):
            added = " ".join(tokens) or "no token"
            return f"{verb} every text with {added}, and the merge with {' '.join(of_merge) or 'none'}"
    return None
