"""Verification of a merged model: repeats the merge from its provenance and names every difference.

model -> provenance -> its sources, pinned -> plan -> fetch -> merge into scratch -> compare
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bot.errors import Failed, Refused
from bot.merge.checkpoints.checkpoint import TRUSTED, UNTRUSTED, Files, LocalFiles
from bot.merge.execution import verify
from bot.merge.execution.options import MergeOptions
from bot.merge.execution.verify import Claim, Difference
from bot.merge.planning import plan, planner
from bot.merge.planning.plan import NUMERICS_VERSION
from bot.merge.recipe.spec import ModelRef
from bot.progress import Show, named
from bot.settings import Settings
from bot.stages import sources

if TYPE_CHECKING:
    from bot.hub import Hub

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of a verification; `differences` is empty if everything matches the provenance."""

    model: str
    tensors: int
    bytes: int
    differences: tuple[Difference, ...]
    remarks: tuple[str, ...]

    @property
    def sentence(self) -> str:
        if not self.differences:
            return f"{self.model} matches its provenance: {self.tensors:,} tensors are the same, byte for byte."
        tensors = sum(each.what == "tensor" for each in self.differences)
        others = len(self.differences) - tensors
        first = self.differences[0].sentence
        return f"{self.model} differs from its provenance ({tensors:,} tensors, {others:,} other things): {first}"

    def as_dict(self) -> dict[str, Any]:
        """The verdict as plain JSON values."""
        whole = {"model": self.model, "same": not self.differences, "tensors": self.tensors, "bytes": self.bytes}
        return {**whole, "differences": [asdict(each) for each in self.differences], "remarks": list(self.remarks)}


@dataclass(frozen=True, slots=True)
class _Subject:
    """The model under examination, a folder or a repo at a commit."""

    name: str
    files: Files
    sha256: Callable[[str], str | None]
    on_hub: bool


def verified(
    model: str,
    settings: Settings,
    hub: Callable[[], Hub],
    show: Show,
    *,
    device: str = "auto",
    convert: Callable[[Path], Path] = lambda folder: folder,
) -> Verdict:
    """Merge the model in a folder or Hub repo (`owner/name[@revision]`) again and compare.

    `convert` may replace a local source of pickled weights by its safetensors conversion. Raises Refused NOT_VERIFIABLE
    without usable provenance, SOURCE_CHANGED_OR_GONE for a changed source, and the errors of planning, fetching,
    merging.
    """
    subject = _subject(model, hub)
    claim = verify.read_claim(subject.files)
    _require_pinned(claim, subject)
    seen, made = _planned_again(claim, hub, convert)
    _require_same_folders(claim, seen, show)
    subject = replace(subject, sha256=verify.bounded(made, subject.files, subject.sha256))
    found = verify.against_listing(made, _listing(subject.files))
    found += verify.against_files(claim, subject.sha256)
    found += verify.against_plan(claim, made, subject.files)
    here = sources.fetched(made, seen, hub, settings, show)
    kind = _available_device(claim.device if claim.device in ("cpu", "cuda") and device == "auto" else device)
    folders = {ref: each.folder for ref, each in here.items()}
    settings.scratch.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"verify-{made.digest[:16]}-", dir=settings.scratch))
    try:
        compare = _on_disk if subject.on_hub else _streaming
        found += compare(made, folders, scratch, subject, kind, show)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    unique = tuple(dict.fromkeys(found))
    return Verdict(subject.name, len(made.steps), made.bytes_out, unique, _remarks(claim, kind, bool(unique)))


def _on_disk(
    made: plan.Plan, folders: Mapping[ModelRef, Path], scratch: Path, subject: _Subject, device: str, show: Show
) -> list[Difference]:
    """Merge into scratch, then read only those shards of the repo whose hash differs."""
    from bot.merge.execution import stages

    options = MergeOptions(device=device, progress=named(show, "Merging again"))
    merged = stages.merge(made, folders, scratch / "model", options)
    written = {name: fact.sha256 for name, fact in merged.files.items()}
    shown = named(show, "Comparing")
    return verify.against_merge(made, scratch / "model", subject.files, subject.sha256, written, shown)


def _streaming(
    made: plan.Plan, folders: Mapping[ModelRef, Path], scratch: Path, subject: _Subject, device: str, show: Show
) -> list[Difference]:
    """Merge without storing the output; only stages need disk space."""
    from bot.merge.execution import engine
    from bot.merge.execution.device import choose_devices

    here = dict(folders)
    for ref, stage in made.stages:
        place = scratch / stage.digest[:32]
        options = MergeOptions(device=device, progress=named(show, f"Merging {ref} again"))
        engine.merge(stage, here, place, options)
        here[ref] = place
    comparison = verify.Comparing(made, subject.files)
    files = {ref: LocalFiles(folder) for ref, folder in here.items()}
    options = MergeOptions(progress=named(show, "Merging again and comparing"))
    engine.run_steps(made, files, comparison, options, choose_devices(device))
    return comparison.differences() + verify.against_copies(made, files, subject.sha256)


