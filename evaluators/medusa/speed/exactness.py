"""Divergences of speculative decoding from the baseline's text, and the check that rounding explains them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.model.rounding import rounding_gaps
from evaluators.medusa.speed.bench import Block
from evaluators.medusa.speed.report import Divergence


def divergences(base: Base, blocks: Sequence[Block], candidate: str, deadline: float | None = None) -> list[Divergence]:
    """Return every run of a candidate that differs from the baseline; equal ones of a question once.

    Each is checked for rounding; past `deadline` (time.monotonic) only the first is.
    """
    differing: list[Divergence] = []
    for block in blocks:
        for got in dict.fromkeys(tuple(trace.tokens) for trace in block.runs[candidate]):
            if got != tuple(block.plain[0].tokens):
                late = deadline is not None and bool(differing) and time.monotonic() > deadline
                differing.append(_divergence(base, block, got, late))
    return differing


def _divergence(base: Base, block: Block, got: Sequence[int], late: bool) -> Divergence:
    want, prompt = block.plain[0].tokens, block.question.prompt.id
    index = next((at for at, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), None)
    if index is None:  # no token differs, one text ended earlier
        return Divergence(prompt, min(len(got), len(want)), tie=False)
    known = None if late else rounding_gaps(base, block.question.ids, got, index, want[index])
    if known is None:
        return Divergence(prompt, index)
    gaps, limits = known
    worst = int((gaps / limits).argmax())
    tie = bool((gaps <= limits).all())
    return Divergence(prompt, index, round(float(gaps[worst]), 4), round(float(limits[worst]), 4), tie)
