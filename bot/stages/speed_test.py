"""Between the job and the speed test: which heads are tried on which folder, with which questions, for how long."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bot.jobs.job import Source
from bot.progress import Show
from bot.settings import Settings
from bot.stages.evaluator_errors import translated

if TYPE_CHECKING:
    from evaluators.medusa import Given


SEED = 0  # of every merge, so that their speed tests draw alike


def of_merge(out: Path, sources: tuple[Source, ...], settings: Settings, scratch: Path, report: Show) -> dict[str, Any]:
    """The Medusa report of the merged model, with its sentence for people; its sources' heads are tried where there
    are any."""
    from bot.hub import Hub
    from bot.stages import head_candidates

    given = head_candidates.of_job(out, sources, scratch / "medusa", settings, Hub(settings.hub), SEED)
    asked = Speed(None, settings.speed_budget_s, settings.speed_questions, settings.speed_new_tokens, given=given)
    return bench(out, scratch / "medusa", asked, settings, report, seed=SEED)


@dataclass(frozen=True, slots=True)
class Speed:
    """What to time: questions (built in without a file), how many, of how many turns, which heads there are, and the
    file of the tree to time, if it is not to be chosen."""

    prompts: Path | None = None
    budget_s: float = 600.0
    questions: int = 16
    new_tokens: int = 48
    turns: int = 1
    given: tuple[Given, ...] = ()
    dtype: str = "auto"
    tree: Path | None = None


def bench(folder: Path, out: Path, asked: Speed, settings: Settings, report: Show, *, seed: int = 0) -> dict[str, Any]:
    """Train heads on the model in `folder`, unless some are given, and time decoding with them. Raises Failed."""
    from bot.merge.execution.engine import choose_device
    from evaluators import medusa

    with translated():
        measured = medusa.measure(
            folder,
            out,
            prompts=asked.prompts,
            budget_s=asked.budget_s,
            questions=asked.questions,
            max_new_tokens=asked.new_tokens,
            turns=asked.turns,
            seed=seed,
            device=choose_device(settings.device).type,
            given=asked.given,
            dtype=asked.dtype,
            tree=asked.tree,
            progress=lambda stage, done, total: report(f"Speed test: {stage}", done, total),
        )
    return {**measured, "sentence": medusa.sentence(measured)}
