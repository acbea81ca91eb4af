"""Progress of long work: calls of `show(text, done, total)`, as often as needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Show = Callable[[str, float, float], None]


def named(show: Show, what: str) -> Callable[[int, int, str], None]:
    """`show` for work that reports (done, total, detail), under one name."""

    def shown(done: int, total: int, _detail: str) -> None:
        show(what, done, total)

    return shown


@contextmanager
def in_lines(say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> Iterator[Show]:
    """Progress as log lines: one when a step begins, and one with its seconds when it ends.

    A step ends when it is complete, when the next begins, or with the block. Each end is logged once.
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
