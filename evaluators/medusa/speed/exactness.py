"""Divergences of speculative decoding from the baseline's text, and the check that rounding explains them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.model.rounding import rounding_gaps
from evaluators.medusa.speed.bench import Block


@dataclass(frozen=True, slots=True)
class Divergence:
    """A run that differs from the baseline's text of its question from token `index` of the answer on.

    `tie` says whether rounding explains every token from there on; None where that could not be judged. The token that
    it explains least lies `gap` below the best in float32, where rounding reaches `limit` far.
    """

    question: int
    prompt: str
    index: int
    gap: float | None = None
    limit: float | None = None
    tie: bool | None = None


def divergences(base: Base, blocks: Sequence[Block], candidate: str, deadline: float | None = None) -> list[Divergence]:
    """Return every run of a candidate that differs from the baseline, each checked; equal ones of a question once.

    Past `deadline` (time.monotonic) no other than the first is.
    """
    found: list[Divergence] = []
    for number, block in enumerate(blocks):
        for got in dict.fromkeys(tuple(trace.tokens) for trace in block.runs[candidate]):
            if got != tuple(block.plain[0].tokens):
                late = deadline is not None and bool(found) and time.monotonic() > deadline
                found.append(_judged(base, block, got, Divergence(number, block.question.prompt.id, 0), late))
    return found


def _judged(base: Base, block: Block, got: Sequence[int], found: Divergence, late: bool) -> Divergence:
    want = block.plain[0].tokens
    index = next((at for at, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), None)
    if index is None:  # no token differs, one text ended earlier
        return replace(found, index=min(len(got), len(want)), tie=False)
    known = None if late else rounding_gaps(base, block.question.ids, got, index, want[index])
    if known is None:
        return replace(found, index=index)
    gaps, limits = known
    worst = int((gaps / limits).argmax())
    return replace(
        found, index=index, gap=float(gaps[worst]), limit=float(limits[worst]), tie=bool((gaps <= limits).all())
    )
