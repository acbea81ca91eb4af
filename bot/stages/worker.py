"""One stage of one job in its own process, without a write token: merge, then (in another process) evaluate.

    merge      download the pinned sources, verify them, merge  -> Merge
    evaluate   measure exactly the files of the manifest        -> Evaluation

Started by an executor as `python -m bot.stages.worker STAGE SPEC RESULT`. Reads untrusted
weights, so it holds no secret.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from bot.errors import Failed
from bot.jobs import stage_process
from bot.jobs.job import Evaluation, Merge, PublishedFile, Source
from bot.jobs.request import EvaluateOptions
from bot.merge.checkpoints import checkpoint
from bot.merge.planning import planner
from bot.merge.planning.output_names import MANIFEST
from bot.merge.recipe import reading as recipe
from bot.progress import Show, named
from bot.settings import Settings, crashpoint
from bot.stages import evaluation, published_heads, sanity_check, sources, speed_test
from bot.storage import sha256_file

if TYPE_CHECKING:
    from bot.hub import Hub

_EVALUATE = TypeAdapter(EvaluateOptions)
_SOURCES = TypeAdapter(tuple[Source, ...])


def merge(spec: Mapping[str, Any], settings: Settings, report: Show) -> dict[str, Any]:
    """Plan, fetch, verify, merge into `spec["out"]`. A finished folder of an earlier attempt is checked and kept."""
    from bot.hub import Hub
    from bot.merge.execution import stages
    from bot.merge.execution.options import MergeOptions

    started, out = time.monotonic(), Path(spec["out"])
    hub = Hub(settings.hub)
    seen = sources.opened(recipe.from_canonical(spec["recipe"]), lambda: hub, limits=checkpoint.STRANGER)
    made = planner.make(seen.recipe, seen.sources, seed=spec["seed"], limits=checkpoint.STRANGER)
    measured = _measured(spec, settings, hub)
    # What is evaluated later has to be here whole; of the others only what the plan reads.
    whole = [ref for ref in seen.repos if (ref.path, ref.revision) in measured]
    here = sources.fetched(made, seen, lambda: hub, settings, report, whole=whole)
    crashpoint("download.after_verify")
    if not (out / MANIFEST).exists():
        options = MergeOptions(
            device=settings.device,
            on_nonfinite="fail",
            progress=named(report, "Merging"),
            known=lambda: {ref: each.files for ref, each in here.items()},
        )
        stages.merge(made, {ref: each.folder for ref, each in here.items()}, out, options)
    for file in out.iterdir():
        file.chmod(0o444)  # what is measured and what is published are the same bytes
    crashpoint("writer.after_rename")
    files = verified_files(out)
    fact = Merge(
        files=files,
        manifest=manifest_id(out),
        bytes=sum(file.bytes for file in files.values()),
        seconds=time.monotonic() - started,
        parameters=made.parameters,
        notices=tuple(dataclasses.asdict(notice) for notice in made.notices),
    )
    return _json(fact)


def _measured(spec: Mapping[str, Any], settings: Settings, hub: Hub) -> set[tuple[str, str]]:
    """Repo and commit of the sources that will be evaluated beside their merge: those that never were."""
    asked = _EVALUATE.validate_python(spec["evaluate"])
    if evaluation.measures_nothing(asked):
        return set()
    return {
        (source.repo, source.revision)
        for source in _SOURCES.validate_python(spec["sources"])
        if not (source.adapter or evaluation.is_known(source, asked, settings, hub))
    }


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
    """A look whether the merge speaks, lm-eval on it and its sources (cached), the verdict, the Medusa speed test."""
    started = time.monotonic()
    out, scratch = Path(spec["out"]), Path(spec["scratch"])
    verified_files(out)
    if manifest_id(out) != spec["manifest"]:
        raise Failed(
            "CORRUPT_DOWNLOAD", "The merged files are not those that were recorded.", "Ask for the merge again."
        )
    asked = _EVALUATE.validate_python(spec["evaluate"])
    parts = _SOURCES.validate_python(spec["sources"])
    signs = sanity_check.vital_signs(out, spec["manifest"], parts, asked, settings, report)
    merged, parents = evaluation.scores(out, spec["manifest"], parts, asked, settings, scratch, report)
    verdict, not_compared = sanity_check.compared(merged, parents, settings)
    crashpoint("eval.after_task")
    speed = speed_test.of_merge(out, parts, settings, scratch, report) if asked.speed == "medusa" else None
    heads = {} if speed is None else published_heads.carry(scratch / "medusa", speed, scratch / "carried")
    took = time.monotonic() - started
    fact = Evaluation(spec["manifest"], merged, parents, speed, took, heads, verdict, not_compared, signs)
    return _json(fact)


def _json(fact: Merge | Evaluation) -> dict[str, Any]:
    return dict(TypeAdapter(type(fact)).dump_python(fact, mode="json"))


def _sha256(file: Path) -> str:
    return sha256_file(file)


if __name__ == "__main__":
    stage_process.main({"merge": merge, "evaluate": evaluate})
