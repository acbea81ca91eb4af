"""Scores of a merge and its parents as SVG text: a dot with its interval per model and task.

The figure has its own background and follows the reader's light or dark setting. Untrusted names are escaped and
shortened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from evaluators.comparison.report import is_share, short, words
from evaluators.comparison.verdict import Comparison, Difference, Outcome, Scored
from evaluators.pictures.svg import CHARACTER, WIDTH, document, escape, shortened, text_at

# Colours for colour-blind readers (after Okabe and Ito); the shapes differ too.
_PARENTS = ("#d08a00", "#3f7fc4", "#b3567f", "#7a6ff0", "#8c6d46", "#5f9ea0")
_SHAPES = ("circle", "square", "up", "down", "cross", "saltire")

_LEFT, _RIGHT = 176, 160
_LANE, _PAD = 18, 11
_FOUND = {Outcome.BETTER: "▲ better", Outcome.WORSE: "▼ worse", Outcome.NOT_SHOWN: "no difference shown"}


@dataclass(frozen=True, slots=True)
class Band:
    """One task, or the average of all tasks. `models`: the merge, then each parent (None where not measured)."""

    title: str
    about: str
    models: tuple[Scored | None, ...]
    differences: tuple[Difference, ...] = ()
    chance: float | None = None
    mean: bool = False


def score_figure(comparison: Comparison, name: str) -> str:
    """SVG text of a comparison with its outcome per parent; `name` is the merge's. "" when no score is a share.

    Tasks whose scores are not shares of 100 % are not drawn.
    """
    return bands_figure(list(_bands(comparison)), name, comparison.parents)


def bands_figure(
    bands: Sequence[Band], name: str, parents: Sequence[str], unit: str = "score in %, with 95 % intervals"
) -> str:
    """SVG text of `bands`, each with one lane for the merge `name` and one per parent; "" without bands."""
    if not bands:
        return ""
    legend, top = _legend(name, parents, bands)
    height_of = (1 + len(parents)) * _LANE + 2 * _PAD
    low, high = _range(bands)
    bottom = top + len(bands) * height_of
    mean = f'<rect class="mean" x="1" y="{bottom - height_of}" width="{WIDTH - 2}" height="{height_of}"/>'
    drawn = [legend, mean if bands[-1].mean else "", _axis(low, high, top, bottom, unit)]
    drawn += [_band(band, top + place * height_of, height_of, low, high) for place, band in enumerate(bands)]
    description = "; ".join(f"{band.title}: {words(band.differences)}" for band in bands if band.differences)
    return document(f"{name} beside its parents", description, bottom + 46, "".join(drawn))


def _bands(comparison: Comparison) -> Iterator[Band]:
    for task in comparison.tasks:
        models = (task.merge, *task.parents)
        if is_share(task):
            about = f"{task.metric}, {task.samples} questions"
            yield Band(task.task, about, models, task.differences, task.chance)
    mean = comparison.overall
    if mean is not None and len(mean.tasks) > 1:
        yield Band("Average", f"of {len(mean.tasks)} tasks", (mean.merge, *mean.parents), mean.differences, mean=True)


def _range(bands: Sequence[Band]) -> tuple[float, float]:
    """Range of the axis in whole tens of percent: all that is drawn, and at least 40."""
    ends = [end for band in bands for model in band.models if model for end in model.interval]
    ends += [band.chance for band in bands if band.chance is not None]
    low, high = max(0, int(10 * min(ends))), min(10, -int(-10 * max(ends) // 1))
    while high - low < 4:
        low, high = max(0, low - 1), min(10, high + 1)
    return low / 10, high / 10


def _x(value: float, low: float, high: float) -> float:
    return _LEFT + (WIDTH - _LEFT - _RIGHT) * (value - low) / (high - low)


def _axis(low: float, high: float, top: int, bottom: int, unit: str) -> str:
    tens = range(round(low * 10), round(high * 10) + 1)
    step = 2 if len(tens) > 7 else 1
    parts = []
    for ten in tens[::step]:
        x = _x(ten / 10, low, high)
        parts.append(f'<line class="line" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(text_at(x, bottom + 18, f"{10 * ten}", "quiet", "middle"))
    return "".join(parts) + text_at(_LEFT, bottom + 36, unit, "quiet")


def _band(band: Band, top: int, height: int, low: float, high: float) -> str:
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
        if model is not None:
            parts.append(_dot(model, place, y, low, high))
        if place and band.differences:
            outcome = band.differences[place - 1].outcome
            style = "quiet" if outcome is Outcome.NOT_SHOWN else "ink"
            parts.append(text_at(WIDTH - _RIGHT + 24, y + 4, _FOUND[outcome], style))
    return "".join(parts)


def _dot(model: Scored, place: int, y: float, low: float, high: float) -> str:
    start, at, end = (_x(each, low, high) for each in (model.interval[0], model.value, model.interval[1]))
    look = 'class="merge"' if place == 0 else f'stroke="{_PARENTS[(place - 1) % len(_PARENTS)]}"'
    line = f'<line {look} x1="{start:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{y:.1f}" stroke-width="2"/>'
    beside_right = end < WIDTH - _RIGHT - 12
    x, anchor = (end + 7, "start") if beside_right else (start - 7, "end")
    style = "ink value" if place == 0 else "quiet value"
    shown = f"{100 * model.value:.1f} % ({100 * model.interval[0]:.1f} to {100 * model.interval[1]:.1f})"
    return line + _mark(place, at, y, shown) + text_at(x, y + 4, f"{100 * model.value:.1f}", style, anchor)


def _mark(place: int, x: float, y: float, hover: str = "") -> str:
    """A filled diamond for the merge, an open coloured shape for a parent, with a text to show on hover."""
    title = f"<title>{escape(hover)}</title>" if hover else ""
    if place == 0:
        return f'<path class="merge" d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z">{title}</path>'
    shape = _SHAPES[(place - 1) % len(_SHAPES)]
    look = f'class="open" stroke="{_PARENTS[(place - 1) % len(_PARENTS)]}" stroke-width="2"'
    paths = {
        "square": f"M{x - 4.5:.1f} {y - 4.5:.1f}h9v9h-9z",
        "up": f"M{x:.1f} {y - 5.5:.1f}l5.5 9.5h-11z",
        "down": f"M{x:.1f} {y + 5.5:.1f}l5.5 -9.5h-11z",
        "cross": f"M{x - 6:.1f} {y:.1f}h12M{x:.1f} {y - 6:.1f}v12",
        "saltire": f"M{x - 4.5:.1f} {y - 4.5:.1f}l9 9M{x - 4.5:.1f} {y + 4.5:.1f}l9 -9",
    }
    if shape == "circle":
        return f'<circle {look} cx="{x:.1f}" cy="{y:.1f}" r="5">{title}</circle>'
    return f'<path {look} d="{paths[shape]}">{title}</path>'


def _legend(name: str, parents: Sequence[str], bands: Sequence[Band]) -> tuple[str, int]:
    """The marks with their names, and the height at which the plot begins."""
    x, y, parts = 24.0, 26.0, []
    names = [
        shortened(name, 44),
        *(shortened(short(each), 44) for each in parents),
        *(["guessing"] if any(band.chance is not None for band in bands) else []),
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
    if any(band.differences for band in bands):
        parts.append(text_at(WIDTH - _RIGHT + 24, y + 24, "the merge against it", "quiet"))
    return "".join(parts), int(y) + 32
