"""A LoRA adapter seen through its headers. Weights are not read. docs/design/merging.md 5.3.

`open_source` opens whatever lies in a folder or repo; `adapted_model.py` sees a model through an adapter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from bot.errors import Refused
from bot.merge.checkpoints.adapter_config import LoraConfig, lora_config
from bot.merge.checkpoints.checkpoint import (
    INDEX,
    TRUSTED,
    Checkpoint,
    Files,
    Limits,
    open_checkpoint,
    read_header,
    read_json,
    shard_like,
)
from bot.merge.checkpoints.header import TensorInfo, refuse

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A LoRA adapter before its weights are read. `digest` covers its config."""

    name: str
    config: LoraConfig
    tensors: Mapping[str, TensorInfo]
    headers: Mapping[str, tuple[int, str]]
    sizes: Mapping[str, int]
    files: Files
    digest: str

    @property
    def header_ends(self) -> dict[str, int]:
        """File -> bytes before its first tensor."""
        return {WEIGHTS: min(tensor.start for tensor in self.tensors.values())}


def open_source(files: Files, *, limits: Limits = TRUSTED, name: str | None = None) -> Checkpoint | Adapter:
    """Open a model or an adapter by its config and headers. A folder that holds both counts as the model.

    Raises `bot.errors.Refused` as `open_checkpoint` and `open_adapter` do.
    """
    sizes = files.sizes()
    whole = "config.json" in sizes and (INDEX in sizes or any(shard_like(file) for file in sizes))
    if CONFIG in sizes and not whole:
        return open_adapter(files, limits=limits, name=name)
    return open_checkpoint(files, limits=limits, name=name)


def open_adapter(files: Files, *, limits: Limits = TRUSTED, name: str | None = None) -> Adapter:
    """Read the config and the header of an adapter. Raises `Refused`: BAD_CHECKPOINT, NOT_SUPPORTED,
    SOURCE_NOT_SAFETENSORS."""
    label = name or str(files)
    sizes = files.sizes()
    loaded, text = read_json(files, sizes, CONFIG, label, limits)
    meaning = lora_config(loaded, label)
    if WEIGHTS not in sizes:
        only = next((file for file in sorted(sizes) if file.startswith("adapter_model")), None)
        message = f"{label} has {'only ' + only if only else 'no ' + WEIGHTS}."
        raise Refused("SOURCE_NOT_SAFETENSORS", message, "Ask its author for safetensors.", value=label)
    tensors, digest = read_header(files, WEIGHTS, sizes[WEIGHTS], label, limits)
    stray = next((tensor for tensor in tensors if not tensor.startswith(PREFIX)), None)
    if stray is not None:
        refuse(f"{label}: {WEIGHTS}", f"has the tensor `{stray[:80]}`, whose name does not start with {PREFIX}")
    coded = next((t for t in tensors.values() if not t.dtype.floating or t.dtype.quantised), None)
    if coded is not None:
        refuse(f"{label}: {WEIGHTS}", f"stores `{coded.name[:80]}` as {coded.dtype.name}.")
    known = hashlib.sha256(text.encode()).hexdigest()
    return Adapter(label, meaning, tensors, {WEIGHTS: (sizes[WEIGHTS], digest)}, sizes, files, known)
