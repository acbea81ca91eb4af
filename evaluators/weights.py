"""How much memory a checkpoint takes once it is loaded, from its headers alone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluators.errors import EvaluationError

_HEADER_LIMIT_BYTES = 100 * 1000 * 1000  # the format's own cap
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}


def loaded_bytes(model: Path, dtype: str, device: str) -> int:
    """Bytes of the weights in memory: in `dtype`, where "auto" is float32 on a CPU and the stored type elsewhere."""
    item = _DTYPES.get(dtype, 4 if device == "cpu" else None)
    total = 0
    for file in sorted(model.glob("*.safetensors")):
        for tensor in _header(file).values():
            total += math.prod(tensor["shape"]) * (item or _ITEM_BYTES.get(tensor["dtype"], 1))
    return total


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> dtype, shape (github.com/huggingface/safetensors, "Format"); empty where it cannot be read."""
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            found = json.loads(stream.read(min(size, _HEADER_LIMIT_BYTES)))
        return {
            name: tensor
            for name, tensor in found.items()
            if name != "__metadata__" and all(isinstance(n, int) and n >= 0 for n in tensor["shape"])
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # whoever loads it says what is wrong


def require_memory(model: Path, dtype: str, device: str, limit_bytes: int | None) -> None:
    """Refuse a model whose weights alone are more than there is, before a process starts. Raises MEMORY_LIMIT.

    On a GPU the weights pass through main memory file by file, so only a CPU is asked for all of them.
    """
    if device != "cpu":
        return
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = there if limit_bytes is None else min(there, limit_bytes)
    need = loaded_bytes(model, dtype, device)
    if need > limit:
        raise EvaluationError(
            "MEMORY_LIMIT",
            f"The weights of {model.name} take {need / 1e9:.1f} GB of memory, and there are {limit / 1e9:.1f} GB.",
            "Evaluate it on a larger machine or on a GPU, or give --dtype bfloat16.",
        )


def spreads(need_bytes: int, free_bytes: Sequence[int]) -> bool:
    """Whether the weights are to be laid over several GPUs: there are some, and one alone would have no room to work.

    A quarter of a GPU is left for activations and the cache of keys and values.
    """
    return len(free_bytes) > 1 and need_bytes > 0.75 * free_bytes[0]
