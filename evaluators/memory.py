"""Memory: what a checkpoint takes once it is loaded, from its headers alone, what a request of a batch takes beside it,
and how many requests fit."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bot.errors import EvaluationError

_HEADER_LIMIT_BYTES = 100 * 1000 * 1000  # the format's own cap
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
CPU_BATCH, GPU_BATCH = 16, 256
_DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
_GPU_DRIVERS = ("nvidiactl", "nvmap", "kfd", "dxg")  # NVIDIA's, Jetson's, AMD's, that of Windows under Linux


def computed_on(device: str) -> str:
    """The device that "auto" is on this machine; every other one itself. Loads torch only where a GPU may be."""
    if device != "auto":
        return device
    if not any(Path("/dev", driver).exists() for driver in _GPU_DRIVERS):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def loaded_bytes(model: Path, dtype: str, device: str) -> int:
    """Bytes of the weights in memory: in `dtype`, where "auto" is float32 on a CPU and the stored type elsewhere."""
    item = _DTYPES.get(dtype, 4 if computed_on(device) == "cpu" else None)
    total = 0
    for file in sorted(model.glob("*.safetensors")):
        for tensor in _header(file).values():
            total += math.prod(tensor["shape"]) * (item or _ITEM_BYTES.get(tensor["dtype"], 1))
    return total


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> dtype, shape (github.com/huggingface/safetensors, "Format"); empty where it cannot be read, or
    names more than the file can hold."""
    try:
        most = 8 * file.stat().st_size  # no type has less than a bit
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            found = json.loads(stream.read(min(size, _HEADER_LIMIT_BYTES)))
        return {
            name: {"dtype": str(tensor["dtype"]), "shape": tensor["shape"]}
            for name, tensor in found.items()
            if name != "__metadata__"
            and all(isinstance(n, int) and n >= 0 for n in tensor["shape"])
            and math.prod(tensor["shape"]) <= most
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # whoever loads it says what is wrong


def require_memory(model: Path, dtype: str, device: str, limit_bytes: int | None) -> None:
    """Refuse a model whose weights alone are more than there is, before a process starts. Raises MEMORY_LIMIT.

    On a GPU the weights pass through main memory file by file, so only a CPU is asked for all of them.
    """
    if computed_on(device) != "cpu":
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


def bytes_a_request(config: Any, longest: int, item_bytes: int) -> int:
    """Memory one request of a batch takes at most beside the weights: logits and their logarithms, and the cache of
    keys and values."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", 1)
    width = getattr(text, "head_dim", None) or text.hidden_size // getattr(text, "num_attention_heads", 1)
    cache = 2 * text.num_hidden_layers * heads * width
    return int(max(1, longest) * item_bytes * (3 * text.vocab_size + cache + 8 * text.hidden_size))


def batch(asked: str, device: str, free_bytes: int, request_bytes: int) -> int:
    """The batch to begin with. "auto": 16 on a CPU, where larger ones gain nothing, and on a GPU the largest power of
    two whose requests fit into half of what is free. Memory that runs out all the same halves it later."""
    if asked != "auto":
        return int(asked)
    if device == "cpu":
        return CPU_BATCH
    fits = free_bytes // 2 // max(1, request_bytes)
    return max(1, min(GPU_BATCH, 1 << (int(fits).bit_length() - 1) if fits else 1))


def free_bytes(device: str) -> int:
    """Free memory of a GPU; 0 for a CPU, where the batch does not depend on it."""
    if not device.startswith("cuda"):
        return 0
    import torch

    return int(torch.cuda.mem_get_info(torch.device(device))[0])
