"""Around the tasks: whether a merge speaks before they begin, and what it is beside its sources when they are done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bot.errors import EvaluationError
from bot.jobs.job import Source
from bot.jobs.request import EvaluateOptions
from bot.progress import Show
from bot.settings import Settings
from bot.stages.evaluation import measures_nothing
from evaluators import comparison, memory, vitals
from evaluators.comparison.verdict import Comparison
from evaluators.harness.scores import ModelEvaluation
from evaluators.vitals import Vitals


def compared(
    merged: ModelEvaluation | None, sources: Mapping[str, ModelEvaluation], settings: Settings
) -> tuple[Comparison | None, str]:
    """The verdict on the merge against its sources, or why there is none: that costs nobody a finished evaluation."""
    if merged is None or not sources:
        return None, ""
    try:
        return comparison.compare(merged, sources, cache=settings.evaluations), ""
    except EvaluationError as error:
        return None, str(error)


def vital_signs(
    out: Path, manifest: str, sources: tuple[Source, ...], asked: EvaluateOptions, settings: Settings, report: Show
) -> dict[str, Vitals]:
    """A look at each source (once for all merges that share it) and at the merge, under "", before any task.

    Raises Failed NOT_FINITE, MODEL_UNLOADABLE or MODEL_NONSENSE where the tasks would be wasted on the merge.
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
) -> dict[str, Vitals]:
    """A look at each model, by name its folder and what stands for its bytes; those known from before are not loaded.

    Raises Failed as `vital_signs` where `judged` is not fit for tasks, measured by the others, and MEMORY_LIMIT.
    """
    found: dict[str, Vitals] = {}
    for place, (name, (folder, identity)) in enumerate(models.items()):
        report("Looking whether the models speak", place, len(models))
        cache = settings.evaluations
        signs = vitals.stored(cache, identity, device=device, dtype=dtype)
        if signs is None and (folder / "config.json").is_file():  # a source that was measured before may be gone
            memory.require_memory(folder, dtype, device, settings.memory_limit_bytes)
            signs = vitals.of_folder(folder, cache=cache, device=device, dtype=dtype, model_identity=identity)
        if signs is not None:
            found[name] = signs
    report("Looking whether the models speak", len(models), len(models))
    vitals.require_sound(found[judged], [signs for name, signs in found.items() if name != judged])
    return found
