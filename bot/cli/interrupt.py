"""Error of an interrupted command: the results that were kept, and how to continue."""

from __future__ import annotations

from bot.errors import Failed

CONTINUE = "Run the same command again to continue."
RESTART = "Run the same command again to start over."

# command -> state of its results, next step
_RESULTS = {
    "merge": ("finished tensors are kept beside the output", CONTINUE),
    "classic": ("finished tensors are kept beside the output", CONTINUE),
    "bakllama": ("finished tensors are kept beside the output", CONTINUE),
    "evaluate": ("finished evaluations are kept", CONTINUE),
    "train": ("answers and training so far are kept", CONTINUE),
    "bench": ("an incomplete speed test is not kept", RESTART),
    "export": ("the heads are incomplete", "Remove the new folder and run the same command again."),
}


def interrupted(command: str) -> Failed:
    """Error CANCELLED of an interrupted command."""
    state, next_step = _RESULTS.get(command, ("nothing was changed", ""))
    return Failed("CANCELLED", f"Interrupted; {state}.", next_step)
