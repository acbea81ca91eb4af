"""Byte ranges that a plan reads of its sources. docs/design/merging.md 5.1.

Headers and small texts are read whole, weights only as needed. Two ranges with a small gap between them become one,
because a request costs more than the bytes of the gap.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from bot.merge.planning.plan import Plan
from bot.merge.recipe.spec import ModelRef

BRIDGED_BYTES = 8 * 2**20
Range = tuple[int, int]  # [start, end) in bytes from the beginning of the file
Needs = Mapping[ModelRef, Mapping[str, tuple[Range, ...]]]


def needed(plan: Plan, *, bridged_bytes: int = BRIDGED_BYTES) -> Needs:
    """Ranges of every file the plan reads, by source; ascending, with gaps of at least `bridged_bytes` between them."""
    ranges: dict[ModelRef, dict[str, list[Range]]] = {ref: {} for ref in plan.recipe.repos}
    for part in plan.parts:
        for ref, file, span in _reads(part):
            if ref in ranges:  # stages are not read from outside
                ranges[ref].setdefault(file, []).append(span)
    return {
        ref: {file: bridged(spans, bridged_bytes) for file, spans in sorted(files.items())}
        for ref, files in ranges.items()
    }


def _reads(plan: Plan) -> Iterator[tuple[ModelRef, str, Range]]:
    """Ranges that one document reads, in any order."""
    for source in plan.sources:
        for file, size in (*source.header_ends.items(), *source.texts.items()):
            yield source.model.bare, file, (0, size)
        for tensor in (tensor for pair in source.presumed for tensor in pair):
            yield source.model.bare, tensor.file, (tensor.start, tensor.start + tensor.nbytes)
    for copied in plan.copies:
        yield copied.model.bare, copied.file, (0, copied.nbytes)
    for step in plan.steps:
        for operand in step.work.reads:
            for ref, tensor in operand.reads:
                yield ref, tensor.file, (tensor.start, tensor.start + tensor.nbytes)


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
