"""Why a checkpoint could not be measured: one stable code, one sentence, one next step.

The codes are those of `bot.errors.CODES`, the one list; nothing of the bot is imported here, so it is a test that holds
every code raised below against it (tests/test_errors.py). `bot.stages.evaluator_errors` makes these errors the bot's.
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
