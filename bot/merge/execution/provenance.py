"""merge_provenance.json (sources, settings and results of a merge) and manifest.json (its files).

docs/design/merging.md 3.3, docs/design/reliability.md 6.1. Neither file holds times or host names: equal work in an
equal environment gives equal files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

from bot import __version__
from bot.merge.planning.plan import NUMERICS_VERSION, Plan
from bot.merge.recipe.spec import ModelRef, Notice

MANIFEST = "manifest.json"  # lists every file with size and hash; written last, so its presence marks a complete folder
PROVENANCE = "merge_provenance.json"
SCHEMA = "mergebot.merge_provenance/1"
MANIFEST_SCHEMA = "mergebot.manifest/1"


@dataclass(frozen=True, slots=True)
class FileFact:
    """Size and SHA-256 (64 hex digits) of one finished file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class SourceFile:
    """Known facts of a source file: its SHA-256 (or git's id of a small one), and the kind of verification.

    `sha256`, `git`: the whole file was hashed. `ranges`: byte ranges of the commit that names this hash.
    """

    bytes: int
    sha256: str | None
    git: str | None
    verified: Literal["sha256", "git", "ranges"]


Known = Mapping[ModelRef, Mapping[str, SourceFile]]  # by bare reference and file


def torch_version() -> str:
    """Return the version of torch without importing it."""
    return version("torch")


def provenance(
    plan: Plan,
    outputs: Mapping[str, FileFact],
    notices: Sequence[Notice],
    device: str,
    known: Known | None = None,
) -> bytes:
    """Return the text of merge_provenance.json. Its sources carry sizes and header hashes, and the `known` facts."""
    known = known or {}
    document = {
        "schema": SCHEMA,
        "engine": {"name": "mergebot", "version": __version__, "numerics": NUMERICS_VERSION},
        "recipe": {"digest": plan.recipe.digest, "canonical": plan.recipe.document()},
        "plan_digest": plan.digest,
        "seed": plan.seed,
        "shard_limit_bytes": plan.shard_limit_bytes,
        "sources": _sources(plan, known),
        **({"stages": [_stage(ref, stage, known) for ref, stage in plan.stages]} if plan.stages else {}),
        **recorded_facts(plan),
        "outputs": {name: {"bytes": fact.bytes, "sha256": fact.sha256} for name, fact in sorted(outputs.items())},
        "notices": [{"code": n.code, "count": n.count, "example": n.text} for n in notices],
        "environment": {"torch": torch_version(), "device": device},
    }
    return _text(document)


def recorded_facts(plan: Plan) -> dict[str, object]:
    """Facts of a plan that its digest does not cover: vocabulary and number of tensors."""
    actions = [step.work.action for step in plan.steps]
    tensors = {"merged": actions.count("merge"), "copied": actions.count("copy") + actions.count("equal")}
    return {"tokenizer": _tokenizer(plan), "tensors": tensors}


def _stage(ref: ModelRef, stage: Plan, known: Known) -> dict[str, object]:
    return {"name": str(ref), "plan_digest": stage.digest, "sources": _sources(stage, known)}


def _sources(plan: Plan, known: Known) -> list[dict[str, object]]:
    out: list[dict[str, object]] = []
    for source in plan.sources:
        facts = known.get(source.model.bare, {})
        files: dict[str, dict[str, object]] = {name: _known_file(fact) for name, fact in sorted(facts.items())}
        for file, (size, digest) in source.headers.items():
            files[file] = {"bytes": size, "header_sha256": digest, **files.get(file, {"verified": "header"})}
        ref, roles = source.model, list(source.roles)
        out.append({"ref": str(ref), "commit": ref.revision, "roles": roles, "files": files})
    return out


def _known_file(fact: SourceFile) -> dict[str, object]:
    named = {"sha256": fact.sha256} if fact.sha256 is not None else {"git": fact.git}
    return {"bytes": fact.bytes, **named, "verified": fact.verified}


def _tokenizer(plan: Plan) -> dict[str, object]:
    alignment, requested = plan.vocabulary, plan.recipe.vocabulary
    if alignment is None or requested is None:
        return {"policy": "copied", "donor": str(plan.recipe.config_source)}
    added = {"added_tokens": len(alignment.added), "first_added": list(alignment.added[:20])}
    donor = str(alignment.tokenizer_source)
    return {"policy": str(requested.source), "donor": donor, "rows": alignment.rows, **added}


def manifest(files: Mapping[str, FileFact]) -> bytes:
    """Return the text of manifest.json: path, size and SHA-256 of every file; its own SHA-256 is the manifest's id."""
    entries = [{"path": name, "bytes": fact.bytes, "sha256": fact.sha256} for name, fact in sorted(files.items())]
    return _text({"schema": MANIFEST_SCHEMA, "files": entries})


def _text(document: object) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
