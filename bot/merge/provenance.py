"""What a merge was made of and what it made: merge_provenance.json and manifest.json. merging.md 3.3, safety.md 6.1.

No clock and no host: equal work in an equal environment gives equal files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Protocol

from bot import __version__
from bot.merge.plan import NUMERICS_VERSION, Plan
from bot.merge.spec import ModelRef, Notice


class _Fact(Protocol):
    @property
    def bytes(self) -> int: ...
    @property
    def sha256(self) -> str: ...


def provenance(
    plan: Plan, outputs: Mapping[str, _Fact], notices: Sequence[Notice], device: str, torch_version: str
) -> bytes:
    """The text of merge_provenance.json. Its sources carry the size and header hash the plan was made from."""
    actions = [step.work.action for step in plan.steps]
    document = {
        "schema": "mergebot.merge_provenance/1",
        "engine": {"name": "mergebot", "version": __version__, "numerics": NUMERICS_VERSION},
        "recipe": {"digest": plan.recipe.digest, "canonical": plan.recipe.document()},
        "plan_digest": plan.digest,
        "seed": plan.seed,
        "shard_limit_bytes": plan.shard_limit_bytes,
        "sources": _sources(plan),
        **({"stages": [_stage(ref, made) for ref, made in plan.stages]} if plan.stages else {}),
        "tokenizer": _tokenizer(plan),
        "outputs": {name: {"bytes": fact.bytes, "sha256": fact.sha256} for name, fact in sorted(outputs.items())},
        "tensors": {"merged": actions.count("merge"), "copied": actions.count("copy") + actions.count("equal")},
        "notices": [{"code": n.code, "count": n.count, "example": n.text} for n in notices],
        "environment": {"torch": torch_version, "device": device},
    }
    return _text(document)


def _stage(ref: ModelRef, made: Plan) -> dict[str, object]:
    """An intermediate that was merged first and is not kept; the shards of its result stand among the sources."""
    return {"name": str(ref), "plan_digest": made.digest, "sources": _sources(made)}


def _sources(plan: Plan) -> list[dict[str, object]]:
    return [
        {
            "ref": str(source.model),
            "commit": source.model.revision,
            "roles": list(source.roles),
            "files": {
                file: {"bytes": size, "header_sha256": digest} for file, (size, digest) in source.headers.items()
            },
        }
        for source in plan.sources
    ]


def _tokenizer(plan: Plan) -> dict[str, object]:
    chosen, asked = plan.vocabulary, plan.recipe.vocabulary
    if chosen is None or asked is None:
        return {"policy": "copied", "donor": str(plan.recipe.donor)}
    added = {"added_tokens": len(chosen.added), "first_added": list(chosen.added[:20])}
    return {"policy": str(asked.source), "donor": str(chosen.giver), "rows": chosen.rows, **added}


def manifest(files: Mapping[str, _Fact]) -> bytes:
    """The text of manifest.json: path, size and SHA-256 of every file; its own SHA-256 is the manifest's id."""
    entries = [{"path": name, "bytes": fact.bytes, "sha256": fact.sha256} for name, fact in sorted(files.items())]
    return _text({"schema": "mergebot.manifest/1", "files": entries})


def _text(document: object) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
