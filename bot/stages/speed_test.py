"""Runs the Medusa speed test of a job or a command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bot.jobs.job import Source
from bot.progress import Show
from bot.settings import Settings

if TYPE_CHECKING:
    from evaluators.medusa import SpeedOptions


SEED = 0  # the same for every merge, so that their speed tests draw the same numbers


def of_merge(out: Path, sources: tuple[Source, ...], settings: Settings, scratch: Path, report: Show) -> dict[str, Any]:
    """Return the Medusa report of the merged model; includes the heads of its sources."""
    from bot.hub import Hub
    from bot.stages import head_candidates
    from evaluators.medusa import SpeedOptions

    options = SpeedOptions(
        budget_s=settings.speed_budget_s,
        questions=settings.speed_questions,
        max_new_tokens=settings.speed_new_tokens,
        seed=SEED,
        given=head_candidates.of_job(out, sources, scratch / "medusa", settings, Hub(settings.hub), SEED),
    )
    return bench(out, scratch / "medusa", options, settings, report)


def bench(folder: Path, out: Path, options: SpeedOptions, settings: Settings, report: Show) -> dict[str, Any]:
    """Time decoding of the model in `folder` with Medusa heads on the device of the settings. Raises Failed."""
    from bot.merge.execution.engine import choose_device
    from evaluators import medusa

    return medusa.measure(
        folder,
        out,
        replace(options, device=choose_device(settings.device).type),
        progress=lambda stage, done, total: report(f"Speed test: {stage}", done, total),
    )
