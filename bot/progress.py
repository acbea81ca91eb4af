"""How far long work is, told to whoever listens: (what, done, total), as often as one likes."""

from __future__ import annotations

from collections.abc import Callable

Show = Callable[[str, float, float], None]


def named(show: Show, what: str) -> Callable[[int, int, str], None]:
    """`show` for work that tells (done, total, detail): shown under one name, whatever the detail."""

    def shown(done: int, total: int, _detail: str) -> None:
        show(what, done, total)

    return shown