def _subject(model: str, hub: Callable[[], Hub]) -> _Subject:
    folder = Path(model)
    if folder.is_dir():
        local = LocalFiles(sources.whole_folder(folder))

        @cache
        def of_file(name: str) -> str | None:
            return verify.hash_of(local, name)

        return _Subject(model, local, of_file, on_hub=False)
    name, _, revision = model.partition("@")
    pinned = sources.trusted_repo(name, revision or None, hub)
    remote = hub().files(pinned.repo, pinned.revision)
    named_by_commit = remote.sha256s()

    @cache
    def of_repo(path: str) -> str | None:
        return named_by_commit.get(path) or verify.hash_of(remote, path)

    return _Subject(f"{pinned.repo}@{pinned.revision[:7]}", remote, of_repo, on_hub=True)


def _listing(files: Files) -> list[str]:
    """List the files of a repo, or the top level of a local folder, subfolders with a slash."""
    if not isinstance(files, LocalFiles):
        return list(files.sizes())
    top = [name for name in files.sizes() if "/" not in name]
    return [*top, *(f"{each.name}/" for each in files.path.iterdir() if each.is_dir())]


def _require_pinned(claim: Claim, subject: _Subject) -> None:
    """Refuse unpinned sources: an untrusted file must not name local folders or moving branches."""
    loose = [ref for ref in claim.recipe.repos if not _COMMIT.fullmatch(ref.revision or "")]
    if loose and subject.on_hub:
        raise Refused(
            "NOT_VERIFIABLE",
            f"{subject.name} was merged from {loose[0]}, which is not a commit on the Hub.",
            "Ask its author for the sources.",
            value=str(loose[0]),
        )
    gone = next((ref for ref in loose if ref.revision is None and not Path(ref.path).is_dir()), None)
    if gone is not None:
        raise Refused(
            "SOURCE_CHANGED_OR_GONE",
            f"The source folder {gone} is missing.",
            "Run this command on the machine and in the folder of the merge.",
            value=str(gone),
        )


def _planned_again(
    claim: Claim, hub: Callable[[], Hub], convert: Callable[[Path], Path]
) -> tuple[sources.Opened, plan.Plan]:
    """Plan again; of the limits of a trusted and an untrusted request, take those that give the recorded digest."""
    made: list[tuple[sources.Opened, plan.Plan]] = []
    every_ref_on_hub = all(ref.revision for ref in claim.recipe.repos)
    for limits in (TRUSTED, UNTRUSTED) if every_ref_on_hub else (TRUSTED,):
        seen = sources.opened(claim.recipe, hub, limits=limits, convert=convert)
        again = planner.make(
            seen.recipe, seen.sources, seed=claim.seed, shard_limit_bytes=claim.shard_limit_bytes, limits=limits
        )
        if again.digest == claim.plan_digest and set(_files(again)) <= set(claim.outputs):
            return seen, again
        made.append((seen, again))
    return made[0]


def _files(made: plan.Plan) -> list[str]:
    return [*(copied.file for copied in made.copies), *made.texts, *(shard.file for shard in made.shards)]


def _require_same_folders(claim: Claim, seen: sources.Opened, show: Show) -> None:
    """Hash the files of local folders, which have no commit. Raises Refused SOURCE_CHANGED_OR_GONE."""
    local = [ref for ref in seen.sources if ref not in seen.repos]
    for number, ref in enumerate(local):
        show("Checking the sources", number, len(local))
        folder = LocalFiles(seen.folders[ref])
        for name, fact in claim.sources.get(str(ref), {}).items():
            if "sha256" in fact and verify.hash_of(folder, name) != fact["sha256"]:
                raise Refused(
                    "SOURCE_CHANGED_OR_GONE",
                    f"{name} of {ref} is not the file that was merged.",
                    "Restore the original, then verify again.",
                    value=str(ref),
                )


def _available_device(device: str) -> str:
    """Return `device`, or the CPU if this machine lacks it."""
    from bot.merge.execution import engine

    try:
        return engine.choose_device(device).type
    except Refused:
        return "cpu"


def _remarks(claim: Claim, device: str, differs: bool) -> tuple[str, ...]:
    import torch

    out = []
    if claim.numerics != NUMERICS_VERSION:
        out.append(f"It was merged by numerics version {claim.numerics}; this is version {NUMERICS_VERSION}.")
    if claim.device != device:
        out.append(f"It was merged on {claim.device} and verified on {device}.")
    if claim.torch != torch.__version__:
        out.append(f"It was merged with torch {claim.torch} and verified with {torch.__version__}.")
    if out and differs:
        out.append("The last bits may then differ: see the largest difference, in ulp.")
    unhashed = [ref for ref, files in claim.sources.items() if _only_headers(files)]
    if unhashed and differs:
        out.append(
            f"The bytes of {_some(unhashed)} were not recorded, so a changed source looks like a changed result: "
            "merge with --hash-sources to tell them apart."
        )
    return tuple(out)


def _some(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`, `a, b, c and 2 more`."""
    shown = [*names[:3], *([f"{len(names) - 3} more"] if len(names) > 3 else [])]
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if shown[:-1] else shown)


def _only_headers(files: Mapping[str, Mapping[str, object]]) -> bool:
    return any(fact.get("verified") == "header" for fact in files.values())


def require_same(verdict: Verdict) -> None:
    """Raise Failed NOT_THE_SAME if anything differs, so that the command exits with status 1."""
    if verdict.differences:
        raise Failed("NOT_THE_SAME", verdict.sentence, "")
