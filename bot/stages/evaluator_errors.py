"""What an evaluator could not measure, as an error of the bot: the same code, sentence and next step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bot.errors import Failed, MergebotError, Where
from evaluators.errors import EvaluationError


@contextmanager
def translated(kind: type[MergebotError] = Failed, *, about: str = "", where: Where | None = None) -> Iterator[None]:
    """Raise what the block raises as EvaluationError as `kind`; `about` names the thing where the sentence does not."""
    try:
        yield
    except EvaluationError as error:
        subject = f"{about}: " if about and about not in error.message else ""
        raise kind(error.code, f"{subject}{error.message}", error.next_step, where=where) from error
