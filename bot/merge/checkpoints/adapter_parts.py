"""Tensors of an adapter, sorted by module and role, and the tokenizer saved beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from bot.merge.checkpoints.checkpoint import Files
from bot.merge.checkpoints.header import TensorInfo, refuse
from bot.merge.checkpoints.lora import PREFIX, WEIGHTS, Adapter
from bot.merge.checkpoints.model_files import NAMED_TEMPLATES, TOKENIZER_FILES

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?P<leaf>\.weight|\.bias)?"
)
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?")
_SAVED = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer)(?=\.)")

ModuleTensors = dict[str, TensorInfo]  # by role: `lora_A`, ..., `bias` (of lora_B), `tokens` (rows of a matrix)


@dataclass(slots=True)
class SortedTensors:
    """Changed modules by name; tensors saved whole by the name of the model's tensor; names with unknown roles."""

    modules: dict[str, ModuleTensors] = field(default_factory=dict)
    saved: dict[str, TensorInfo] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def sort_tensors(adapter: Adapter) -> SortedTensors:
    """Sort an adapter's tensors. Raises `Refused` BAD_CHECKPOINT for a tensor given twice."""
    out = SortedTensors()
    for full, tensor in adapter.tensors.items():
        name = full.removeprefix(PREFIX)
        if any(part in name + "." for part in adapter.config.unused):
            continue
        role = _role(name)
        if role is None and ("lora_" in name or "token_adapter" in name):
            out.unknown.append(full)
            continue
        table, key = (
            (out.saved, _SAVED.sub("", name)) if role is None else (out.modules.setdefault(role[0], {}), role[1])
        )
        if key in table:
            refuse(f"{adapter.name}: {WEIGHTS}", f"gives `{full[:120]}` twice, under two spellings.")
        table[key] = tensor
    return out


def _role(name: str) -> tuple[str, str] | None:
    """(module, role) of a tensor that changes a module; None for one saved whole."""
    tokens = _TOKENS.fullmatch(name)
    if tokens is not None:
        return tokens["module"], "tokens"
    match = _FACTOR.fullmatch(name)
    if match is None or (match["leaf"] == ".bias" and match["part"] != "lora_B"):
        return None
    return match["module"], "bias" if match["leaf"] == ".bias" else match["part"]


def tokenizer_files(names: Iterable[str]) -> frozenset[str]:
    """The files of a tokenizer among file names; none where the tokenizer itself is missing."""
    found = frozenset(TOKENIZER_FILES).intersection(names)
    return found if any(name.startswith("tokenizer") for name in found) else frozenset()


@dataclass(frozen=True, slots=True)
class OtherTokenizer:
    """`Files` of a model, with `names` taken from its adapter in place of the model's tokenizer."""

    model: Files
    adapter: Files
    names: frozenset[str]

    def __str__(self) -> str:
        return str(self.model)

    def sizes(self) -> dict[str, int]:
        templates = f"{NAMED_TEMPLATES}/"
        sizes = self.model.sizes().items()
        own = {name: size for name, size in sizes if name not in TOKENIZER_FILES and not name.startswith(templates)}
        return own | {name: size for name, size in self.adapter.sizes().items() if name in self.names}

    def read(self, name: str, start: int, length: int) -> bytes:
        return (self.adapter if name in self.names else self.model).read(name, start, length)
