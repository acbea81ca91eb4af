"""Decoding speeds relative to baseline decoding as an SVG: a dot with its 95 % interval per row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evaluators.pictures.svg import STYLE, WIDTH, escape, shortened, text_at

_LEFT, _RIGHT, _TOP, _LANE = 230, 190, 40, 30
_WAYS = {"none": "plain, once more", "native": "transformers' generate", "prompt_lookup": "prompt lookup",
         "identity": "untrained heads", "fresh": "heads trained for it", "merged": "its parents' heads, merged",
         "merged_tuned": "merged heads, tuned"}  # fmt: skip
_KINDS = {"parent:": "heads of ", "heads:": "given heads "}
_MARGIN = 0.05


@dataclass(frozen=True, slots=True)
class _Lane:
    """One way of decoding: its speed relative to the baseline, with an interval if timed on several questions."""

    name: str
    told: str
    speed: float
    interval: tuple[float, float] | None
    timed: bool


def speed_figure(report: Mapping[str, Any]) -> str:
    """SVG of a speed report; "" if only the baseline was measured or the report is refused."""
    if report.get("refusal"):
        return ""
    lanes = [lane for row in report["candidates"] if (lane := _lane(row)) is not None]
    if len(lanes) < 2:
        return ""
    ends = [end for lane in lanes for end in (lane.interval or (lane.speed,))]
    low, high = min(0.9, min(ends) - _MARGIN), max(1.1, max(ends) + _MARGIN)
    bottom = _TOP + _LANE * len(lanes)
    told = "; ".join(f"{lane.name}: {lane.speed:.2f} x plain" for lane in lanes)
    drawn = _axis(low, high, bottom) + "".join(_drawn(lane, at, low, high) for at, lane in enumerate(lanes))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 46}" width="{WIDTH}" '
        f'height="{bottom + 46}" role="img"><title>Decoding speed relative to baseline decoding</title>'
        f"<desc>{escape(told)}</desc>"
        f'<style>{STYLE}</style><rect class="ground" x="0.5" y="0.5" width="{WIDTH - 1}" height="{bottom + 45}" '
        f'rx="8"/>{text_at(WIDTH - _RIGHT + 24, 24, "tokens per step", "quiet")}{drawn}</svg>\n'
    )


def way_of(row_id: str) -> str:
    """A way of decoding as people call it; `row_id` is that of its row in a speed report."""
    for kind, words in _KINDS.items():
        if row_id.startswith(kind):
            return words + row_id.removeprefix(kind)
    return _WAYS.get(row_id, row_id)


def _lane(row: Mapping[str, Any]) -> _Lane | None:
    speed, rate = row["speedup"], row["tokens_per_step"]
    clock = speed["clock_used"]
    value = speed.get("predicted_here") if clock is None else speed[clock]
    if value is None or row["absent_because"] is not None:
        return None
    span = None if clock is None else speed[f"{clock}_ci95"]
    brought = rate["measured"] if rate["measured"] is not None else rate.get("simulated")
    told = ("" if brought is None else f"{brought:.2f}") + ("" if clock is not None else ", speed predicted")
    return _Lane(way_of(row["id"]), told, value, None if span is None else (span[0], span[1]), clock is not None)


def _x(speed: float, low: float, high: float) -> float:
    return _LEFT + (WIDTH - _LEFT - _RIGHT) * (speed - low) / (high - low)


def _axis(low: float, high: float, bottom: int) -> str:
    step = 1 if high - low <= 1 else 2 if high - low <= 2 else 5
    parts = []
    for tenth in range(round(low * 10), round(high * 10) + 1):
        if not low <= tenth / 10 <= high or tenth % step:
            continue
        x, style = _x(tenth / 10, low, high), "chance" if tenth == 10 else "line"
        parts.append(f'<line class="{style}" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(text_at(x, bottom + 18, f"{tenth / 10:.1f}", "quiet", "middle"))
    label = "speed relative to baseline decoding, with 95 % intervals; open: predicted"
    return "".join(parts) + text_at(_LEFT, bottom + 36, label, "quiet")


def _drawn(lane: _Lane, place: int, low: float, high: float) -> str:
    y = _TOP + _LANE * (place + 0.5)
    x = _x(lane.speed, low, high)
    parts = [text_at(18, y + 4, shortened(lane.name, 31), "ink task" if lane.timed else "quiet")]
    if lane.interval is not None:
        start, end = (_x(bound, low, high) for bound in lane.interval)
        parts.append(f'<line class="merge" x1="{start:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{y:.1f}" '
                     'stroke-width="2"/>')  # fmt: skip
    look = 'class="merge"' if lane.timed else 'class="open" stroke="#66635c" stroke-width="2"'
    parts.append(f'<circle {look} cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
    parts.append(text_at(x, y - 9, f"{lane.speed:.2f}", "ink value", "middle"))
    return "".join(parts) + text_at(WIDTH - _RIGHT + 24, y + 4, lane.told, "quiet")
