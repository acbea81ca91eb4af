"""Limits on planning work: a short recipe can expand to millions of tensors.

Work is counted before anything is built, so that a refusal costs no more than counting to the limit.
"""

from __future__ import annotations

from collections.abc import Iterable

from bot.errors import Refused
from bot.merge.checkpoints.header import Limits


class PlanningBudget:
    """Remaining planning work of one recipe, under `limits`. Raises `Refused(TOO_LARGE)` beyond them."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._visits = 0

    @property
    def strict(self) -> bool:
        """True for an untrusted recipe, whose result will be published."""
        return self._limits.strict

    def sources(self, counts: Iterable[int]) -> None:
        """Count the tensors of a document's sources."""
        self._count(sum(counts))

    def output(self, layers: int, counts: Iterable[tuple[int, int]]) -> None:
        """Count the output of a document: its layers, and (tensors, inputs of each) per part, such as a layer."""
        if layers > self._limits.layers:
            self._refuse(f"an output of {layers:,} layers; the limit is {self._limits.layers:,}")
        tensors = 0
        for count, inputs in counts:
            tensors += count
            if tensors > self._limits.tensors:
                self._refuse(f"an output of more than {self._limits.tensors:,} tensors")
            self._count(count * inputs)

    def _count(self, count: int) -> None:
        self._visits += count
        if self._visits > self._limits.source_tensors:
            self._refuse(f"more than {self._limits.source_tensors:,} tensors of sources")

    def _refuse(self, what: str) -> None:
        raise Refused("TOO_LARGE", f"the recipe requires {what}.", "Use fewer slices, sources or documents.")
