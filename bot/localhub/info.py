"""The info object of a repo (hub.md 5.3): the same fields for one repo and for lists, chosen by `expand`."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from bot.localhub.blobs import lfs_pointer
from bot.localhub.metadata import LIMIT_BYTES, card_data, parameter_counts, tags
from bot.localhub.storage import Commit, FileEntry, Repo, Store

_CONFIG_KEYS = ("architectures", "model_type", "auto_map", "quantization_config", "tokenizer_config")
_LIST_FIELDS = ("createdAt", "private", "likes", "downloads", "tags", "pipeline_tag", "library_name")
_FULL_FIELDS = (*_LIST_FIELDS, "author", "sha", "lastModified", "gated", "disabled", "siblings")
_SINGLE_FIELDS = (
    *_FULL_FIELDS,
    *("cardData", "config", "transformersInfo", "safetensors", "usedStorage", "sdk", "description"),
)


def describe(store: Store, repo: Repo, commit: Commit, *, blobs: bool = False) -> dict[str, Any]:
    """All known fields of a repo at a commit; None values are left out of responses."""
    card = card_data(text_of(store, repo, commit.files.get("README.md"))) or {}
    config = _json_of(store, repo, commit.files.get("config.json")) if repo.id.kind == "models" else {}
    head = store.at(repo.id, "main")
    pipeline = card.get("pipeline_tag") or _pipeline(config)
    library = card.get("library_name") or ("transformers" if config.get("model_type") else None)
    info: dict[str, Any] = {
        "_id": repo.object_id,
        "id": str(repo.id),
        "author": repo.id.namespace,
        "sha": commit.oid,
        "lastModified": head.date,
        "createdAt": repo.created_at,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": repo.disabled,
        "downloads": repo.downloads,
        "likes": repo.likes,
        "tags": tags({**card, "library_name": library, "pipeline_tag": pipeline}, config, list(commit.files)),
        "siblings": [_sibling(path, entry, blobs) for path, entry in commit.files.items()],
        "cardData": card or None,
        "usedStorage": sum(entry.size for entry in commit.files.values()),
    }
    if repo.id.kind == "models":
        info |= {
            "modelId": str(repo.id),
            "pipeline_tag": pipeline,
            "library_name": library,
            "config": {key: config[key] for key in _CONFIG_KEYS if key in config} or None,
            "transformersInfo": {"auto_model": _auto_model(config), "pipeline_tag": pipeline} if config else None,
            "safetensors": _safetensors(store, repo, commit),
        }
    if repo.id.kind == "spaces":
        info["sdk"] = repo.sdk
    return info


def choose(info: dict[str, Any], expand: list[str], *, single: bool, full: bool = False) -> dict[str, Any]:
    """Only the requested fields."""
    always = ("_id", "id", "modelId")
    if expand:
        wanted: tuple[str, ...] = tuple(expand)
    else:
        wanted = _SINGLE_FIELDS if single else (_FULL_FIELDS if full else _LIST_FIELDS)
    return {key: value for key, value in info.items() if (key in always or key in wanted) and value is not None}


def text_of(store: Store, repo: Repo, entry: FileEntry | None) -> str:
    if entry is None or entry.size > LIMIT_BYTES:
        return ""
    return store.read(repo.id, entry).decode("utf-8", "replace")


def _json_of(store: Store, repo: Repo, entry: FileEntry | None) -> dict[str, Any]:
    try:
        value = json.loads(text_of(store, repo, entry) or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _sibling(path: str, entry: FileEntry, blobs: bool) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": path}
    if blobs:
        sibling |= {"size": entry.size, "blobId": entry.oid}
        if entry.sha256:
            sibling["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": pointer_size(entry)}
    return sibling


def pointer_size(entry: FileEntry) -> int:
    return len(lfs_pointer(entry.sha256 or "", entry.size))


def _pipeline(config: dict[str, Any]) -> str | None:
    return "text-generation" if _auto_model(config) == "AutoModelForCausalLM" else None


def _auto_model(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    causal = isinstance(names, list) and any(isinstance(n, str) and n.endswith("ForCausalLM") for n in names)
    return "AutoModelForCausalLM" if causal else "AutoModel"


def _safetensors(store: Store, repo: Repo, commit: Commit) -> dict[str, Any] | None:
    counts: Counter[str] = Counter()
    for path, entry in commit.files.items():
        if path.endswith(".safetensors") and "/" not in path:
            counts.update(dict(parameter_counts(store.content_path(repo.id, entry))))
    return {"parameters": dict(counts), "total": sum(counts.values())} if counts else None
