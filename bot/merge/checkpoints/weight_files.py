"""Choice of the weight files of a folder: that of transformers 5.23, or a refusal.

`model.safetensors` comes before `model.safetensors.index.json`. An index only names shards: all that they hold is
loaded. Source: `_get_resolved_checkpoint_files` and `get_checkpoint_shard_files` of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from bot.errors import Refused
from bot.merge.checkpoints.header import Limits, TensorInfo, refuse
from bot.merge.checkpoints.ties import is_copy, is_head

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD_NAME = re.compile(r"[\w.\-]{1,200}\.safetensors", re.ASCII)
_NUMBERED = re.compile(r".*-(\d{5})-of-(\d{5})\.safetensors")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")
_MOST_NOTICES = 3  # an index of other shards would give one per tensor


def weight_file(names: Collection[str]) -> str | None:
    """The file that transformers opens first, of those it knows by name."""
    return next((name for name in (SINGLE, INDEX) if name in names), None)


def shard_like(name: str) -> bool:
    """True if a file may hold weights of the model itself."""
    return bool(SHARD_NAME.fullmatch(name)) and not name.startswith(("adapter_", "consolidated"))


def require_usual_name(config: Mapping[str, Any], names: Collection[str], label: str) -> None:
    """Refuse a config that names another file as the weights. Raises Refused NOT_SUPPORTED."""
    named = config.get("transformers_weights")
    if isinstance(named, str) and named != weight_file(names):
        message = f"{label} names {named[:80]!r} as its weights (`transformers_weights` in config.json)."
        raise Refused("NOT_SUPPORTED", message, f"Name its weights {SINGLE} and remove that key.", value=label)


def shards_without_index(names: Collection[str], label: str) -> list[str]:
    """The one file that holds all weights. Raises Refused."""
    if SINGLE in names:
        return [SINGLE]
    shards = [name for name in sorted(names) if shard_like(name)]
    if len(shards) == 1 and not _NUMBERED.fullmatch(shards[0]):
        return shards
    if shards:
        refuse(label, f"has {len(shards)} shards but no {INDEX}.")
    pickled = [name for name in sorted(names) if name.endswith(_PICKLED)]
    if pickled:
        next_step = "Ask its author for safetensors."
        raise Refused("SOURCE_NOT_SAFETENSORS", f"{label} has only {pickled[0]}.", next_step, value=label)
    next_step = "Name a model with *.safetensors files."
    raise Refused("SOURCE_NOT_SAFETENSORS", f"{label} has no weights.", next_step, value=label)


def beside(names: Collection[str], chosen: Collection[str], label: str) -> tuple[str, ...]:
    """A notice if transformers does not find the chosen file, or if other weights lie beside those chosen."""
    if weight_file(names) is None:
        return (f"{label}: {sorted(chosen)[0]} is taken as its weights; transformers only opens {SINGLE}",)
    other = next((name for name in sorted(names) if shard_like(name) and name not in chosen), None)
    index = INDEX in names and SINGLE in chosen
    if other is None and not index:
        return ()
    first = sorted(chosen)[0]
    return (f"{label}: {other or INDEX} lies beside {first} and is not read, as transformers does not read it",)


def against_index(
    label: str, mapped: Mapping[str, str], total: int | None, tensors: Mapping[str, TensorInfo], limits: Limits
) -> tuple[str, ...]:
    """Notices about an index that does not fit its shards. Refused if a tensor is missing, or if untrusted."""
    notices: list[str] = []

    def report(where: str, sentence: str) -> None:
        if limits.strict:
            refuse(where, sentence)
        notices.append(f"{where} {sentence}")

    for name, shard in mapped.items():
        lacks = f"lacks `{name[:80]}`, which the index puts there."
        if name not in tensors and not (is_head(name) or is_copy(name)):
            refuse(f"{label}: {shard}", lacks)
        if name not in tensors or tensors[name].file != shard:
            report(f"{label}: {shard}", lacks)
    extra = next((name for name in tensors if name not in mapped), None)
    if mapped and extra is not None:
        report(f"{label}: {tensors[extra].file}", f"has `{extra[:80]}`, which the index does not name.")
    stored = sum(tensor.nbytes for tensor in tensors.values())
    if total is not None and total != stored:
        report(f"{label}: {INDEX}", f"says {total:,} bytes in all, its shards hold {stored:,}.")
    return tuple(notices[:_MOST_NOTICES])
