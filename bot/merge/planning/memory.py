"""Upper bound of the memory of a merge, per tensor and in total.

A worker holds a few chunks of 2^18 elements (or one row, if that is longer) and the state of a method for the whole
tensor. A plan adds up `plan.WORKERS` of its largest tensors and the interpreter: the need of a merge on the CPU with
that many threads. Each further thread takes at most the need of the largest tensor again. On CUDA the same holds for
the host; device memory and the mappings of its libraries are not covered.
"""

from __future__ import annotations

import math

from bot.merge.methods import METHODS
from bot.merge.planning.work import Work
from bot.merge.streaming.operation import CHUNK

BUFFERS = 16  # chunks in the compute dtype beside the inputs: sums, counts, products of a pass
PASSING_BYTES = 64  # per element of a chunk: comparisons, draws, a sorted copy


def memory_of(work: Work) -> int:
    """Bytes one worker needs for one tensor, beside the interpreter."""
    itemsize = 8 if any(operand.tensor.dtype.name == "float64" for operand in work.reads) else 4
    views = len(work.reads) + (len(work.operands) if work.aligned is not None else 0)
    views += 2 * sum(operand.patch is not None for operand in work.reads)
    factors = sum(tensor.elements for operand in work.reads for _, tensor in operand.reads[1:])
    chunks = chunk_of(work) * (itemsize * (2 * views + BUFFERS) + PASSING_BYTES)
    state = METHODS[work.method].state_bytes(work, itemsize) if work.action == "merge" else 0
    return chunks + 3 * itemsize * factors + state


def chunk_of(work: Work) -> int:
    """Elements of the longest chunk on the CPU: re-indexed and adapted matrices are read by rows, too."""
    viewed = work.aligned is not None or any(operand.patch is not None for operand in work.reads)
    unit = max(1, math.prod(work.shape[1:])) if viewed else 1
    return min(work.elements, max(CHUNK, unit, row_length(work)))


def row_length(work: Work) -> int:
    """Elements that a chunk must keep together: 1 for methods without row operations."""
    return METHODS[work.method].row_length(work) if work.action == "merge" and work.shape else 1
