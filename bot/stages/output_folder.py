"""Output folder of a merge: reuse, creation and replacement.

    OUT               complete or absent, as the engine leaves it
    OUT.replacement   with `--overwrite`, the new merge once complete; it grows in OUT.replacement.partial
    OUT.replaced      the old merge, between the two renames that exchange them and until it is removed

After a kill between the renames OUT is absent and both folders exist; the next merge first restores the old one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from bot.errors import Refused
from bot.merge.execution.provenance import MANIFEST, MANIFEST_SCHEMA, PROVENANCE
from bot.merge.planning.plan import Plan
from bot.stages.sources import Opened
from bot.storage import sync_folder


def resolved_folder(out: Path) -> Path:
    """`out` as a named folder, with links to folders resolved: a merge grows beside its target."""
    return out.resolve() if out.name in ("", "..") or (out.is_symlink() and out.is_dir()) else out


def holds(out: Path, made: Plan) -> bool:
    """Return whether `out` is the complete result of this plan, every file with its original size."""
    document = _json(out / PROVENANCE)
    try:
        return bool(document["plan_digest"] == made.digest) and _whole(out, document["outputs"])
    except (KeyError, TypeError, AttributeError):
        return False


def require_up_to_date(out: Path, made: Plan, opened: Opened) -> None:
    """Refuse if a local source changed after `out` was made: headers do not show changed weights."""
    finished = (out / PROVENANCE).stat().st_mtime_ns
    for path in _read_files(made, opened):
        if path.stat().st_ctime_ns > finished:
            raise Refused(
                "OUTPUT_EXISTS",
                f"{out} holds this merge, but {path} was changed after it was made.",
                "Add --overwrite to merge again, or name another folder.",
                value=str(out),
            )


def place_for(out: Path, made: Plan, opened: Opened, *, overwrite: bool) -> Path:
    """Folder that the engine merges to: `out`, or its replacement beside it.

    Raises Refused OUTPUT_EXISTS for a folder that mergebot did not write, OUTPUT_UNWRITABLE if none can be created.
    """
    _require_writable(out)
    if not out.exists() and not out.is_symlink():
        return out
    if out.is_dir() and not out.is_symlink() and not any(out.iterdir()):
        _require_removable(out)
        return out
    if not overwrite:
        ours = _strange_file(out) is None
        raise Refused(
            "OUTPUT_EXISTS",
            f"{out} {'holds another merge' if ours else 'exists already'}.",
            "Add --overwrite to replace it, or name another folder." if ours else "Name another folder, or remove it.",
            value=str(out),
        )
    _require_ours(out)
    if any(folder.resolve() == out.resolve() for folder in opened.folders.values()):
        raise Refused("OUTPUT_EXISTS", f"{out} is a source of this merge.", "Name another folder.", value=str(out))
    place = _beside(out, "replacement")
    if place.exists():  # complete; its process was killed before the exchange
        _require_ours(place)
        _clear(place)
    return place


def remove_empty(place: Path) -> None:
    """Remove `place` if it is empty, so that a folder can be renamed to it."""
    with suppress(OSError):
        place.rmdir()


def put_in_place(place: Path, out: Path) -> None:
    """Exchange `out` for the complete `place` beside it and remove the old one."""
    if place == out:
        return
    old = _beside(out, "replaced")
    out.rename(old)
    place.rename(out)
    sync_folder(out.parent)
    _clear(old)


def settle(out: Path) -> None:
    """Restore or finish removing the old output after a process was killed during the exchange."""
    old = _beside(out, "replaced")
    if not old.is_dir() or _strange_file(old) is not None:
        return
    if out.exists():
        _clear(old)
    elif _whole(old, {entry["path"]: entry for entry in _json(old / MANIFEST)["files"]}):
        old.rename(out)


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f"{out.name}.{what}")


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _whole(folder: Path, files: dict[str, Any]) -> bool:
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    return all(sizes.get(name) == fact["bytes"] for name, fact in files.items())


def _read_files(made: Plan, opened: Opened) -> Iterator[Path]:
    """Yield the files in local folders that a plan reads."""
    for part in made.parts:
        named = [(source.model.bare, file) for source in part.sources for file in source.headers]
        for ref, file in [*named, *((copied.model, copied.file) for copied in part.copies)]:
            if ref in opened.folders:
                yield opened.folders[ref] / file


def _require_writable(out: Path) -> None:
    """Create and remove a folder beside `out`: a path such as /proc/x looks writable and is not."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        Path(tempfile.mkdtemp(prefix=f".{out.name[:40]}.", dir=out.parent)).rmdir()
    except OSError as error:
        raise Refused(
            "OUTPUT_UNWRITABLE",
            f"{out} cannot be created: {os.strerror(error.errno or 0)}.",
            "Name a folder that you may write to.",
            value=str(out),
        ) from None


def _require_removable(empty: Path) -> None:
    if empty.samefile(Path.cwd()) or os.path.ismount(empty):
        what = "the current folder" if empty.samefile(Path.cwd()) else "a mount point"
        raise Refused(
            "OUTPUT_EXISTS",
            f"{empty} is {what}, which a merge cannot replace.",
            f"Name a folder in it, such as {empty / 'merged'}.",
            value=str(empty),
        )


def _strange_file(folder: Path) -> str | None:
    """Return the first file in `folder` that its manifest does not list, or None."""
    listed = _json(folder / MANIFEST)
    names = [path.name for path in sorted(folder.iterdir())] if folder.is_dir() else [folder.name]
    try:
        known = {entry["path"] for entry in listed["files"]} if listed["schema"] == MANIFEST_SCHEMA else set()
    except (KeyError, TypeError):
        known = set()
    return next((name for name in names if PROVENANCE not in known or name not in {*known, MANIFEST}), None)


def _require_ours(out: Path) -> None:
    strange = _strange_file(out)
    if strange is not None:
        raise Refused(
            "OUTPUT_EXISTS",
            f"{out} holds {strange[:60]}, which is not a file of a merge. --overwrite replaces only outputs of merges.",
            "Move that file away, or name another folder.",
            value=str(out),
        )


def _clear(folder: Path) -> None:
    """Remove an output of mergebot; the manifest goes last, since it identifies the other files."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
        path.unlink()
    folder.rmdir()


def new_folder(path: Path) -> Path:
    """Return `path` if it is an empty folder or does not exist. Raises Refused OUTPUT_EXISTS."""
    if path.is_dir() and not any(path.iterdir()):
        return path
    if path.exists():
        what = "is not empty" if path.is_dir() else "is a file"
        raise Refused("OUTPUT_EXISTS", f"{path} {what}.", "Name a new folder.", value=str(path))
    return path
