"""Metadata of a repo's files: card, tags, config, parameter counts.

Like the Hub's server, this module parses cards with an ordinary YAML loader. Cards are untrusted, so events are counted
before anything is built.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from datetime import date, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

FRONT_MATTER = re.compile(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))")
LIMIT_BYTES = 1 << 20
_FRONT_LIMIT_BYTES = 256 << 10
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MAX_DEPTH, _MAX_EVENTS = 32, 50_000
_HEADER_LIMIT_BYTES = 100 << 20


class MetadataError(ValueError):
    """The card's metadata cannot be read; the text gives the reason."""


def split_card(text: str) -> tuple[str | None, str]:
    """Front matter (or None) and body."""
    found = FRONT_MATTER.match(text.removeprefix("\ufeff"))
    if found is None:
        return None, text
    return found.group(2), text.removeprefix("\ufeff")[found.end() :]


@lru_cache(maxsize=512)
def parse_front_matter(front: str) -> str:
    """Metadata as JSON text (text, so that a cached value cannot be changed by a caller)."""
    if len(front.encode()) > _FRONT_LIMIT_BYTES:
        raise MetadataError("the metadata is larger than 256 KiB")
    depth = events = 0
    try:
        for event in yaml.parse(front, Loader=_LOADER):
            events += 1
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH or events > _MAX_EVENTS:
                raise MetadataError("the metadata is nested too deep or too long")
            if isinstance(event, yaml.AliasEvent):
                raise MetadataError("the metadata uses YAML aliases")
        value = yaml.load(front, Loader=_LOADER)  # a safe loader: builds plain values only
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise MetadataError(f"the metadata is not valid YAML: {' '.join(str(error).split())[:200]}") from None
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise MetadataError("the metadata is not a mapping")
    return json.dumps(_plain(value))


def card_data(readme: str) -> dict[str, Any] | None:
    """Metadata of the card; None if it is missing or cannot be read."""
    front, _ = split_card(readme)
    if front is None:
        return None
    try:
        data: dict[str, Any] = json.loads(parse_front_matter(front))
    except MetadataError:
        return None
    return data


def complaints(readme: str) -> list[str]:
    """Reasons for which the Hub would refuse this card."""
    front, _ = split_card(readme)
    if front is None:
        return []
    try:
        data = json.loads(parse_front_matter(front))
    except MetadataError as error:
        return [str(error)]
    found = [f'"{key}" must be a string or a list of strings' for key in _TEXTS if not _is_texts(data.get(key))]
    found += [f'"{key}" must be a string' for key in _TEXT if not isinstance(data.get(key, ""), str)]
    index = data.get("model-index")
    if index is not None and not (isinstance(index, list) and all(isinstance(entry, dict) for entry in index)):
        found.append('"model-index" must be a list of mappings')
    return found


_TEXTS = ("tags", "base_model", "datasets", "language", "license")
_TEXT = ("library_name", "pipeline_tag", "base_model_relation", "license_name", "license_link")


def _is_texts(value: Any) -> bool:
    return (
        value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))
    )


def _plain(value: Any) -> Any:
    """YAML values as JSON values: dates and keys become text, NaN becomes null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if isinstance(value, (date, datetime)):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def texts(value: Any) -> list[str]:
    """A card field that may be one text or a list of them."""
    if isinstance(value, str):
        return [value]
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def tags(card: dict[str, Any], config: dict[str, Any], paths: list[str]) -> list[str]:
    """The tags `filter=` matches (hub.md 1.4), each once, in a stable order."""
    found: list[str] = []
    found += texts(card.get("library_name"))
    if any(path.endswith(".safetensors") for path in paths):
        found.append("safetensors")
    if isinstance(config.get("model_type"), str):
        found.append(config["model_type"])
    found += texts(card.get("pipeline_tag")) + texts(card.get("tags")) + texts(card.get("language"))
    found += [f"dataset:{name}" for name in texts(card.get("datasets"))]
    relation = card.get("base_model_relation")
    for base in texts(card.get("base_model")):
        found.append(f"base_model:{base}")
        if isinstance(relation, str):
            found.append(f"base_model:{relation}:{base}")
    found += [f"license:{name}" for name in texts(card.get("license"))]
    found.append("region:us")
    return list(dict.fromkeys(found))


@lru_cache(maxsize=2048)
def parameter_counts(path: Path) -> tuple[tuple[str, int], ...]:
    """(dtype, elements) of one safetensors file, from its header; () when it is not one. Blobs never change: cached."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_HEADER_LIMIT_BYTES, path.stat().st_size):
                return ()
            header = json.loads(file.read(length))
        counts: Counter[str] = Counter()
        for name, tensor in header.items():
            if name != "__metadata__":
                counts[str(tensor["dtype"])] += math.prod(int(extent) for extent in tensor["shape"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError):
        return ()
    return tuple(sorted(counts.items()))
