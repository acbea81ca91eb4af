"""One stage of one job in its own process, without a write token: merge, then (in another process) evaluate.

    merge      download the pinned sources, verify them, merge  -> Merge
    evaluate   measure exactly the files of the manifest        -> Evaluation

Started by an executor as `python -m bot.worker STAGE SPEC RESULT`. Reads strangers' weights, so it holds no secret.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from bot.errors import Failed
from bot.executors import child
from bot.job import Evaluation, Merge, PublishedFile, Source
from bot.merge import checkpoint, plan, recipe
from bot.progress import Show, named
from bot.request import EvaluateOptions
from bot.settings import Settings, crashpoint

_EVALUATE = TypeAdapter(EvaluateOptions)
_SOURCES = TypeAdapter(tuple[Source, ...])
MANIFEST = "manifest.json"
TEMPLATE = "chat_template.jinja"


def merge(spec: Mapping[str, Any], settings: Settings, report: Show) -> dict[str, Any]:
    """Download, verify, merge into `spec["out"]`. A finished folder of an earlier attempt is checked and kept."""
    from bot.merge import engine

    started, out = time.monotonic(), Path(spec["out"])
    wanted = recipe.from_canonical(spec["recipe"])
    folders, dropped = _download(wanted, settings, report)
    crashpoint("download.after_verify")
    opened = {
        ref: checkpoint.open_checkpoint(checkpoint.LocalFiles(folder), limits=checkpoint.STRANGER, name=str(ref))
        for ref, folder in folders.items()
    }
    made = plan.make(wanted, opened, seed=spec["seed"])
    if not (out / MANIFEST).exists():
        shown = named(report, "Merging")
        engine.merge(made, folders, out, device=settings.device, on_nonfinite="fail", progress=shown)
    crashpoint("writer.after_rename")
    files = verified_files(out)
    fact = Merge(
        files=files,
        manifest=manifest_id(out),
        bytes=sum(file.bytes for file in files.values()),
        seconds=time.monotonic() - started,
        parameters=made.parameters,
        notices=(*dropped, *(dataclasses.asdict(notice) for notice in made.notices)),
    )
    return _json(fact)


def _download(
    wanted: recipe.Recipe, settings: Settings, report: Show
) -> tuple[dict[recipe.ModelRef, Path], list[dict[str, Any]]]:
    """The verified files of every source at its commit, and notices of what was left out of them."""
    from bot.hub import Hub

    hub = Hub(settings.hub)
    folders: dict[recipe.ModelRef, Path] = {}
    dropped: list[dict[str, Any]] = []
    for ref in wanted.sources:
        if ref.revision is None:
            raise Failed("INTERNAL", f"{ref} reached the worker without a commit.", "Tell the operator.")
        folder = settings.source_folder(ref.path, ref.revision)
        hub.download(ref.path, ref.revision, folder, progress=named(report, f"Downloading {ref.path}"))
        folders[ref] = folder
        if TEMPLATE in hub.files(ref.path, ref.revision).sizes() and not (folder / TEMPLATE).exists():
            text = f"The chat template of {ref.path} is not on the bot's list and was left out."
            dropped.append({"code": "TEMPLATE_DROPPED", "text": text, "count": 1})
    return folders, dropped


def verified_files(out: Path) -> dict[str, PublishedFile]:
    """The files of a finished merge, each re-hashed. Raises Failed CORRUPT_DOWNLOAD when the disk disagrees."""
    listed = json.loads((out / MANIFEST).read_text())
    files = {entry["path"]: PublishedFile(entry["bytes"], entry["sha256"]) for entry in listed["files"]}
    for name, file in files.items():
        found = _sha256(out / name)
        if found != file.sha256:
            raise Failed(
                "CORRUPT_DOWNLOAD",
                f"{name} changed on disk after the merge (expected {file.sha256[:8]}, found {found[:8]}).",
                "Ask for the merge again; the operator should look at the disk.",
            )
    return files


def manifest_id(out: Path) -> str:
    """Identity of the bytes: what is evaluated and what is published carry the same one."""
    return _sha256(out / MANIFEST)


def evaluate(spec: Mapping[str, Any], settings: Settings, report: Show) -> dict[str, Any]:
    """lm-eval on the merged model and on its sources (cached), then the Medusa speed test."""
    from bot import measure

    started = time.monotonic()
    out, scratch = Path(spec["out"]), Path(spec["scratch"])
    verified_files(out)
    if manifest_id(out) != spec["manifest"]:
        raise Failed(
            "CORRUPT_DOWNLOAD", "The merged files are not those that were recorded.", "Ask for the merge again."
        )
    asked = _EVALUATE.validate_python(spec["evaluate"])
    sources = _SOURCES.validate_python(spec["sources"])
    merged, parents = measure.scores(out, spec["manifest"], sources, asked, settings, scratch, report)
    crashpoint("eval.after_task")
    speed = measure.decode_speed(out, settings, scratch, report) if asked.speed == "medusa" else None
    fact = Evaluation(spec["manifest"], merged, parents, speed, time.monotonic() - started)
    return _json(fact)


def _json(fact: Merge | Evaluation) -> dict[str, Any]:
    return dict(TypeAdapter(type(fact)).dump_python(fact, mode="json"))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


if __name__ == "__main__":
    child.main({"merge": merge, "evaluate": evaluate})
