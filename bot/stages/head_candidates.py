"""Medusa heads to try on a merged model: those of its parents, and those merged by its recipe.

A model's repo or folder holds its heads under `medusa/`. From untrusted repos only safetensors in our own layout, which
covers V1 and V2, are read.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bot.errors import Failed, MergebotError, Refused
from bot.jobs.job import Source
from bot.merge.recipe import reading
from bot.merge.recipe.spec import ModelRef, Recipe
from bot.settings import Settings
from bot.stages import merged_heads
from bot.stages.error_subjects import translated
from bot.stages.sources import local_folder

if TYPE_CHECKING:
    from bot.hub import Hub
    from evaluators.medusa import Given

CARRIED = "medusa"
RECIPE = "mergekit_config.yml"
SMALL_FILES = ("config.json", "training.json")
LIMIT_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Parent:
    """One source of a merge: the folder of its heads or the reason for their absence, and its own folder if local."""

    name: str
    ref: ModelRef
    heads: Path | None
    model: Path | None = None
    absent_because: str | None = None


def by_hand(
    model: Path, own: Sequence[Path], parents: Sequence[str], scratch: Path, settings: Settings, seed: int
) -> tuple[Given, ...]:
    """Heads named on the command line: some made for `model`, and NAME=DIR for its parents.

    DIR holds heads, or is the folder of a model with heads. Raises Refused for names that the recipe in `model` lacks,
    Failed FILE_NOT_FOUND for missing folders.
    """
    for folder in own:
        require_folder(folder)
    asked = recipe_of(model)
    found = tuple(_named(text, asked, settings) for text in parents)
    from evaluators.medusa import Given

    names = _told_apart([folder.name for folder in own])
    rows = tuple(
        Given(f"heads:{name}", "fresh", _heads_in(folder), source=folder.name)
        for name, folder in zip(names, own, strict=True)
    )
    return (*candidates(asked, found, scratch, seed), *rows)


def of_job(
    model: Path, sources: Sequence[Source], scratch: Path, settings: Settings, hub: Hub, seed: int
) -> tuple[Given, ...]:
    """Heads of the sources of a job; empty if none has any."""
    found = []
    for source in sources:
        if source.adapter:
            continue
        into = scratch / "parents" / source.repo.replace("/", "--")
        heads, reason = None, None
        try:
            heads = fetched(hub, source.repo, source.revision, into)
        except MergebotError as error:  # no heads are no reason to fail a job
            reason = error.message
        folder = settings.source_folder(source.repo, source.revision)
        ref = ModelRef(source.repo, source.revision)
        found.append(Parent(source.repo, ref, heads, folder if folder.is_dir() else None, reason))
    if all(parent.heads is None for parent in found):
        return ()
    return candidates(recipe_of(model), found, scratch, seed)


def candidates(asked: Recipe | None, parents: Sequence[Parent], scratch: Path, seed: int) -> tuple[Given, ...]:
    """A row per parent, and one for their heads merged by the recipe `asked`, made under `scratch`."""
    from evaluators.medusa import Given

    if not parents:
        return ()
    rows = [
        Given(
            f"parent:{parent.name}", "parent", parent.heads,
            parent.absent_because or (None if parent.heads else "it carries no heads."), str(parent.ref),
        )
        for parent in parents
    ]  # fmt: skip
    if asked is None:
        return (*rows, Given("merged", "merged", None, f"the model has no {RECIPE} that says how it was merged."))
    out = scratch / "merged_heads"
    shutil.rmtree(out, ignore_errors=True)
    try:
        heads = {parent.ref: _in_our_layout(parent, scratch) for parent in parents if parent.heads is not None}
        models = {parent.ref: parent.model for parent in parents if parent.model is not None}
        merged_heads.merge(asked, heads, out, models=models, seed=seed)
    except MergebotError as error:
        return (*rows, Given("merged", "merged", None, error.message))
    return (*rows, Given("merged", "merged", out, source=f"{asked.method} of the parents' heads"))


def _told_apart(names: Sequence[str]) -> list[str]:
    """The names, with a number added to repeated ones."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if names.count(name) == 1 else f"{name}-{seen[name]}")
    return found


