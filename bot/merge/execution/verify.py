"""Comparison of a merged model with its provenance and with a repeated merge.

read_claim        merge_provenance.json -> Claim, untrusted
against_listing   file names and the names that the merge writes
against_files     hashes of the files and the claim
against_plan      claim and small files, and a new plan of the same sources
against_merge     tensors and a new merge
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bot.errors import Refused
from bot.merge.checkpoints.checkpoint import TRUSTED, Files, LocalFiles, read_header
from bot.merge.checkpoints.header import TensorInfo
from bot.merge.execution.provenance import MANIFEST, PROVENANCE, SCHEMA, recorded_facts
from bot.merge.execution.writer import Progress, StepCounts
from bot.merge.planning.plan import NUMERICS_VERSION, Copied, Plan, Step
from bot.merge.recipe import reading as recipe
from bot.merge.recipe.spec import ModelRef, Recipe

LIMIT_BYTES = 64 * 2**20
_BLOCK_BYTES = 16 * 2**20
Hashes = Callable[[str], str | None]  # file name -> SHA-256, None if the file is missing
# Files allowed beside those of a merge: the publisher's, documentation, those of git and the Hub client.
_HARMLESS = re.compile(
    r"README\.md|\.gitattributes|\.gitignore|\.mergebot\.json|mergekit_config\.original\.yml|decode_speed\.json"
    r"|(LICEN[CS]E|NOTICE|USE_POLICY)[\w.-]*|[\w-]+\.(md|png|jpg|svg|log)|(medusa|custom_generate|\.git|\.cache)/.*"
    r"|results(/|/.*\.(json|md|csv|png|svg))",
    re.IGNORECASE | re.DOTALL,
)
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Claim:
    """Content of a provenance file."""

    recipe: Recipe
    recipe_digest: str
    plan_digest: str
    seed: int
    shard_limit_bytes: int
    numerics: int
    sources: Mapping[str, Mapping[str, Mapping[str, Any]]]  # reference -> file -> facts
    outputs: Mapping[str, str]  # file -> SHA-256
    recorded: Mapping[str, Any]  # tokenizer, tensors
    device: str
    torch: str


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference. Of a tensor: number of different elements, and largest distance in ulp of the stored dtype."""

    what: str  # file, tensor, config, plan, recipe, source, provenance
    name: str
    sentence: str
    elements: int = 0
    ulps: int | None = None


