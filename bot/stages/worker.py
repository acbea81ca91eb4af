"""One stage of one job in its own process, without a write token: merge, then (in another process) evaluate.

    merge      MergeSpec -> Merge: download the pinned sources, verify and merge them
    evaluate   EvaluateSpec -> Evaluation: measure exactly the files of the manifest

Started by an executor as `python -m bot.stages.worker STAGE SPEC RESULT PARENT`. It reads untrusted weights and holds
no secret.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bot.errors import Failed
from bot.jobs import stage_process
from bot.jobs.job import Evaluation, Merge, PublishedFile
from bot.jobs.specs import EvaluateSpec, MergeSpec
from bot.merge.checkpoints import checkpoint
from bot.merge.execution.provenance import MANIFEST
from bot.merge.planning import planner
from bot.merge.recipe import reading as recipe
from bot.progress import Show, named
from bot.settings import Settings, failpoint
from bot.stages import evaluation, published_heads, sanity_check, sources, speed_test
from bot.storage import sha256_file

if TYPE_CHECKING:
    from bot.hub import Hub


def merge(spec: MergeSpec, settings: Settings, report: Show) -> Merge:
    """Plan, fetch, verify, merge into `spec.out`. A complete folder of an earlier attempt is checked and kept."""
    from bot.hub import Hub
    from bot.merge.execution import stages
    from bot.merge.execution.options import MergeOptions

    started, out = time.monotonic(), spec.out
    hub = Hub(settings.hub)
    seen = sources.opened(recipe.from_canonical(spec.recipe), lambda: hub, limits=checkpoint.UNTRUSTED)
    made = planner.make(seen.recipe, seen.sources, seed=spec.seed, limits=checkpoint.UNTRUSTED)
    measured = _measured(spec, settings, hub)
    # What is evaluated later has to be here whole; of the others only what the plan reads.
    whole = [ref for ref in seen.repos if (ref.path, ref.revision) in measured]
    here = sources.fetched(made, seen, lambda: hub, settings, report, whole=whole)
    failpoint("download.after_verify")
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
    failpoint("writer.after_rename")
    files = verified_files(out)
    return Merge(
        files=files,
        manifest=manifest_id(out),
        bytes=sum(file.bytes for file in files.values()),
        seconds=time.monotonic() - started,
        parameters=made.parameters,
        notices=tuple(dataclasses.asdict(notice) for notice in made.notices),
    )


def _measured(spec: MergeSpec, settings: Settings, hub: Hub) -> set[tuple[str, str]]:
    """Repo and commit of the sources without a stored evaluation: they are evaluated beside the merge."""
    if evaluation.measures_nothing(spec.evaluate):
        return set()
    return {
        (source.repo, source.revision)
        for source in spec.sources
        if not (source.adapter or evaluation.is_known(source, spec.evaluate, settings, hub))
    }


def verified_files(out: Path) -> dict[str, PublishedFile]:
    """The files of a finished merge, each re-hashed. Raises Failed CORRUPT_DOWNLOAD when the disk disagrees."""
    listed = json.loads((out / MANIFEST).read_text())
    files = {entry["path"]: PublishedFile(entry["bytes"], entry["sha256"]) for entry in listed["files"]}
    for name, file in files.items():
        found = sha256_file(out / name)
        if found != file.sha256:
            raise Failed(
                "CORRUPT_DOWNLOAD",
                f"{name} changed on disk after the merge (expected {file.sha256[:8]}, found {found[:8]}).",
                "Ask for the merge again; the operator should look at the disk.",
            )
    return files


def manifest_id(out: Path) -> str:
    """SHA-256 of the manifest, which identifies the evaluated and published bytes."""
    return sha256_file(out / MANIFEST)


def evaluate(spec: EvaluateSpec, settings: Settings, report: Show) -> Evaluation:
    """Sanity check, lm-eval on the merge and its sources (stored results are reused), verdict, Medusa speed test."""
    started = time.monotonic()
    out, scratch, options = spec.out, spec.scratch, spec.evaluate
    verified_files(out)
    if manifest_id(out) != spec.manifest:
        raise Failed(
            "CORRUPT_DOWNLOAD", "The merged files are not those that were recorded.", "Ask for the merge again."
        )
    signs = sanity_check.sanity_checks(out, spec.manifest, spec.sources, options, settings, report)
    merged, parents = evaluation.scores(out, spec.manifest, spec.sources, options, settings, scratch, report)
    verdict, not_compared = sanity_check.compared(merged, parents, settings)
    failpoint("eval.after_task")
    speed = speed_test.of_merge(out, spec.sources, settings, scratch, report) if options.speed == "medusa" else None
    heads = {} if speed is None else published_heads.carry(scratch / "medusa", speed, scratch / "carried")
    took = time.monotonic() - started
    return Evaluation(spec.manifest, merged, parents, speed, took, heads, verdict, not_compared, signs)


if __name__ == "__main__":
    stage_process.main({"merge": (MergeSpec, merge), "evaluate": (EvaluateSpec, evaluate)})
