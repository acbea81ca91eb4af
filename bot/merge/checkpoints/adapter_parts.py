"""Tensors of an adapter, sorted by module and role."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from bot.merge.checkpoints.header import TensorInfo, refuse
from bot.merge.checkpoints.lora import PREFIX, WEIGHTS, Adapter

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?P<leaf>\.weight|\.bias)?"
)
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?")
_SAVED = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer)(?=\.)")


@dataclass(slots=True)
class AdaptedModule:
    """The adapter's tensors for one module: by part (`lora_A`, ..., `bias`: of lora_B, `tokens`: rows of a matrix)."""

    parts: dict[str, TensorInfo] = field(default_factory=dict)


@dataclass(slots=True)
class SortedTensors:
    """Changed modules by name; tensors saved whole by the name of the model's tensor; names with unknown roles."""

    modules: dict[str, AdaptedModule] = field(default_factory=dict)
    saved: dict[str, TensorInfo] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def sort_tensors(adapter: Adapter) -> SortedTensors:
    """Sort an adapter's tensors. Raises `Refused` BAD_CHECKPOINT for a tensor given twice."""
    out = SortedTensors()
    for full, tensor in adapter.tensors.items():
        name = full.removeprefix(PREFIX)
        if any(part in name + "." for part in adapter.config.unused):
            continue
        part = _part(name)
        if part is not None:
            parts = out.modules.setdefault(part[0], AdaptedModule()).parts
            _once(adapter, part[1] in parts, full)
            parts[part[1]] = tensor
        elif "lora_" in name or "token_adapter" in name:
            out.unknown.append(full)
        else:
            own = _SAVED.sub("", name)
            _once(adapter, own in out.saved, full)
            out.saved[own] = tensor
    return out


def _part(name: str) -> tuple[str, str] | None:
    """(module, role) of a tensor that changes a module; None for one saved whole."""
    tokens = _TOKENS.fullmatch(name)
    if tokens is not None:
        return tokens["module"], "tokens"
    match = _FACTOR.fullmatch(name)
    if match is None or (match["leaf"] == ".bias" and match["part"] != "lora_B"):
        return None
    return match["module"], "bias" if match["leaf"] == ".bias" else match["part"]


def _once(adapter: Adapter, twice: bool, name: str) -> None:
    if twice:
        refuse(f"{adapter.name}: {WEIGHTS}", f"gives `{name[:120]}` twice, under two spellings.")
