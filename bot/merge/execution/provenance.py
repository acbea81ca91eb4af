"""merge_provenance.json (sources, settings and results of a merge) and manifest.json (its files).

docs/design/merging.md 3.3, docs/design/reliability.md 6.1. Neither file holds times or host names: equal work in an
equal environment gives equal files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal, Protocol

from bot import __version__
from bot.merge.planning.output_names import MANIFEST_SCHEMA, SCHEMA
from bot.merge.planning.plan import NUMERICS_VERSION, Plan
from bot.merge.recipe.spec import ModelRef, Notice


class _Fact(Protocol):
    @property
    def bytes(self) -> int: ...
    @property
    def sha256(self) -> str: ...


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
    outputs: Mapping[str, _Fact],
    notices: Sequence[Notice],
    device: str,
    torch_version: str,
    known: Known | None = None,
) -> bytes:
    """Text of merge_provenance.json.

    Its sources carry the size and header hash behind the plan, and the `known` facts. Local sources keep their names as
    given.
    """
    document = {
        "schema": SCHEMA,
        "engine": {"name": "mergebot", "version": __version__, "numerics": NUMERICS_VERSION},
        "recipe": {"digest": plan.recipe.digest, "canonical": plan.recipe.document()},
        "plan_digest": plan.digest,
        "seed": plan.seed,
        "shard_limit_bytes": plan.shard_limit_bytes,
        "sources": _sources(plan, known or {}),
        **({"stages": [_stage(ref, made, known or {}) for ref, made in plan.stages]} if plan.stages else {}),
        **recorded_facts(plan),
        "outputs": {name: {"bytes": fact.bytes, "sha256": fact.sha256} for name, fact in sorted(outputs.items())},
        "notices": [{"code": n.code, "count": n.count, "example": n.text} for n in notices],
        "environment": {"torch": torch_version, "device": device},
    }
    return _text(document)


def recorded_facts(plan: Plan) -> dict[str, object]:
    """Provenance of a plan beside its digest: vocabulary and number of moved tensors."""
    actions = [step.work.action for step in plan.steps]
    tensors = {"merged": actions.count("merge"), "copied": actions.count("copy") + actions.count("equal")}
    return {"tokenizer": _tokenizer(plan), "tensors": tensors}


def _stage(ref: ModelRef, made: Plan, known: Known) -> dict[str, object]:
    """A temporary intermediate result; its shards are among the sources of the next stage."""
    return {"name": str(ref), "plan_digest": made.digest, "sources": _sources(made, known)}


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
    chosen, asked = plan.vocabulary, plan.recipe.vocabulary
    if chosen is None or asked is None:
        return {"policy": "copied", "donor": str(plan.recipe.config_source)}
    added = {"added_tokens": len(chosen.added), "first_added": list(chosen.added[:20])}
    return {"policy": str(asked.source), "donor": str(chosen.tokenizer_source), "rows": chosen.rows, **added}


def manifest(files: Mapping[str, _Fact]) -> bytes:
    """Return the text of manifest.json: path, size and SHA-256 of every file; its own SHA-256 is the manifest's id."""
    entries = [{"path": name, "bytes": fact.bytes, "sha256": fact.sha256} for name, fact in sorted(files.items())]
    return _text({"schema": MANIFEST_SCHEMA, "files": entries})


def _text(document: object) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
