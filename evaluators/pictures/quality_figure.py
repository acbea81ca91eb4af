"""Scatter plot of score against decoding speed as SVG text: a dot with two 95 % intervals per merge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evaluators.pictures.svg import WIDTH, document, escape, line, text_at

_LEFT, _RIGHT, _TOP, _BOTTOM, _HEIGHT = 64, 24, 20, 394, 440
_MOST_TICKS = 8


@dataclass(frozen=True, slots=True)
class Point:
    """One merge: speedup and average score in percent, each with its interval, and the text shown on hover."""

    about: str
    speed: float
    speed_interval: tuple[float, float]
    percent: float
    percent_interval: tuple[float, float]
    chosen: bool = False


def quality_figure(points: Sequence[Point]) -> str:
    """SVG text of the scatter plot; "" without points. The chosen merge is drawn last, on top."""
    if not points:
        return ""
    speeds = _range([1.0, *(end for point in points for end in (point.speed, *point.speed_interval))])
    percents = _range([end for point in points for end in (point.percent, *point.percent_interval)])
    ordered = sorted(points, key=lambda point: point.chosen)
    drawn = _axes(speeds, percents) + "".join(_dot(point, speeds, percents) for point in ordered)
    return document("Quality against speed", "; ".join(point.about for point in points), _HEIGHT, drawn)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Range of an axis with a margin around all values."""
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _x(speed: float, speeds: tuple[float, float]) -> float:
    return _LEFT + (WIDTH - _LEFT - _RIGHT) * (speed - speeds[0]) / (speeds[1] - speeds[0])


def _y(percent: float, percents: tuple[float, float]) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * (percent - percents[0]) / (percents[1] - percents[0])


def _ticks(low: float, high: float) -> tuple[list[float], int]:
    """Round values between `low` and `high`, and the number of decimals that shows them."""
    magnitude = 10.0 ** math.floor(math.log10((high - low) / _MOST_TICKS))
    step = next(magnitude * each for each in (1, 2, 5, 10) if (high - low) / (magnitude * each) <= _MOST_TICKS)
    ticks = [step * place for place in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return ticks, max(0, -math.floor(math.log10(step) + 1e-9))


def _axes(speeds: tuple[float, float], percents: tuple[float, float]) -> str:
    parts = []
    ticks, decimals = _ticks(*speeds)
    for tick in ticks:
        x = _x(tick, speeds)
        parts.append(line(x, _TOP, x, _BOTTOM, 'class="line"'))
        parts.append(text_at(x, _BOTTOM + 18, f"{tick:.{decimals}f}×", "quiet", "middle"))
    ticks, decimals = _ticks(*percents)
    for tick in ticks:
        y = _y(tick, percents)
        parts.append(line(_LEFT, y, WIDTH - _RIGHT, y, 'class="line"'))
        parts.append(text_at(_LEFT - 8, y + 4, f"{tick:.{decimals}f}", "quiet", "end"))
    baseline = _x(1.0, speeds)
    parts.append(line(baseline, _TOP, baseline, _BOTTOM, 'class="chance"'))
    label = "average score in % against speed with Medusa, × baseline decoding; with 95 % intervals"
    return "".join(parts) + text_at(_LEFT, _BOTTOM + 36, label, "quiet")


def _dot(point: Point, speeds: tuple[float, float], percents: tuple[float, float]) -> str:
    x, y = _x(point.speed, speeds), _y(point.percent, percents)
    look = 'class="merge" stroke-width="1.5"' + ("" if point.chosen else ' opacity="0.5"')
    left, right = (_x(end, speeds) for end in point.speed_interval)
    low, high = (_y(end, percents) for end in point.percent_interval)
    whiskers = line(left, y, right, y, look) + line(x, low, x, high, look)
    circle = f'<circle {look} cx="{x:.1f}" cy="{y:.1f}" r="{7 if point.chosen else 5}">'
    return f"{whiskers}{circle}<title>{escape(point.about)}</title></circle>"