def read_claim(files: Files) -> Claim:
    """Return the claim of a folder or repo. Raises Refused NOT_VERIFIABLE."""
    size = files.sizes().get(PROVENANCE)
    if size is None:
        raise Refused("NOT_VERIFIABLE", f"{files} has no {PROVENANCE}.", "Only merges made by mergebot carry one.")
    try:
        if size > LIMIT_BYTES:
            raise ValueError("too large")
        document = json.loads(files.read(PROVENANCE, 0, size))
        if document["schema"] != SCHEMA:
            raise ValueError("another schema")
        if int(document["engine"]["numerics"]) > NUMERICS_VERSION:
            raise Refused("NOT_VERIFIABLE", f"{files} was merged by a newer mergebot.", "Update mergebot.")
        canonical = document["recipe"]["canonical"]
        return Claim(
            recipe=recipe.from_canonical(json.dumps(canonical)),
            recipe_digest=str(document["recipe"]["digest"]),
            plan_digest=str(document["plan_digest"]),
            seed=int(document["seed"]),
            shard_limit_bytes=int(document["shard_limit_bytes"]),
            numerics=int(document["engine"]["numerics"]),
            sources={str(one["ref"]): _table(one["files"]) for one in _every_source(document)},
            outputs={str(name): _digest(fact["sha256"]) for name, fact in document["outputs"].items()},
            recorded={key: document[key] for key in ("tokenizer", "tensors")},
            device=str(document["environment"]["device"]),
            torch=str(document["environment"]["torch"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        raise Refused(
            "NOT_VERIFIABLE",
            f"{PROVENANCE} of {files} was not written by mergebot.",
            "Ask its author how it was plan.",
        ) from None


def _every_source(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Sources of the merge and its stages, without intermediate results."""
    stages = {str(stage["name"]) for stage in document.get("stages", ())}
    listed = [*document["sources"], *(source for stage in document.get("stages", ()) for source in stage["sources"])]
    return [source for source in listed if str(source["ref"]) not in stages]


def _table(files: Any) -> dict[str, Mapping[str, Any]]:
    if not all(isinstance(fact, dict) for fact in files.values()):
        raise TypeError("not a table of files")
    return dict(files)


def _digest(text: object) -> str:
    if not isinstance(text, str) or not _DIGEST.fullmatch(text):
        raise ValueError("not a SHA-256")
    return text


def expected_sizes(plan: Plan) -> dict[str, int]:
    """Lengths of all files of the merge whose bytes the plan knows."""
    shards = {shard.file: shard.nbytes for shard in plan.shards}
    copies = {copied.file: copied.nbytes for copied in plan.copies}
    return {**shards, **copies, **{name: len(text.encode()) for name, text in plan.written_texts.items()}}


def bounded(plan: Plan, files: Files, sha256: Hashes) -> Hashes:
    """`sha256` that skips files whose size is already wrong: such a file may be a sparse terabyte."""
    expected, sizes = expected_sizes(plan), files.sizes()

    def hash_if_expected(name: str) -> str | None:
        size = sizes.get(name)
        if size is None:
            return None
        return sha256(name) if size == expected.get(name, min(size, LIMIT_BYTES)) else "of another length"

    return hash_if_expected


def against_listing(plan: Plan, names: Iterable[str]) -> list[Difference]:
    """Compare the names in the folder, subfolders ending in a slash, with those that the merge writes."""
    written = {*expected_sizes(plan), PROVENANCE}
    found = set(names) - {MANIFEST}  # it is not published
    out = [_missing(name) for name in sorted(written - found)]
    strange = (name for name in sorted(found - written) if not _HARMLESS.fullmatch(name))
    return out + [Difference("file", name, f"{name} is not a file of this merge.") for name in strange]


def _missing(name: str) -> Difference:
    return Difference("file", name, f"{name} is missing.")


def against_files(claim: Claim, sha256: Hashes) -> list[Difference]:
    """Compare the files with the provenance."""
    out = []
    for name, digest in sorted(claim.outputs.items()):
        found = sha256(name)
        if found is None and not name.endswith(".original.yml"):
            out.append(_missing(name))
        elif found is not None and found != digest:
            out.append(Difference("file", name, f"{name} differs from the file that the merge wrote."))
    return out


def against_plan(claim: Claim, plan: Plan, files: Files) -> list[Difference]:
    """Compare the claim and the small files with a new plan."""
    out = []
    if claim.recipe.digest != claim.recipe_digest:
        out.append(Difference("recipe", "digest", "The recipe in the provenance does not match its digest."))
    for source in (source for part in plan.parts for source in part.sources):
        claimed = claim.sources.get(str(source.model))
        for file, (_, digest) in source.headers.items():
            if source.model in dict(plan.stages):
                continue
            if claimed is None or claimed.get(file, {}).get("header_sha256") != digest:
                out.append(
                    Difference("source", str(source.model), f"{file} of {source.model} does not match the provenance.")
                )
    # another version of the engine gives another digest for the same merge; the tensors are still compared
    if plan.digest != claim.plan_digest and claim.numerics == NUMERICS_VERSION:
        out.append(Difference("plan", "digest", "A new plan of the same sources has another digest."))
    out += _other_facts(claim, plan)
    sizes = files.sizes()
    for name, text in sorted(plan.written_texts.items()):
        expected = text.encode()
        if name in sizes and (sizes[name] != len(expected) or files.read(name, 0, len(expected)) != expected):
            out.append(
                Difference("config", name, f"{name} differs from the file that the recipe and its sources give.")
            )
    return out


def _other_facts(claim: Claim, plan: Plan) -> Iterator[Difference]:
    for name in sorted(set(expected_sizes(plan)) - set(claim.outputs)):
        yield Difference("provenance", name, f"The provenance does not list {name} among its outputs.")
    for key, expected in recorded_facts(plan).items() if claim.numerics == NUMERICS_VERSION else ():
        if claim.recorded[key] != expected:
            yield Difference("provenance", key, f"The provenance records other {key} than the merge has.")


def against_merge(
    plan: Plan,
    merged: Path,
    theirs: Files,
    sha256: Hashes,
    written: Mapping[str, str],
    progress: Progress | None = None,
) -> list[Difference]:
    """Compare every tensor and copied file of `theirs` with the new merge in `merged`.

    `written` holds the SHA-256 of its files: a shard with an equal hash is not read again.
    """
    ours, done = LocalFiles(merged), 0
    comparison = Comparing(plan, theirs)
    for shard in plan.shards:
        same = sha256(shard.file) == written[shard.file]
        for step in (step for step in plan.steps if plan.shards[step.shard].file == shard.file):
            for at in () if same else range(0, step.nbytes, _BLOCK_BYTES):
                length = min(_BLOCK_BYTES, step.nbytes - at)
                comparison.write(step, at, memoryview(ours.read(shard.file, step.offset + at, length)))
            done += step.nbytes
            if progress is not None:
                progress(done, plan.bytes_out, step.name)
    copies = (copied for copied in plan.copies if sha256(copied.file) != written[copied.file])
    return comparison.differences() + [_other_copy(copied) for copied in copies]


class Comparing:
    """A writer (execution/writer.py) that compares the new merge with `theirs` chunk by chunk and writes nothing."""

    done: frozenset[int] = frozenset()

    def __init__(self, plan: Plan, theirs: Files) -> None:
        self._plan, self._theirs = plan, theirs
        self._stored, self._layout, self._unread = _headers(theirs, plan)
        self._lock = threading.Lock()
        self._counts: dict[int, tuple[int, int]] = {}  # step -> elements, ulps

    def write(self, step: Step, at: int, data: memoryview) -> None:
        other = self._stored.get(step.name)
        if other is None or (other.shape, other.dtype) != (step.work.shape, step.work.dtype):
            return  # reported by `differences`
        ours = bytes(data)
        theirs = self._theirs.read(other.file, other.start + at, len(ours))
        if ours != theirs:
            elements, ulps = count_differences(ours, theirs, step.work.dtype.name)
            with self._lock:
                before = self._counts.get(step.index, (0, 0))
                self._counts[step.index] = (before[0] + elements, max(before[1], ulps))

    def finished(self, step: Step, counts: StepCounts) -> None:
        """Do nothing: no state is kept."""

    def differences(self) -> list[Difference]:
        """Differences in the order of the plan, after all steps were written."""
        out = list(self._layout)
        for step in self._plan.steps:
            if step.name not in self._stored and self._plan.shards[step.shard].file in self._unread:
                continue  # the file is reported already
            out += self._of_step(step)
        names = {step.name for step in self._plan.steps}
        strays = (name for name in self._stored if name not in names)
        return out + [Difference("tensor", name, f"{name} is not a tensor of this merge.") for name in strays]

    def _of_step(self, step: Step) -> Iterator[Difference]:
        other, name, size = self._stored.get(step.name), step.name, step.work.elements
        if other is None:
            yield Difference("tensor", name, f"{name} is missing.", size)
        elif (other.shape, other.dtype) != (step.work.shape, step.work.dtype):
            kinds = f"{other.dtype.name} {list(other.shape)}, not {step.work.dtype.name} {list(step.work.shape)}"
            yield Difference("tensor", name, f"{name} is {kinds}.", size)
        elif step.index in self._counts:
            elements, ulps = self._counts[step.index]
            text = f"{name} differs in {elements:,} of {size:,} elements, by at most {ulps:,} ulp."
            yield Difference("tensor", name, text, elements, ulps)


def against_copies(plan: Plan, sources: Mapping[ModelRef, Files], sha256: Hashes) -> list[Difference]:
    """Compare copied files with those of their sources."""
    return [
        _other_copy(copied)
        for copied in plan.copies
        if sha256(copied.file) != hash_of(sources[copied.model], copied.file)
    ]


def _headers(files: Files, plan: Plan) -> tuple[dict[str, TensorInfo], list[Difference], set[str]]:
    """Tensors of the planned shards by name; errors of shards; unreadable shards."""
    sizes, out, found, unread = files.sizes(), dict[str, TensorInfo](), list[Difference](), set[str]()
    for shard in plan.shards:
        if shard.file not in sizes:
            found.append(_missing(shard.file))
            unread.add(shard.file)
            continue
        start = files.read(shard.file, 0, len(shard.header))
        if sizes[shard.file] != shard.nbytes or start != shard.header:
            found.append(Difference("file", shard.file, f"{shard.file} does not have the layout of the merge."))
        try:
            out.update(read_header(files, shard.file, sizes[shard.file], str(files), TRUSTED)[0])
        except Refused as error:
            found.append(Difference("file", shard.file, error.message))
            unread.add(shard.file)
    return out, found, unread


def _other_copy(copied: Copied) -> Difference:
    return Difference("file", copied.file, f"{copied.file} differs from the file of {copied.model}.")


def count_differences(a: bytes, b: bytes, dtype: str) -> tuple[int, int]:
    """Number of different elements, and their largest distance in steps between neighbouring numbers of the type."""
    import numpy as np

    if dtype not in ("float64", "float32", "float16", "bfloat16"):
        return sum(p != q for p, q in zip(a, b, strict=True)), 0
    kind: Any = {"float64": np.int64, "float32": np.int32}.get(dtype, np.int16)
    x, y = np.frombuffer(a, kind), np.frombuffer(b, kind)
    differ = x != y
    lowest = int(np.iinfo(kind).min)
    # sign and magnitude -> one ascending scale, on which -0 and +0 are the same step
    p, q = (np.where(v >= 0, v, lowest - v) for v in (part[differ].astype(np.int64) for part in (x, y)))
    gap = np.maximum(p, q).view(np.uint64) - np.minimum(p, q).view(np.uint64)  # exact, also where int64 would overflow
    return int(differ.sum()), int(gap.max(initial=0))


def hash_of(files: Files, name: str) -> str | None:
    """SHA-256 of a file read through `files`; None if it is missing."""
    size = files.sizes().get(name)
    if size is None:
        return None
    digest = hashlib.sha256()
    for at in range(0, size, _BLOCK_BYTES):
        digest.update(files.read(name, at, min(_BLOCK_BYTES, size - at)))
    return digest.hexdigest()
