"""Why a checkpoint could not be measured: one stable code, one sentence, one next step.

The codes are those of the bot (`UNKNOWN_TASK`, `DATASET_UNAVAILABLE`, `DATASET_GATED`, `EVALUATION_FAILED`,
`NO_CHAT_TEMPLATE`, `BACKEND_UNAVAILABLE`, `NOT_COMPARABLE`, `MODEL_UNLOADABLE`, `MODEL_NONSENSE`,
`SPEED_CHECK_FAILED`, `SPEED_UNSUPPORTED`, `BAD_HEADS`, `HEADS_UNSUPPORTED`, `TIME_LIMIT`, `MEMORY_LIMIT`,
`NOT_BETTER`, `VALUE_OUT_OF_RANGE`, `DEVICE_UNAVAILABLE`), written again here because the evaluators import nothing of
it.
"""

from __future__ import annotations


class EvaluationError(Exception):
    """A measurement that could not be made."""

    def __init__(self, code: str, message: str, next_step: str = "") -> None:
        super().__init__(code, message, next_step)
        self.code = code
        self.message = message
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.message} {self.next_step}".strip()
