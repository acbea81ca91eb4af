"""Merge with stages: each intermediate is merged into scratch, then the result; then scratch is removed.

    SCRATCH/<plan digest>-<device>-<torch>/           a finished intermediate, a whole output folder of the engine
    SCRATCH/<plan digest>-<device>-<torch>.sources    the size, inode and time of the files it is made from
    SCRATCH/<plan digest>-<device>-<torch>.partial/   one that was interrupted; it continues from its journal

After a crash at any moment, the same call continues and gives an output of the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bot.errors import Refused, Transient
from bot.merge.checkpoints.checkpoint import LocalFiles
from bot.merge.execution import engine
from bot.merge.execution.engine import Merged
from bot.merge.execution.options import DEFAULTS, MergeOptions
from bot.merge.execution.partial import hold
from bot.merge.execution.provenance import MANIFEST, PROVENANCE, torch_version
from bot.merge.execution.unchanged import require_same
from bot.merge.planning.plan import Plan
from bot.merge.recipe.spec import ModelRef, Notice
from bot.storage import size_text


def merge(
    plan: Plan,
    folders: Mapping[ModelRef, Path],
    out: Path,
    options: MergeOptions = DEFAULTS,
    *,
    scratch: Path | None = None,
) -> Merged:
    """Carry out `plan` and the stages before it; `folders` holds what `plan.recipe.repos` names.

    scratch: folder of the intermediates, `OUT.stages` by default; they are removed once `out` is complete.
    Progress counts the bytes of all stages. Raises as `engine.merge`.
    """
    if not plan.stages:
        return engine.merge(plan, folders, out, options)
    started, out = time.monotonic(), Path(out)
    scratch = Path(scratch) if scratch is not None else out.with_name(out.name + ".stages")
    kind = f"{engine.choose_device(options.device).type}-torch-{torch_version()}"  # another torch may round otherwise
    places = {ref: scratch / f"{stage.digest[:32]}-{kind}" for ref, stage in plan.stages}
    if out.exists() or out.is_symlink():
        if _finished(out, plan):
            _remove(places.values(), scratch)  # left by a process killed between the end and the removal
        raise Refused("OUTPUT_EXISTS", f"{out} exists already.", "Name another folder, or remove it.", value=str(out))
    with _locked(scratch):
        _require_space(plan, places, scratch)
        merged = _merge_all(plan, folders, out, places, options)
        _remove(places.values(), scratch)
    return replace(merged, seconds=time.monotonic() - started)


def _merge_all(
    plan: Plan, folders: Mapping[ModelRef, Path], out: Path, places: Mapping[ModelRef, Path], options: MergeOptions
) -> Merged:
    """Merge every incomplete stage into its place, then the result into `out`."""
    here, done_before, notices = dict(folders), 0, list[Notice]()
    total = sum(part.bytes_out for part in plan.parts)
    for ref, stage in plan.stages:
        _require_same_sources(stage, here, places[ref], places)
        if not (places[ref] / MANIFEST).exists():
            engine.merge(stage, here, places[ref], _shifted(options, done_before, total, f"{ref}: "))
        recorded = json.loads((places[ref] / PROVENANCE).read_text())["notices"]
        notices += [Notice(entry["code"], entry["example"], entry["count"]) for entry in recorded]
        done_before += stage.bytes_out
        here[ref] = places[ref]
    merged = engine.merge(plan, here, out, _shifted(options, done_before, total, ""))
    return replace(merged, notices=(*notices, *merged.notices))


@contextmanager
def _locked(scratch: Path) -> Iterator[None]:
    """Lock `scratch` for this process. Raises `Refused(OUTPUT_EXISTS)`."""
    handle = -1
    while True:
        scratch.mkdir(parents=True, exist_ok=True)
        handle = hold(scratch)
        try:
            if os.path.samestat(os.fstat(handle), scratch.stat()):
                break
        except FileNotFoundError:
            pass  # the previous holder removed the folder between our opening and locking it
        os.close(handle)
    try:
        yield
    finally:
        os.close(handle)


def _require_same_sources(
    stage: Plan, folders: Mapping[ModelRef, Path], place: Path, stages: Iterable[ModelRef]
) -> None:
    """Record the source files beside an intermediate; refuse to continue one that was started with other files."""
    sources = {ref: LocalFiles(folder) for ref, folder in folders.items()}
    facts = engine.watched(stage, sources).facts()
    own = tuple(f"{ref}/" for ref in stages)
    facts = {file: fact for file, fact in facts.items() if not file.startswith(own)}
    note = _note(place)
    if place.exists() or _partial(place).exists():
        require_same(json.loads(note.read_text()) if note.exists() else {}, facts, place.parent)
    partial = note.with_name(note.name + ".partial")
    partial.write_text(json.dumps(facts))
    partial.rename(note)


def _note(place: Path) -> Path:
    return place.with_name(place.name + ".sources")


def _shifted(options: MergeOptions, before: int, total: int, label: str) -> MergeOptions:
    """Options of one part of the merge, whose progress counts in the whole."""
    progress = options.progress
    if progress is None:
        return options
    return replace(options, progress=lambda done, _, tensor: progress(before + done, total, label + tensor))


def _require_space(plan: Plan, places: Mapping[ModelRef, Path], scratch: Path) -> None:
    """Check before the first part that all parts fit on the disk together; each one is checked again when it begins."""
    if any(path.exists() or _partial(path).exists() for path in places.values()):
        return  # part of it is on the disk already
    scratch.mkdir(parents=True, exist_ok=True)
    need, free = sum(part.disk_bytes for part in plan.parts), shutil.disk_usage(scratch).free
    if need > free:
        raise Transient(
            "DISK_LOW",
            f"the merge and its {len(plan.stages)} stages need {size_text(need)} of disk; {size_text(free)} are free.",
            "Free some space, or name a folder on another disk.",
            retry_after_s=600.0,
        )


def _partial(place: Path) -> Path:
    return place.with_name(place.name + ".partial")


def _finished(out: Path, plan: Plan) -> bool:
    try:
        return bool(json.loads((out / PROVENANCE).read_text())["plan_digest"] == plan.digest)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _remove(places: Iterable[Path], scratch: Path) -> None:
    for place in places:
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(_partial(place), ignore_errors=True)
        _note(place).unlink(missing_ok=True)
    if scratch.is_dir() and not any(scratch.iterdir()):
        scratch.rmdir()
