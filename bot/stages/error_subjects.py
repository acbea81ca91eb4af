"""Evaluation errors as refusals, or with the name of the model they concern."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bot.errors import EvaluationError, Failed, MergebotError, Where


@contextmanager
def translated(kind: type[MergebotError] = Failed, *, about: str = "", where: Where | None = None) -> Iterator[None]:
    """Raise an EvaluationError of the block as `kind`, with `about` before a sentence that does not contain it."""
    try:
        yield
    except EvaluationError as error:
        subject = f"{about}: " if about and about not in error.message else ""
        raise kind(error.code, f"{subject}{error.message}", error.next_step, where=where) from error
