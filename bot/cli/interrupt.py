"""Message of an interrupted command: what was kept, and how to continue."""

from __future__ import annotations

from bot.errors import Failed

AGAIN = "Run the same command again to go on."
ANEW = "Run the same command again to begin anew."

# verb -> what is left of its work, what to do
_LEFT = {
    "merge": ("what is finished lies beside the output", AGAIN),
    "classic": ("what is finished lies beside the output", AGAIN),
    "bakllama": ("what is finished lies beside the output", AGAIN),
    "evaluate": ("what is measured so far is kept", AGAIN),
    "train": ("what is answered and trained so far is kept", AGAIN),
    "bench": ("a speed test that is cut short says nothing, so nothing is kept", ANEW),
    "export": ("the heads are not whole", "Remove the new folder and run the same command again."),
}


def stopped(verb: str) -> Failed:
    """Error CANCELLED of an interrupted command."""
    left, next_step = _LEFT.get(verb, ("nothing is changed", ""))
    return Failed("CANCELLED", f"Stopped; {left}.", next_step)
