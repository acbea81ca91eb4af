"""Check of whether rounding alone explains a token that differs from baseline decoding.

In 16 bit a token that is computed among others goes through other kernels than alone, and two logits that lie near one
another may change places. How near cannot be asked of the computation that is under suspicion: the judge is the same
model with the same weights in float32, over the whole text at once, without a cache and without a tree.
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
# Measured on a 135 M Llama in bfloat16: however its tokens are read, one by one or five together, the two best moved
# against one another by at most 2.4 of these deviations and a step.
REACH = 4 * math.sqrt(2)
LARGEST_SHARE = 0.8  # of the free memory
HALVES = (torch.bfloat16, torch.float16)


@torch.no_grad()
def rounding_gaps(
    base: Base, prompt: Sequence[int], chosen: Sequence[int], since: int = 0, rival: int | None = None
) -> tuple[Tensor, Tensor] | None:
    """How far below the best token in float32 each token of the answer `chosen` lies from index `since` on [n], and
    how far rounding reaches there [n]. A `rival` is a token that another way of decoding chose at `since`: there the
    worse of the two counts.

    Rounding chose only what lies within its reach: what separates two tokens whose errors are each as large as those
    of this model are here. That is the standard deviation, over the vocabulary, of what 16 bit changes in the logits
    of plain text (one shift of all decides nothing), four times that of a difference of two; and one step of the type
    at the best logit. A wrong mask, cache or acceptance changes neither pass over plain text, so it cannot widen the
    reach that it is held against. In float32 the reach is a constant.

    None where nobody can tell: float32 weights do not fit into memory, logits overflow or are no numbers, or the text
    reaches the line at which the rope changes its angles, and one pass over all of it is another computation than step
    after step.
    """
    text = [*prompt, *chosen[:-1]]
    kind, line = base.rope
    if kind in ("longrope", "dynamic") and line is not None and len(text) >= line:
        return None
    ids = torch.tensor([text], device=base.device)
    first = len(prompt) + since - 1
    try:
        with _memory_said_as_such():
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
    """While it lasts the base computes in float32, by torch's own products, with the weights that it has.

    `free_bytes` is the memory there is, None asks the system. Raises MemoryError where the copies do not fit.
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
        with _memory_said_as_such(), packed.unpacked(base):
            for tensor in tensors:
                tensor.data = tensor.data.float()
            yield
    finally:
        for tensor, data in zip(tensors, narrow, strict=True):
            tensor.data = data


@contextlib.contextmanager
def _memory_said_as_such() -> Iterator[None]:
    """torch raises RuntimeError where memory runs out; raise MemoryError."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" in str(error) or "allocate memory" in str(error):
            raise MemoryError(str(error)) from error
        raise


def _logits(base: Base, ids: Tensor, first: int) -> Tensor:
    """Logits [n, V] in float32 after the tokens of `ids` from index `first` on, in one pass over plain text."""
    hidden, _ = base.run(ids, project=False, use_cache=False)
    return base.logits(hidden[0, first:]).float()


def step(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between numbers of this type next to each of `values`."""
    return torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(values.abs().clamp(min=1e-30))))
