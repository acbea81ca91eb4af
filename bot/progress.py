"""How far long work is, told to whoever listens: (what, done, total), as often as one likes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Show = Callable[[str, float, float], None]


def named(show: Show, what: str) -> Callable[[int, int, str], None]:
    """`show` for work that tells (done, total, detail): shown under one name, whatever the detail."""

    def shown(done: int, total: int, _detail: str) -> None:
        show(what, done, total)

    return shown


@contextmanager
def in_lines(say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> Iterator[Show]:
    """For a log, where no bar can be drawn: a line when a step begins, and one with its seconds when it ends.

    A step ends when all of it is done, when the next begins, or with the block; it is told once, however often it is
    shown again.
    """
    began: dict[str, float] = {}
    at_work = ""

    def end(how: str) -> None:
        nonlocal at_work
        if at_work:
            say(f"{at_work} … {how}{clock() - began[at_work]:.0f} s")
        at_work = ""

    def show(what: str, done: float, total: float) -> None:
        nonlocal at_work
        if what not in began:
            end("")
            began[what], at_work = clock(), what
            say(f"{what} …")
        if what == at_work and done >= total:
            end("")

    try:
        yield show
    except BaseException:
        end("stopped after ")
        raise
    end("")
