"""Scores of a merge and its parents as an SVG: a dot with its 95 % interval for each model on each task.

The picture has its own ground and follows the reader's light or dark setting. Names are untrusted: they are escaped and
shortened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from evaluators.comparison.report import is_share, short, words
from evaluators.comparison.verdict import Comparison, Difference, Outcome, Scored
from evaluators.pictures.svg import CHARACTER, STYLE, WIDTH, escape, shortened, text_at

# Okabe and Ito's palette, so that people who see red and green alike can tell the models apart; shapes tell them, too.
MERGE = "#0d8a78"
PARENTS = ("#d08a00", "#3f7fc4", "#b3567f", "#7a6ff0", "#8c6d46", "#5f9ea0")
_SHAPES = ("circle", "square", "up", "down", "cross", "saltire")

_LEFT, _RIGHT = 176, 160
_LANE, _PAD = 18, 11
_FOUND = {Outcome.BETTER: "▲ better", Outcome.WORSE: "▼ worse", Outcome.NOT_SHOWN: "no difference shown"}


@dataclass(frozen=True, slots=True)
class _Band:
    """One task, or the average of all: its models one under the other, the merge first."""

    title: str
    about: str
    models: tuple[Scored, ...]
    differences: tuple[Difference, ...]
    chance: float | None = None
    mean: bool = False


def score_figure(comparison: Comparison, name: str) -> str:
    """SVG of `comparison`; `name` is the merge's. "" if no score is a share.

    Each parent has the outcome of its comparison beside it. Tasks whose scores are not shares of 100 % are left out.
    """
    bands = list(_bands(comparison))
    if not bands:
        return ""
    lanes = 1 + len(comparison.parents)
    legend, top = _legend(name, comparison.parents, any(band.chance is not None for band in bands))
    height_of = lanes * _LANE + 2 * _PAD
    low, high = _range(bands)
    bottom = top + len(bands) * height_of
    height = bottom + 46
    mean = f'<rect class="mean" x="1" y="{bottom - height_of}" width="{WIDTH - 2}" height="{height_of}"/>'
    drawn = [mean if bands[-1].mean else "", _axis(low, high, top, bottom)]
    drawn += [_band(band, top + place * height_of, height_of, low, high) for place, band in enumerate(bands)]
    told = "; ".join(f"{band.title}: {words(band.differences)}" for band in bands)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img"><title>{escape(name)} beside its parents</title><desc>{escape(told)}</desc>'
        f"<style>{STYLE}</style>"
        f'<rect class="ground" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>'
        f"{legend}{''.join(drawn)}</svg>\n"
    )


def _bands(comparison: Comparison) -> Iterator[_Band]:
    for task in comparison.tasks:
        models = (task.merge, *task.parents)
        if is_share(task):
            about = f"{task.metric}, {task.samples} questions"
            yield _Band(task.task, about, models, task.differences, task.chance)
    mean = comparison.overall
    if mean is not None and len(mean.tasks) > 1:
        yield _Band("Average", f"of {len(mean.tasks)} tasks", (mean.merge, *mean.parents), mean.differences, mean=True)


def _range(bands: Sequence[_Band]) -> tuple[float, float]:
    """Range of the axis in whole tens of percent: all drawn values, and at least 40."""
    ends = [end for band in bands for model in band.models for end in model.interval]
    ends += [band.chance for band in bands if band.chance is not None]
    low, high = max(0, int(10 * min(ends))), min(10, -int(-10 * max(ends) // 1))
    while high - low < 4:
        low, high = max(0, low - 1), min(10, high + 1)
    return low / 10, high / 10


def _x(value: float, low: float, high: float) -> float:
    return _LEFT + (WIDTH - _LEFT - _RIGHT) * (value - low) / (high - low)


def _axis(low: float, high: float, top: int, bottom: int) -> str:
    tens = range(round(low * 10), round(high * 10) + 1)
    step = 2 if len(tens) > 7 else 1
    parts = []
    for ten in tens[::step]:
        x = _x(ten / 10, low, high)
        parts.append(f'<line class="line" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(text_at(x, bottom + 18, f"{10 * ten}", "quiet", "middle"))
    return "".join(parts) + text_at(_LEFT, bottom + 36, "score in %, with 95 % intervals", "quiet")


def _band(band: _Band, top: int, height: int, low: float, high: float) -> str:
    middle = top + height / 2
    parts = [
        f'<line class="line" x1="1" y1="{top}" x2="{WIDTH - 1}" y2="{top}"/>',
        text_at(18, middle - 3, shortened(band.title, 21), "ink task"),
        text_at(18, middle + 14, shortened(band.about, 24), "quiet"),
    ]
    if band.chance is not None:
        x = _x(band.chance, low, high)
        parts.append(f'<line class="chance" x1="{x:.1f}" y1="{top + 5}" x2="{x:.1f}" y2="{top + height - 5}"/>')
    for place, model in enumerate(band.models):
        y = top + _PAD + _LANE * (place + 0.5)
        parts.append(_dot(model, place, y, low, high))
        if place:
            outcome = band.differences[place - 1].outcome
            style = "quiet" if outcome is Outcome.NOT_SHOWN else "ink"
            parts.append(text_at(WIDTH - _RIGHT + 24, y + 4, _FOUND[outcome], style))
    return "".join(parts)


def _dot(model: Scored, place: int, y: float, low: float, high: float) -> str:
    start, at, end = (_x(each, low, high) for each in (model.interval[0], model.value, model.interval[1]))
    look = 'class="merge"' if place == 0 else f'stroke="{PARENTS[(place - 1) % len(PARENTS)]}"'
    line = f'<line {look} x1="{start:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{y:.1f}" stroke-width="2"/>'
    beside_right = end < WIDTH - _RIGHT - 12
    x, anchor = (end + 7, "start") if beside_right else (start - 7, "end")
    style = "ink value" if place == 0 else "quiet value"
    return line + _mark(place, at, y) + text_at(x, y + 4, f"{100 * model.value:.1f}", style, anchor)


def _mark(place: int, x: float, y: float) -> str:
    """The merge is a filled diamond, parents are open shapes in their colours."""
    if place == 0:
        return f'<path class="merge" d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z"/>'
    shape = _SHAPES[(place - 1) % len(_SHAPES)]
    look = f'class="open" stroke="{PARENTS[(place - 1) % len(PARENTS)]}" stroke-width="2"'
    paths = {
        "square": f"M{x - 4.5:.1f} {y - 4.5:.1f}h9v9h-9z",
        "up": f"M{x:.1f} {y - 5.5:.1f}l5.5 9.5h-11z",
        "down": f"M{x:.1f} {y + 5.5:.1f}l5.5 -9.5h-11z",
        "cross": f"M{x - 6:.1f} {y:.1f}h12M{x:.1f} {y - 6:.1f}v12",
        "saltire": f"M{x - 4.5:.1f} {y - 4.5:.1f}l9 9M{x - 4.5:.1f} {y + 4.5:.1f}l9 -9",
    }
    if shape == "circle":
        return f'<circle {look} cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
    return f'<path {look} d="{paths[shape]}"/>'


def _legend(name: str, parents: Sequence[str], chance: bool) -> tuple[str, int]:
    """Marks and names in lines, and the top of the plot below them."""
    x, y, parts = 24.0, 26.0, []
    names = [
        shortened(name, 44),
        *(shortened(short(each), 44) for each in parents),
        *(["guessing"] if chance else []),
    ]
    for place, label in enumerate(names):
        wide = 12 + CHARACTER * len(label)
        if x > 24 and x + wide > WIDTH - 16:
            x, y = 24.0, y + 20
        if place > len(parents):
            parts.append(f'<line class="chance" x1="{x:.1f}" y1="{y - 7:.1f}" x2="{x:.1f}" y2="{y + 7:.1f}"/>')
        else:
            parts.append(_mark(place, x, y))
        parts.append(text_at(x + 12, y + 4, label, "quiet" if place else "ink"))
        x += wide + 22
    return "".join(parts) + text_at(WIDTH - _RIGHT + 24, y + 24, "the merge against it", "quiet"), int(y) + 32
