"""Check if rounding alone explains a token that differs from baseline decoding.

In 16 bit a token that is computed together with others uses other kernels than alone, and two logits that are close may
change order. The reference for what is close is the same model with the same weights in float32, in one pass over the
whole text without a cache and without a tree, because the decoding under test cannot be its own reference.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from evaluators.medusa.model import packed
from evaluators.medusa.model.causal_lm import Base

FLOAT32_TIE = 1e-3
# Measured on a 135 M Llama in bfloat16: between decoding one token and five tokens per pass, the difference of the two
# best logits changed by at most 2.4 of these deviations plus one step of the type.
REACH = 4 * math.sqrt(2)
LARGEST_SHARE = 0.8  # of the free memory
HALVES = (torch.bfloat16, torch.float16)


@torch.no_grad()
def rounding_gaps(
    base: Base, prompt: Sequence[int], chosen: Sequence[int], since: int = 0, rival: int | None = None
) -> tuple[Tensor, Tensor] | None:
    """(gaps [n], tolerances [n]) of the tokens of the answer `chosen` from index `since` on.

    The gap is the distance of the token's logit from the best one in float32. `rival` is a token that another decoding
    chose at `since`; the larger gap of the two counts there.

    Rounding explains a token whose gap is at most the tolerance: four standard deviations of the difference of two
    logits, plus one step of the type at the best logit. The deviation is that of the changes by 16 bit over the
    vocabulary, in a pass over the text. A wrong mask, cache or acceptance affects neither of the two passes, so it
    cannot raise the tolerance. In float32 the tolerance is a constant.

    None if no reference exists: float32 weights do not fit into memory, logits are not finite, or the text reaches the
    length at which the rope changes its angles, so that one pass differs from step-by-step decoding.
    """
    text = [*prompt, *chosen[:-1]]
    kind, line = base.rope
    if kind in ("longrope", "dynamic") and line is not None and len(text) >= line:
        return None
    ids = torch.tensor([text], device=base.device)
    first = len(prompt) + since - 1
    try:
        with _raise_memory_error():
            as_run = _logits(base, ids, first) if base.dtype in HALVES else None
        with in_float32(base):
            exact = _logits(base, ids, first)
    except MemoryError:
        return None
    if not bool(exact.isfinite().all()) or not (as_run is None or bool(as_run.isfinite().all())):
        return None
    best = exact.max(-1).values
    tokens = torch.tensor(list(chosen[since:]), device=base.device)
    gaps = best - exact.gather(-1, tokens[:, None])[:, 0]
    if rival is not None:
        gaps[0] = torch.maximum(gaps[0], best[0] - exact[0, rival])
    if as_run is None:
        return gaps, torch.full_like(gaps, FLOAT32_TIE)
    return gaps, REACH * (as_run - exact).std(-1) + step(best, base.dtype)


@contextlib.contextmanager
def in_float32(base: Base, free_bytes: int | None = None) -> Iterator[None]:
    """Convert the weights of the base to float32 inside the block and use the products of torch.

    `free_bytes` is the free memory, by default that of the system. Raises MemoryError if the copies do not fit.
    """
    tensors = [
        tensor for tensor in itertools.chain(base.model.parameters(), base.model.buffers()) if tensor.dtype in HALVES
    ]
    needed = sum(4 * tensor.numel() for tensor in tensors)
    free = packed.free_memory(base.device) if free_bytes is None else free_bytes
    if free is not None and needed > LARGEST_SHARE * free:
        raise MemoryError(f"float32 weights need {needed >> 20} MiB, and {free >> 20} MiB are free")
    narrow = [tensor.data for tensor in tensors]
    try:
        with _raise_memory_error(), packed.unpacked(base):
            for tensor in tensors:
                tensor.data = tensor.data.float()
            yield
    finally:
        for tensor, data in zip(tensors, narrow, strict=True):
            tensor.data = data


@contextlib.contextmanager
def _raise_memory_error() -> Iterator[None]:
    """Turn RuntimeError of torch for exhausted memory into MemoryError."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" in str(error) or "allocate memory" in str(error):
            raise MemoryError(str(error)) from error
        raise


def _logits(base: Base, ids: Tensor, first: int) -> Tensor:
    """Logits [n, V] in float32 after the tokens of `ids` from index `first` on, in one pass without a cache."""
    hidden, _ = base.run(ids, project=False, use_cache=False)
    return base.logits(hidden[0, first:]).float()


def step(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between adjacent numbers of this type at each of `values`."""
    return torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(values.abs().clamp(min=1e-30))))
