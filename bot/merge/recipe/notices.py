"""Collector of notices: remarks for the user that do not stop the work."""

from __future__ import annotations

from bot.merge.recipe.spec import Notice


class Notes:
    """Collects notices. Equal codes of one group are counted; the first text is kept as the example."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, str], str] = {}
        self._count: dict[tuple[str, str], int] = {}

    def add(self, code: str, text: str, group: str = "") -> None:
        """Count one notice."""
        key = (code, group)
        self._first.setdefault(key, text)
        self._count[key] = self._count.get(key, 0) + 1

    def all(self) -> tuple[Notice, ...]:
        """The notices in the order of their first appearance."""
        return tuple(Notice(code, text, self._count[code, group]) for (code, group), text in self._first.items())
