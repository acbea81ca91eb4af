"""Linear layers with weights packed once for this CPU.

torch multiplies one row by a matrix in its stored layout, but reorders the whole matrix for every product of several
rows, so two tokens cost far more than one. A layout of oneDNN that is made once serves any number of rows and speeds up
both decoding loops. Each weight then takes memory twice. Measured in benchmarks/RESULTS.md.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from evaluators.medusa.model import causal_lm
from evaluators.medusa.model.attention import use_grouped
from evaluators.medusa.model.causal_lm import Base, close

# The layout that oneDNN chooses for one row is slower even for one row (measured).
ROWS = 16
LARGEST_SHARE = 0.5  # of the free memory
PROBE_ROWS = 3


def load(folder: Path, device: str = "cpu", dtype: str = "auto") -> tuple[Base, str | None]:
    """Load a checkpoint as it runs fastest on this machine. Returns (base, reason why weights are not packed, or None).

    `dtype` "auto" is causal_lm.fastest_dtype. Raises EvaluationError as causal_lm.load does.
    """
    chosen = causal_lm.fastest_dtype(folder, device) if dtype == "auto" else getattr(torch, dtype)
    base = causal_lm.load(folder, device, chosen)
    use_grouped(base)
    return base, pack(base)


def pack(base: Base, free_bytes: int | None = None) -> str | None:
    """Let the linear layers of `base` multiply by packed weights. Returns the reason if that is not possible.

    `free_bytes` is the free memory, by default that of the system. Packed layers have no gradient (`unpack` first).
    """
    if base.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "packed weights need a CPU supported by oneDNN"
    if base.dtype not in (torch.float32, torch.bfloat16):
        return f"oneDNN packs no weights of type {str(base.dtype).removeprefix('torch.')}"
    layers = [module for module in base.model.modules() if _kind(module) is not None]
    needed = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    free = free_memory(base.device) if free_bytes is None else free_bytes
    if free is not None and needed > LARGEST_SHARE * free:
        return f"packed weights need {needed >> 20} MiB more, and {free >> 20} MiB are free"
    try:
        for layer in layers:
            layer.forward = _packed(layer)
    except RuntimeError:  # a layer of another type or without rows
        unpack(base)
        return "oneDNN does not take all of its layers"
    if layers and not all(_agrees(layer) for layer in {layer.weight.shape: layer for layer in layers}.values()):
        unpack(base)
        return "packed weights give other products here"
    base.execution = "packed"
    return None


def unpack(base: Base) -> None:
    """Return to the products of torch."""
    for module in base.model.modules():
        if _kind(module) is not None:
            module.__dict__.pop("forward", None)
    base.execution = "eager"


@contextlib.contextmanager
def unpacked(base: Base) -> Iterator[None]:
    """Use the products of torch inside the block; packed weights are kept."""
    layers = [module for module in base.model.modules() if _kind(module) is not None]
    kept = [(layer, layer.__dict__.pop("forward")) for layer in layers if "forward" in vars(layer)]
    try:
        yield
    finally:
        for layer, forward in kept:
            layer.forward = forward


def _kind(module: nn.Module) -> type[nn.Module] | None:
    # Subclasses may do more than multiply.
    return type(module) if type(module) in (nn.Linear, Conv1D) else None


def _packed(layer: Any) -> Callable[[Tensor], Tensor]:
    return product(layer.weight.t().contiguous() if type(layer) is Conv1D else layer.weight, layer.bias)


@torch.no_grad()
def product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Pack W [O, I]. Returns the function x [.., I] -> x W^T + b [.., O]."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
    bias = None if bias is None else bias.detach()

    def forward(x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return product

    return forward


@torch.no_grad()
def _agrees(layer: Any) -> bool:
    """Return True if the packed products equal those of torch up to rounding."""
    width = layer.weight.shape[0 if type(layer) is Conv1D else 1]
    x = torch.randn(1, PROBE_ROWS, width, generator=torch.Generator().manual_seed(0)).to(layer.weight.dtype)
    tolerance = 1e-4 if x.dtype == torch.float32 else 2e-2
    return close(layer(x).float(), type(layer).forward(layer, x).float(), tolerance)


def free_memory(device: torch.device) -> int | None:
    """Free bytes on the device; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        known = available(Path("/proc/meminfo").read_text(encoding="ascii"))
    except (OSError, ValueError):
        known = None
    if known is not None:
        return known
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def available(meminfo: str) -> int | None:
    """`MemAvailable` of /proc/meminfo in bytes, which counts cached files as free; None if it is absent."""
    found = re.search(r"^MemAvailable: +([0-9]+) kB$", meminfo, re.MULTILINE)
    return None if found is None else 1024 * int(found[1])
