"""How much memory merging one tensor takes, from above: what the plan promises and the engine keeps.

A worker holds a few pieces of 2^18 elements (or one row, where that is longer) and what a pass must remember of the
whole tensor: the elements gathered around a threshold, the bits of random masks, sums per column.

A plan adds up `plan.WORKERS` of its largest tensors and the interpreter, which is what a merge on the CPU takes with as
many threads. Every thread more takes at most the largest tensor's need again. On CUDA the same holds for the host;
memory of the device, and what its libraries map into the host, are not covered.
"""

from __future__ import annotations

import math

from bot.merge.planning.work import Work

CHUNK = 2**18  # elements of a piece, and of a sum in one type; fixed by the numerics version
ROWS = ("della", "della_linear", "arcee_fusion")  # look at rows whatever their settings
BUFFERS = 16  # pieces in the working type beside the inputs: sums, counts, products of a pass
PASSING_BYTES = 64  # per element of a piece: comparisons, draws, a sorted copy
GATHERED = 2**22  # elements gathered around one threshold at most
BITS_LIMIT_BYTES = 2**25  # bits of one mask; a longer mask is drawn again instead


def memory_of(work: Work) -> int:
    """Bytes one worker needs for one tensor, beside the interpreter."""
    wide = 8 if any(operand.tensor.dtype.name == "float64" for operand in work.reads) else 4
    views = len(work.reads) + (len(work.operands) if work.aligned is not None else 0)
    views += 2 * sum(operand.patch is not None for operand in work.reads)
    factors = sum(tensor.elements for operand in work.reads for _, tensor in operand.reads[1:])
    pieces = piece_of(work) * (wide * (2 * views + BUFFERS) + PASSING_BYTES)
    return pieces + 3 * wide * factors + _state(work, wide)


def piece_of(work: Work) -> int:
    """Elements of the longest piece on the CPU: re-indexed and adapted matrices are read by rows, too."""
    viewed = work.aligned is not None or any(operand.patch is not None for operand in work.reads)
    unit = max(1, math.prod(work.shape[1:])) if viewed else 1
    return min(work.elements, max(CHUNK, unit, row_length(work)))


def by_row(work: Work) -> bool:
    """Whether the method takes rows, or vectors along dimension 0, one by one."""
    return not work.shared.get("nuslerp_flatten", True) or bool(work.shared.get("filter_wise", False))


def row_length(work: Work) -> int:
    """Pieces must hold whole rows of this many elements: 1 for methods that do not look at rows."""
    if not work.shape or not (by_row(work) or work.method in ROWS):
        return 1
    if work.shared.get("nuslerp_row_wise") and len(work.shape) > 1:
        return max(1, math.prod(work.shape[1:]))
    return max(1, work.shape[-1])


def _state(work: Work, wide: int) -> int:
    """What is remembered of the whole tensor."""
    if work.action != "merge":
        return 0
    count = len(work.operands)
    if work.method in ("ties", "breadcrumbs", "breadcrumbs_ties", "sce", "arcee_fusion"):
        thresholds = {"ties": count, "sce": 1, "arcee_fusion": 3}.get(work.method, 2 * count)
        return thresholds * 2 * wide * min(work.elements, GATHERED)
    if work.method.startswith(("dare", "della")) and work.shared.get("rescale"):
        return count * min(work.elements // 8 + 1, BITS_LIMIT_BYTES)
    if work.shared.get("nuslerp_row_wise"):
        return 12 * 8 * (work.elements // max(1, work.shape[0] if work.shape else 1))
    return 0
