"""Work of the command line: local folders beside Hub repos, without queue and publication."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bot.errors import Failed, Refused
from bot.merge.checkpoints.checkpoint import LocalFiles
from bot.merge.checkpoints.pickled import pickles
from bot.merge.execution.options import MergeOptions
from bot.merge.planning import plan, planner
from bot.merge.recipe import reading as recipe
from bot.progress import Show, named
from bot.settings import Settings
from bot.stages import output_folder, sources, verification
from bot.stages.sources import Opened
from bot.stages.verification import Verdict

if TYPE_CHECKING:
    from bot.hub import Hub
    from bot.merge.execution.engine import Merged
    from evaluators.comparison.verdict import Comparison
    from evaluators.harness import Estimate
    from evaluators.harness.eval_config import Question
    from evaluators.harness.scores import ModelEvaluation
    from evaluators.sanity_check import SanityCheck


def read_recipe(file: Path, *, unknown_keys: str = "refuse") -> recipe.Recipe:
    """Read the recipe in `file`; `unknown_keys`: refuse or ignore. Raises Refused, Failed FILE_NOT_FOUND."""
    if unknown_keys not in ("refuse", "ignore"):
        raise Refused(
            "VALUE_OUT_OF_RANGE", f"--unknown-keys does not accept {unknown_keys[:40]!r}.", "Write refuse or ignore."
        )
    ignored = unknown_keys == "ignore"
    return recipe.parse(
        read_text(file), trust="operator", unknown_keys="ignore" if ignored else "refuse", file=str(file)
    )


def read_text(file: Path) -> str:
    """Read the text of a recipe file. Raises Failed FILE_NOT_FOUND."""
    try:
        return file.read_text()
    except OSError as error:
        raise Failed("FILE_NOT_FOUND", f"{file} cannot be read: {error.strerror}.", "Name a recipe file.") from None
    except UnicodeDecodeError:
        raise Failed("FILE_NOT_FOUND", f"{file} is not a text file.", "Name a recipe file.") from None


@dataclass(frozen=True, slots=True)
class Planned:
    """Plan with the opened sources that it is made from."""

    plan: plan.Plan
    opened: Opened


def plan_from_headers(
    asked: recipe.Recipe,
    settings: Settings,
    *,
    seed: int = 0,
    shard_limit_bytes: int = plan.SHARD_LIMIT_BYTES,
    allow_pickle: bool = False,
) -> Planned:
    """Plan of a recipe from headers alone: local folders are opened, Hub repos are read by range.

    allow_pickle: convert pickled weights in local folders to safetensors first, in a child process.
    """
    seen = sources.opened(asked, _hub(settings), convert=_converter(settings, allow_pickle))
    made = planner.make(seen.recipe, seen.sources, seed=seed, shard_limit_bytes=shard_limit_bytes)
    return Planned(made, seen)


def merge(
    planned: Planned,
    out: Path,
    settings: Settings,
    report: Show,
    options: MergeOptions,
    *,
    hash_sources: bool = False,
    overwrite: bool = False,
) -> Merged | None:
    """Fetch the bytes that the plan reads and merge them into `out`; None if `out` already holds this merge.

    overwrite: replace an output of mergebot once the new one is complete. hash_sources: record the SHA-256 of local
    weight files in the provenance, so that `verify` can tell a changed source from a changed output; hashing takes a
    core while the files are read, so it is off by default. Raises `bot.errors`.
    """
    made, out = planned.plan, output_folder.resolved_folder(out)
    output_folder.settle(out)
    if not overwrite and output_folder.holds(out, made):
        output_folder.require_up_to_date(out, made, planned.opened)
        _remove_stages(made, out, options)
        return None
    place = output_folder.place_for(out, made, planned.opened, overwrite=overwrite)
    from bot.merge.execution import engine, stages

    engine.require_device(options.device, made)  # before anything is downloaded
    here = sources.fetched(made, planned.opened, _hub(settings), settings, report)
    with sources.hashing_sources(here, made if hash_sources else None) as known:
        folders = {ref: each.folder for ref, each in here.items()}
        output_folder.remove_empty(place)
        merged = stages.merge(made, folders, place, replace(options, progress=named(report, "Merging"), known=known))
    output_folder.put_in_place(place, out)
    return merged


def _remove_stages(made: plan.Plan, out: Path, options: MergeOptions) -> None:
    """Remove stages left by a process that died after the merge: the engine removes them, then refuses."""
    if made.stages and out.with_name(out.name + ".stages").is_dir():
        from bot.merge.execution import stages

        with suppress(Refused):
            stages.merge(made, {}, out, options)


def _converter(settings: Settings, allow_pickle: bool) -> Callable[[Path], Path]:
    """Function that replaces a local folder of pickled weights by one of safetensors, if that is allowed."""
    from bot.stages import unpickling

    return functools.partial(unpickling.as_safetensors, settings=settings) if allow_pickle else _without_pickles


def _without_pickles(folder: Path) -> Path:
    files = LocalFiles(folder).sizes()
    found = pickles(files)
    if found and not any(name.endswith(".safetensors") for name in files):
        raise Refused(
            "SOURCE_NOT_SAFETENSORS",
            f"{folder} has only pickled weights, such as {found[0]}.",
            "Add --allow-pickle to convert them in a process that does not execute pickled code.",
            value=str(folder),
        )
    return folder


def verify(
    model: str, settings: Settings, report: Show, *, device: str = "auto", allow_pickle: bool = False
) -> Verdict:
    """Merge a folder's or repo's model again from its provenance and compare. Raises `bot.errors`."""
    convert = _converter(settings, allow_pickle)
    return verification.verified(model, settings, _hub(settings), report, device=device, convert=convert)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Evaluations by model name, the model under test first; `known` names those that were stored."""

    found: Mapping[str, ModelEvaluation]
    known: frozenset[str]


