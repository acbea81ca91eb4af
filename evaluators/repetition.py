"""Detection of looping text from its tokens."""

from __future__ import annotations

from collections.abc import Sequence


def distinct_4grams(tokens: Sequence[int]) -> float:
    """Share of 4-grams that are different from each other; 1.0 for texts shorter than 8 tokens."""
    if len(tokens) < 8:
        return 1.0
    grams = [tuple(tokens[at : at + 4]) for at in range(len(tokens) - 3)]
    return len(set(grams)) / len(grams)


def loops(tokens: Sequence[int]) -> bool:
    """Looping text inflates tokens per step, so it is flagged."""
    return distinct_4grams(tokens) < 0.5


def ends_in_a_loop(tokens: Sequence[int]) -> bool:
    """Return whether the last 12 tokens or more repeat one passage at least three times."""
    for period in range(1, len(tokens) // 3 + 1):
        tail = tokens[-max(3 * period, 12) :]
        if len(tail) >= 12 and list(tail[period:]) == list(tail[:-period]):
            return True
    return False
