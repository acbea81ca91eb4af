"""Numbers for people: three significant digits, thousands written out."""

from __future__ import annotations

WRITTEN_OUT = 1e6  # from here on a power of ten is easier to read


def number(value: float, *, signed: bool = False) -> str:
    """`0.512`, `1,340`, `1.3e+08`; with `signed` also `+0.512`."""
    sign = "+" if signed else ""
    return f"{value:{sign},.0f}" if 1000 <= abs(value) < WRITTEN_OUT else f"{value:{sign}.3g}"
