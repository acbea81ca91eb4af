"""Memory estimates: the weights of a checkpoint from its headers, one request of a batch, and the batch that fits."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from bot.errors import EvaluationError

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
CPU_BATCH, GPU_BATCH = 16, 256
_DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
_GPU_DRIVERS = ("nvidiactl", "nvmap", "kfd", "dxg")  # of NVIDIA, Jetson, AMD and Windows Subsystem for Linux


def computed_on(device: str) -> str:
    """The device that "auto" selects on this machine, else `device`. Imports torch only if a GPU may exist."""
    if device != "auto":
        return device
    if not any(Path("/dev", driver).exists() for driver in _GPU_DRIVERS):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def loaded_bytes(model: Path, dtype: str, device: str) -> int:
    """Bytes of the loaded weights in `dtype`; "auto" is float32 on a CPU and the stored type elsewhere.

    An unreadable file counts 0 bytes; loading the model reports it.
    """
    item = _DTYPES.get(dtype, 4 if computed_on(device) == "cpu" else None)
    total = 0
    for file in sorted(model.glob("*.safetensors")):
        with contextlib.suppress(OSError, SafetensorError), safe_open(file, framework="numpy") as tensors:
            for tensor in map(tensors.get_slice, tensors.keys()):
                total += math.prod(tensor.get_shape()) * (item or _ITEM_BYTES.get(tensor.get_dtype(), 1))
    return total


def require_memory(model: Path, dtype: str, device: str, limit_bytes: int | None) -> None:
    """Refuse a model whose weights exceed the memory, before a process starts. Raises MEMORY_LIMIT.

    Applies to a CPU only: on the way to a GPU, main memory holds one file at a time.
    """
    if computed_on(device) != "cpu":
        return
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = physical if limit_bytes is None else min(physical, limit_bytes)
    need = loaded_bytes(model, dtype, device)
    if need > limit:
        raise EvaluationError(
            "MEMORY_LIMIT",
            f"The weights of {model.name} take {need / 1e9:.1f} GB of memory; {limit / 1e9:.1f} GB are available.",
            "Evaluate the model on a larger machine or on a GPU, or use --dtype bfloat16.",
        )


def spreads(need_bytes: int, free_bytes: Sequence[int]) -> bool:
    """True if the weights must be split over several GPUs.

    A quarter of one GPU is reserved for activations and the key-value cache.
    """
    return len(free_bytes) > 1 and need_bytes > 0.75 * free_bytes[0]


def bytes_a_request(config: Any, longest: int, item_bytes: int) -> int:
    """Upper bound of the memory of one request: logits, log-probabilities and key-value cache."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", 1)
    width = getattr(text, "head_dim", None) or text.hidden_size // getattr(text, "num_attention_heads", 1)
    cache = 2 * text.num_hidden_layers * heads * width
    return int(max(1, longest) * item_bytes * (3 * text.vocab_size + cache + 8 * text.hidden_size))


def batch(requested: str, device: str, free_bytes: int, request_bytes: int) -> int:
    """The initial batch size, which is halved if memory runs out.

    "auto" is 16 on a CPU, as larger batches are not faster there. On a GPU it is the largest power of two whose
    requests fit into half of the free memory.
    """
    if requested != "auto":
        return int(requested)
    if device == "cpu":
        return CPU_BATCH
    fits = free_bytes // 2 // max(1, request_bytes)
    return max(1, min(GPU_BATCH, 1 << (int(fits).bit_length() - 1) if fits else 1))


def free_bytes(device: str) -> int:
    """Free memory of a GPU in bytes; 0 for a CPU, where the batch size does not depend on it."""
    if not device.startswith("cuda"):
        return 0
    import torch

    return int(torch.cuda.mem_get_info(torch.device(device))[0])