def whole_models(names: Sequence[str], settings: Settings, report: Show) -> dict[str, tuple[Path, str]]:
    """Folder and content identity (commit or digest) of each model, by name.

    Raises Refused for a name that is neither a folder nor a repo, Failed MODEL_UNLOADABLE for a folder without a model.
    """
    from evaluators.content import content_digest

    found = {}
    for name in dict.fromkeys(names):
        folder, identity = _whole_model(name, settings, report)
        found[name] = folder, identity or content_digest(folder)
    return found


def evaluate(
    models: Mapping[str, tuple[Path, str]],
    question: Question,
    settings: Settings,
    report: Show,
    on_estimate: Callable[[str, Estimate], None],
) -> Evaluated:
    """Evaluate all `whole_models` under the same conditions; stored evaluations are reused.

    `on_estimate` is called with the estimate of each model that is evaluated now. Raises Failed as the harness does.
    """
    from bot.stages import evaluation

    found: dict[str, ModelEvaluation] = {}
    computed: set[str] = set()

    def begun(model: str, estimate: Estimate) -> None:
        computed.add(model)
        on_estimate(model, estimate)

    for model, (folder, identity) in models.items():
        scratch = settings.scratch / "evaluate"
        subject = evaluation.Model(folder, model, identity)
        estimated = functools.partial(begun, model)
        found[model] = evaluation.evaluate(subject, question, settings, scratch, report, estimated)
    return Evaluated(found, frozenset(found) - computed)


def require_writable(file: Path, *, overwrite: bool) -> None:
    """Refuse to overwrite scores, before the evaluation starts. Raises OUTPUT_EXISTS."""
    there = [path for path in (file, file.with_suffix(".svg")) if path.exists()]
    if file.is_dir() or (there and not overwrite):
        raise Refused(
            "OUTPUT_EXISTS",
            f"{there[0]} {'is a folder' if file.is_dir() else 'exists already'}.",
            "Name another file." if file.is_dir() else "Add --overwrite to replace it, or name another file.",
            value=str(file),
        )


def write_evaluations(
    file: Path,
    found: Mapping[str, ModelEvaluation],
    comparison: Comparison | None,
    looks: Mapping[str, SanityCheck],
    settings: Settings,
) -> list[Path]:
    """Write the evaluations as JSON, with the folders of their samples, the sanity checks and the comparison.

    The comparison is also drawn beside the file. Returns what was written.
    """
    from evaluators.comparison.remarks import remarks
    from evaluators.pictures.score_figure import score_figure

    model, first = next(iter(found.items()))
    document = {
        "model": model,
        "against": list(found)[1:],
        "suite": first.suite,
        "suite_digest": first.suite_digest,
        "evaluations": {name: _as_dict(each, settings) for name, each in found.items()},
        "first_look": {name: signs.as_dict() for name, signs in looks.items()},
        "comparison": None if comparison is None else comparison.named(model).as_dict(),
        "remarks": remarks(found),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n")
    drawn = "" if comparison is None else score_figure(comparison, Path(model).name or model)
    picture = file.with_suffix(".svg")
    if not drawn:
        picture.unlink(missing_ok=True)  # drawn from the previous content of the file
        return [file]
    picture.write_text(drawn, encoding="utf-8")
    return [file, picture]


def _as_dict(evaluation: ModelEvaluation, settings: Settings) -> dict[str, object]:
    from evaluators.harness.results import folder_of

    return {
        **evaluation.as_dict(),
        "average": evaluation.average,
        "average_interval95": evaluation.average_interval95,
        "folder": str(folder_of(evaluation, settings.evaluations)),
    }


def model_folder(model: str, settings: Settings, report: Show) -> Path:
    """Folder of a model named on the command line: a local one, or a Hub repo downloaded at its current commit."""
    return _whole_model(model, settings, report)[0]


def _whole_model(model: str, settings: Settings, report: Show) -> tuple[Path, str | None]:
    """Return the folder and, for a Hub repo, `repo@commit`, the identity of its content."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise Failed("MODEL_UNLOADABLE", f"{folder} holds no config.json.", "Name the folder of a model.")
        return sources.whole_folder(folder).resolve(), None
    pinned = sources.trusted_repo(model, None, _hub(settings))
    hub = _hub(settings)()
    into = settings.source_folder(pinned.repo, pinned.revision)
    hub.download(pinned.repo, pinned.revision, into, progress=named(report, f"Downloading {model}"))
    return into, f"{pinned.repo}@{pinned.revision}"


def _hub(settings: Settings) -> Callable[[], Hub]:
    """Hub client, created on first use because its import takes a second."""

    @functools.cache
    def hub() -> Hub:
        from bot.hub import Hub

        return Hub(settings.hub)

    return hub
