"""Which bytes of which files a plan reads: what has to be fetched of a source that lies elsewhere. merging.md 5.1.

Headers and small texts whole, of the weights only the tensors that take part. Two ranges with a small gap between them
become one, because a request costs more than the bytes of the gap.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bot.merge.plan import Plan
from bot.merge.spec import ModelRef

BRIDGED_BYTES = 8 * 2**20
Range = tuple[int, int]  # [start, end) in bytes from the beginning of the file
Needs = Mapping[ModelRef, Mapping[str, tuple[Range, ...]]]


def needed(plan: Plan, *, bridged_bytes: int = BRIDGED_BYTES) -> Needs:
    """Ranges of every file the plan reads, by source; ascending, with gaps of at least `bridged_bytes` between them."""
    found: dict[ModelRef, dict[str, list[Range]]] = {}
    for source in plan.sources:
        files = found.setdefault(source.model, {})
        for file, end in source.header_ends.items():
            files.setdefault(file, []).append((0, end))
        for file, size in source.texts.items():
            files.setdefault(file, []).append((0, size))
    for copied in plan.copies:
        found.setdefault(copied.model, {}).setdefault(copied.file, []).append((0, copied.nbytes))
    for step in plan.steps:
        for operand in step.work.reads:
            tensor = operand.tensor
            spans = found.setdefault(operand.model, {}).setdefault(tensor.file, [])
            spans.append((tensor.start, tensor.start + tensor.nbytes))
    return {
        ref: {file: bridged(spans, bridged_bytes) for file, spans in sorted(files.items())}
        for ref, files in found.items()
    }


def bridged(spans: Iterable[Range], gap_bytes: int) -> tuple[Range, ...]:
    """`spans` in order, those less than `gap_bytes` apart (or overlapping) as one; empty ones are dropped."""
    out: list[Range] = []
    for start, end in sorted(span for span in spans if span[0] < span[1]):
        if out and start < out[-1][1] + max(gap_bytes, 1):
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return tuple(out)


def total_bytes(needs: Needs) -> int:
    """Bytes of all ranges."""
    return sum(end - start for files in needs.values() for spans in files.values() for start, end in spans)
