"""Decoding speeds relative to baseline decoding as an SVG: a dot with its 95 % interval per row."""

from __future__ import annotations

from evaluators.medusa.speed.report import Report, Row
from evaluators.pictures.svg import STYLE, WIDTH, escape, shortened, text_at

_LEFT, _RIGHT, _TOP, _HEIGHT = 230, 190, 40, 30
_MARGIN = 0.05


def speed_figure(report: Report) -> str:
    """SVG of a speed report; "" if only the baseline was measured or the report is refused."""
    rows = [row for row in report.candidates if _speed(row) is not None and row.absent_because is None]
    if report.refusal or len(rows) < 2:
        return ""
    ends = [end for row in rows for end in (row.speedup.interval or (_speed(row) or 0.0,))]
    low, high = min(0.9, min(ends) - _MARGIN), max(1.1, max(ends) + _MARGIN)
    bottom = _TOP + _HEIGHT * len(rows)
    description = "; ".join(f"{row.label}: {_speed(row):.2f} x baseline" for row in rows)
    drawn = _axis(low, high, bottom) + "".join(_drawn(row, at, low, high) for at, row in enumerate(rows))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 46}" width="{WIDTH}" '
        f'height="{bottom + 46}" role="img"><title>Decoding speed relative to baseline decoding</title>'
        f"<desc>{escape(description)}</desc>"
        f'<style>{STYLE}</style><rect class="ground" x="0.5" y="0.5" width="{WIDTH - 1}" height="{bottom + 45}" '
        f'rx="8"/>{text_at(WIDTH - _RIGHT + 24, 24, "tokens per step", "quiet")}{drawn}</svg>\n'
    )


def _speed(row: Row) -> float | None:
    """Speed relative to the baseline; predicted if the row was not timed."""
    return row.speedup.predicted_here if row.speedup.clock_used is None else row.speedup.ratio


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


def _drawn(row: Row, place: int, low: float, high: float) -> str:
    speed, interval, timed = _speed(row) or 0.0, row.speedup.interval, row.speedup.clock_used is not None
    rate = row.tokens_per_step.measured
    rate = row.tokens_per_step.simulated if rate is None else rate
    note = ("" if rate is None else f"{rate:.2f}") + ("" if timed else ", speed predicted")
    x, y = _x(speed, low, high), _TOP + _HEIGHT * (place + 0.5)
    parts = [text_at(18, y + 4, shortened(row.label, 31), "ink task" if timed else "quiet")]
    if interval is not None:
        start, end = (_x(bound, low, high) for bound in interval)
        ends = f'x1="{start:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{y:.1f}"'
        parts.append(f'<line class="merge" {ends} stroke-width="2"/>')
    look = 'class="merge"' if timed else 'class="open" stroke="#66635c" stroke-width="2"'
    parts.append(f'<circle {look} cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
    parts.append(text_at(x, y - 9, f"{speed:.2f}", "ink value", "middle"))
    return "".join(parts) + text_at(WIDTH - _RIGHT + 24, y + 4, note, "quiet")
