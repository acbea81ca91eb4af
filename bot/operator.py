"""The operator's own work, at the command line: local folders beside Hub repos, no queue, no publication."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bot import measure
from bot.errors import Failed
from bot.merge import checkpoint, plan, recipe
from bot.progress import Show, named
from bot.request import EvaluateOptions
from bot.settings import Settings
from evaluators.scores import ModelEvaluation

if TYPE_CHECKING:
    from bot.hub import Hub


def read_recipe(file: Path) -> recipe.Recipe:
    """The recipe in `file`. Raises Refused as the parser does, Failed FILE_NOT_FOUND."""
    return recipe.parse(read_text(file), trust="operator", file=str(file))


def read_text(file: Path) -> str:
    """The text of a recipe file. Raises Failed FILE_NOT_FOUND."""
    try:
        return file.read_text()
    except OSError as error:
        raise Failed("FILE_NOT_FOUND", f"{file} cannot be read: {error.strerror}.", "Name a recipe file.") from None
    except UnicodeDecodeError:
        raise Failed("FILE_NOT_FOUND", f"{file} is not a text file.", "Name a recipe file.") from None


def plan_from_headers(asked: recipe.Recipe, settings: Settings, *, seed: int = 0) -> plan.Plan:
    """The plan of a recipe, from headers alone: local folders are opened, Hub repos are read by range."""
    pins: dict[recipe.ModelRef, recipe.ModelRef] = {}
    opened: dict[recipe.ModelRef, checkpoint.Checkpoint] = {}
    for ref in asked.sources:
        folder = local_folder(ref)
        if folder is not None:
            pins[ref] = ref
            files: checkpoint.Files = checkpoint.LocalFiles(folder)
        else:
            hub = _hub(settings)
            pinned = hub.resolve(ref.path, ref.revision)
            pins[ref] = replace(ref, revision=pinned.revision)
            files = hub.files(pinned.repo, pinned.revision)
        opened[pins[ref]] = checkpoint.open_checkpoint(files, limits=checkpoint.OPERATOR, name=str(ref))
    return plan.make(asked.pinned(pins), opened, seed=seed)


def download_sources(made: plan.Plan, settings: Settings, progress: Show) -> dict[recipe.ModelRef, Path]:
    """Folders of the plan's sources; Hub repos are downloaded at their pinned commits and verified."""
    folders: dict[recipe.ModelRef, Path] = {}
    for ref in made.recipe.sources:
        folder = local_folder(ref)
        if folder is None:
            assert ref.revision is not None
            folder = settings.source_folder(ref.path, ref.revision)
            _hub(settings).download(ref.path, ref.revision, folder, progress=named(progress, f"Downloading {ref.path}"))
        folders[ref] = folder
    return folders


def evaluate_model(
    folder: Path, suite: str, limit: int | None, seed: int, settings: Settings, report: Show
) -> ModelEvaluation:
    """The operator's own evaluation of one folder. Raises Failed."""
    asked = EvaluateOptions(suite=suite, limit=limit)
    return measure.evaluate(folder, folder.name, asked, settings, settings.scratch / "evaluate", report, None, seed)


def model_folder(model: str, settings: Settings, report: Show) -> Path:
    """The folder of a model named on the command line: a local one, or a Hub repo downloaded at its present commit."""
    folder = Path(model)
    if folder.is_dir():
        return folder.resolve()
    hub = _hub(settings)
    pinned = hub.resolve(model)
    into = settings.source_folder(pinned.repo, pinned.revision)
    hub.download(pinned.repo, pinned.revision, into, progress=named(report, f"Downloading {model}"))
    return into


def local_folder(ref: recipe.ModelRef) -> Path | None:
    """The folder a reference means, None when it means a Hub repo: a folder that exists wins, as in mergekit."""
    folder = Path(ref.path)
    return folder if ref.revision is None and folder.is_dir() else None


def _hub(settings: Settings) -> Hub:
    """The Hub, only when a recipe names a repo: its client takes a second to import."""
    from bot.hub import Hub

    return Hub(settings.hub)
