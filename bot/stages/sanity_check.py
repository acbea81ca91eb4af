"""Sanity check before the benchmark, comparison with the parents after it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bot.errors import EvaluationError
from bot.jobs.job import Source
from bot.jobs.request import EvaluateOptions
from bot.progress import Show
from bot.settings import Settings
from bot.stages.evaluation import measures_nothing
from evaluators import comparison, memory, sanity_check
from evaluators.comparison.verdict import Comparison
from evaluators.harness.scores import ModelEvaluation
from evaluators.sanity_check import SanityCheck


def compared(
    merged: ModelEvaluation | None, sources: Mapping[str, ModelEvaluation], settings: Settings
) -> tuple[Comparison | None, str]:
    """Comparison of the merge with its sources, or the reason for its absence; never an error."""
    if merged is None or not sources:
        return None, ""
    try:
        return comparison.compare(merged, sources, cache=settings.evaluations), ""
    except EvaluationError as error:
        return None, str(error)


def sanity_checks(
    out: Path, manifest: str, sources: tuple[Source, ...], asked: EvaluateOptions, settings: Settings, report: Show
) -> dict[str, SanityCheck]:
    """Sanity checks of the sources (stored and reused) and of the merge, under "".

    Raises Failed NOT_FINITE, MODEL_UNLOADABLE or MODEL_NONSENSE if the merge cannot be evaluated.
    """
    if measures_nothing(asked):
        return {}
    models = [source for source in sources if not source.adapter]
    folders = {str(source): (settings.source_folder(source.repo, source.revision), str(source)) for source in models}
    found = first_look({**folders, "": (out, manifest)}, "", settings, report, device=settings.device)
    return {"": found.pop(""), **found}


def first_look(
    models: Mapping[str, tuple[Path, str]],
    judged: str,
    settings: Settings,
    report: Show,
    *,
    device: str,
    dtype: str = "auto",
) -> dict[str, SanityCheck]:
    """Sanity check of each model, given by name as folder and content identity; stored checks are reused.

    Raises Failed as `sanity_checks` if `judged` fails in comparison with the others, and MEMORY_LIMIT.
    """
    found: dict[str, SanityCheck] = {}
    for place, (name, (folder, identity)) in enumerate(models.items()):
        report("Sanity check of the models", place, len(models))
        cache = settings.evaluations
        signs = sanity_check.stored(cache, identity, device=device, dtype=dtype)
        if signs is None and (folder / "config.json").is_file():  # a source that was measured before may be gone
            memory.require_memory(folder, dtype, device, settings.memory_limit_bytes)
            signs = sanity_check.of_folder(folder, cache=cache, device=device, dtype=dtype, model_identity=identity)
        if signs is not None:
            found[name] = signs
    report("Sanity check of the models", len(models), len(models))
    sanity_check.require_sound(found[judged], [signs for name, signs in found.items() if name != judged])
    return found
