"""Content hash of a checkpoint, used as a cache key."""

from __future__ import annotations

import hashlib
from pathlib import Path

from bot.errors import EvaluationError
from bot.storage import sha256_file

_CONTENT = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.*",
)
_NOT_CONTENT = frozenset({"manifest.json", "merge_provenance.json", "decode_speed.json", "lm_eval.json"})


def content_digest(model: Path) -> str:
    """64 hex over the names and bytes of the files that affect a model's answers. Raises MODEL_UNLOADABLE."""
    paths = {
        path.relative_to(model).as_posix(): path
        for pattern in _CONTENT
        for path in model.glob(pattern)
        if path.name not in _NOT_CONTENT and path.is_file()
    }
    if "config.json" not in paths:
        raise EvaluationError(
            "MODEL_UNLOADABLE", f"{model.name} holds no config.json.", "Choose a folder that contains a model."
        )
    content = hashlib.sha256()
    for name in sorted(paths):
        content.update(f"{name}\0{sha256_file(paths[name])}\n".encode())
    return content.hexdigest()
