"""Figures as people read them: scores, sizes, times. Pure."""

from __future__ import annotations

from datetime import datetime

from bot.storage import size_text as size

__all__ = ["age", "count", "duration", "interval", "percent", "plural", "scored", "size", "times"]
MISSING = "–"


def percent(value: float | None, stderr: float | None = None) -> str:
    """A fraction as percent with its standard error: `83.1 ± 2.2`."""
    if value is None:
        return MISSING
    shown = f"{100 * value:.1f}"
    return shown if stderr is None else f"{shown} ± {100 * stderr:.1f}"


def scored(value: float | None, interval: tuple[float, float] | None, stderr: float | None) -> str:
    """A fraction as percent with its 95 % interval, else with its standard error: `97.5 (87.1–99.6)`, `83.1 ± 2.2`."""
    if value is None or interval is None:
        return percent(value, stderr)
    return f"{percent(value)} ({100 * interval[0]:.1f}–{100 * interval[1]:.1f})"


def times(ratio: float | None) -> str:
    return MISSING if ratio is None else f"{ratio:.2f}×"


def interval(ratio: float | None, bounds: tuple[float, float] | None) -> str:
    """A ratio with its 95 % interval: `1.84× (1.79–1.90)`."""
    if ratio is None or bounds is None:
        return times(ratio)
    return f"{times(ratio)} ({bounds[0]:.2f}–{bounds[1]:.2f})"


def count(number: int | float | None) -> str:
    """A large count in three digits: `134.5 M`, `7.24 B`."""
    if number is None:
        return MISSING
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            shown = number / limit
            return f"{shown:.1f} {unit}" if shown >= 100 else f"{shown:.3g} {unit}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """`0.8 s`, `42 s`, `3 min 20 s`, `2 h 5 min`, `3 days`."""
    if seconds < 10:
        return f"{max(seconds, 0.0):.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} days"


def age(then: datetime, now: datetime) -> str:
    """Age in coarse steps, since a page that polls must not change every second."""
    seconds = (now - then).total_seconds()
    if seconds < 60:
        return "just now"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min ago"
    if seconds < 48 * 3600:
        return f"{seconds // 3600:.0f} h ago"
    return f"{seconds // 86400:.0f} days ago"


def plural(number: int, noun: str, many: str | None = None) -> str:
    return f"{number:,} {noun if number == 1 else many or noun + 's'}"
