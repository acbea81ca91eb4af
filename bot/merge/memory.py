"""How much memory merging one tensor takes, from above: what the plan promises and the engine keeps.

A worker holds a few pieces of 2^18 elements (or one row, where that is longer) and what a pass must remember of the
whole tensor: the elements gathered around a threshold, the bits of random masks, sums per column.
"""

from __future__ import annotations

from bot.merge.steps import Work

PIECE = 2**18
ROWS = ("della", "della_linear", "arcee_fusion", "nuslerp", "model_stock")  # pieces of whole rows, in some settings
BUFFERS = 16  # pieces in the working type beside the inputs: sums, counts, products of a pass
PASSING_BYTES = 64  # per element of a piece: comparisons, draws, a sorted copy
GATHERED = 2**22  # elements gathered around one threshold at most
BITS_LIMIT_BYTES = 2**25  # bits of one mask; a longer mask is drawn again instead


def memory_of(work: Work) -> int:
    """Bytes one worker needs for one tensor, beside the interpreter."""
    wide = 8 if any(operand.tensor.dtype.name == "float64" for operand in work.reads) else 4
    piece = min(work.elements, max(PIECE, _unit(work)))
    views = len(work.reads) + (len(work.operands) if work.aligned is not None else 0)
    views += 2 * sum(operand.patch is not None for operand in work.reads)
    factors = sum(tensor.elements for operand in work.reads for _, tensor in operand.reads[1:])
    pieces = piece * (wide * (2 * views + BUFFERS) + PASSING_BYTES)
    return pieces + 3 * wide * factors + _state(work, wide)


def _unit(work: Work) -> int:
    """The longest stretch that pieces may have to hold whole."""
    rest = work.elements // work.shape[0] if work.shape and work.shape[0] else 1
    looked_at = work.aligned is not None or any(operand.patch is not None for operand in work.reads)
    if len(work.shape) > 1:
        return rest if looked_at or work.method in ROWS else 1
    return work.elements if work.method in ROWS else 1


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