def recipe_of(model: Path) -> Recipe | None:
    """Recipe of a merged folder; None if it has none that can be read."""
    try:
        text = (model / RECIPE).read_text(encoding="utf-8")
        return reading.parse(text, unknown_keys="ignore", file=RECIPE)
    except (OSError, UnicodeDecodeError, Refused):
        return None


def fetched(hub: Hub, repo: str, revision: str, into: Path) -> Path | None:
    """Heads of a repo at a commit, complete and verified, in `into`; None if the repo has none."""
    files = hub.files(repo, revision)
    sizes, hashes = files.sizes(), files.sha256s()
    weights = f"{CARRIED}/{merged_heads.WEIGHTS}"
    if weights not in sizes:
        return None
    names = [name for name in (weights, *(f"{CARRIED}/{small}" for small in SMALL_FILES)) if name in sizes]
    total = sum(sizes[name] for name in names)
    if total > LIMIT_BYTES:
        raise Refused(
            "DOWNLOAD_TOO_LARGE", f"The heads of {repo} have {total:,} bytes; the limit is {LIMIT_BYTES:,}.",
            "Measure them yourself with `mergebot medusa bench`.", value=repo,
        )  # fmt: skip
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    for name in names:
        data = files.read(name, 0, sizes[name])
        if len(data) != sizes[name] or hashes[name] not in (None, hashlib.sha256(data).hexdigest()):
            raise Failed("CORRUPT_DOWNLOAD", f"{name} of {repo} did not arrive as the commit says.", "Try again later.")
        (into / name.rpartition("/")[2]).write_bytes(data)
    return into


def _named(text: str, asked: Recipe | None, settings: Settings) -> Parent:
    name, equals, place = text.partition("=")
    if not equals or not name or not place:
        raise Refused("VALUE_OUT_OF_RANGE", f"--parent {text[:60]!r} names no folder.", "Write --parent NAME=DIR.")
    folder = Path(place)
    require_folder(folder)
    ref = ModelRef(name) if asked is None else _source(asked, name)
    return Parent(name, ref, _heads_in(folder), _model_of(ref, folder, settings))


def _source(asked: Recipe, name: str) -> ModelRef:
    """The source of the recipe that `name` means: all of its reference, its path, or the last word of that."""
    stages = {stage.ref for stage in asked.stages}
    parts = asked.documents
    refs = dict.fromkeys(ref for part in parts for ref in part.sources if ref not in stages)
    for spelt in (str, lambda ref: ref.path, lambda ref: ref.path.rstrip("/").rpartition("/")[2]):
        hits = [ref for ref in refs if spelt(ref) == name]
        if len(hits) == 1:
            return hits[0]
    raise Refused(
        "SOURCE_NOT_FOUND", f"The model was not merged from one source {name[:60]!r}.",
        f"Its sources are {', '.join(map(str, refs))}.", value=name,
    )  # fmt: skip


def _model_of(ref: ModelRef, folder: Path, settings: Settings) -> Path | None:
    """The parent's own checkpoint: the named folder if it is a model, else the local folder of its source."""
    if (folder / CARRIED).is_dir() and (folder / "config.json").is_file():
        return folder
    if ref.lora is not None:
        return None
    if ref.revision is None:
        return local_folder(ref)
    cached = settings.source_folder(ref.path, ref.revision)
    return cached if cached.is_dir() else None


def _heads_in(folder: Path) -> Path:
    return folder / CARRIED if (folder / CARRIED).is_dir() else folder


def _in_our_layout(parent: Parent, scratch: Path) -> Path:
    """Folder of the parent's heads, converted if they came in another layout."""
    assert parent.heads is not None
    if (parent.heads / merged_heads.WEIGHTS).is_file() or parent.model is None:
        return parent.heads
    from evaluators.medusa import formats
    from evaluators.medusa.model import causal_lm

    into = scratch / "read" / parent.name.replace("/", "--")
    with translated(Refused):
        heads, _ = formats.load(parent.heads, causal_lm.load(parent.model))
        formats.save(heads, into)
    return into


def require_folder(folder: Path) -> None:
    """Raises Failed FILE_NOT_FOUND."""
    if not folder.is_dir():
        raise Failed("FILE_NOT_FOUND", f"There is no folder {folder}.", "Name a folder that holds Medusa heads.")
