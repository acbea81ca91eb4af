"""The two figures of the leaderboard: quality against speed, and a merge beside its parents.

Text and grid take the page's colours from the stylesheet, so one figure serves light and dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from bot.publishing.leaderboard import Row
from space import words
from space.markup import escape
from space.theme import MERGE, PARENT_SYMBOLS, PARENTS, SANS

QUIET = "rgba(128,128,128,0.55)"
ROW_PX = 62


def quality_speed(rows: Sequence[Row], chosen: Row | None) -> go.Figure | None:
    """Average score against speedup, with the 95 % intervals of both; None if no row has both."""
    shown = [row for row in rows if row.average is not None and row.speedup is not None]
    if not shown:
        return None
    figure = go.Figure()
    for picked, name, colour, size in ((False, "merges", QUIET, 10), (True, "chosen", MERGE, 14)):
        group = [row for row in shown if (chosen is not None and row.model == chosen.model) is picked]
        if group:
            figure.add_trace(_points(group, name, colour, size))
    figure.add_vline(x=1.0, line={"dash": "dot", "width": 1, "color": QUIET})
    figure.update_xaxes(title_text="speed with Medusa, × plain decoding", ticksuffix="×")
    figure.update_yaxes(title_text="average score, %")
    return _dressed(figure, height=440)


def _points(rows: Sequence[Row], name: str, colour: str, size: int) -> go.Scatter:
    bounds = [row.speedup_ci or (row.speedup or 0.0, row.speedup or 0.0) for row in rows]
    speeds, averages = [row.speedup or 0.0 for row in rows], [row.average or 0.0 for row in rows]
    ends = [row.average_interval or (at, at) for row, at in zip(rows, averages, strict=True)]
    return go.Scatter(
        x=speeds,
        y=[100 * at for at in averages],
        error_x={
            "type": "data",
            "array": [high - at for at, (_, high) in zip(speeds, bounds, strict=True)],
            "arrayminus": [at - low for at, (low, _) in zip(speeds, bounds, strict=True)],
            **_whisker(colour),
        },
        error_y={
            "type": "data",
            "array": [100 * (high - at) for at, (_, high) in zip(averages, ends, strict=True)],
            "arrayminus": [100 * (at - low) for at, (low, _) in zip(averages, ends, strict=True)],
            **_whisker(colour),
        },
        mode="markers",
        name=name,
        marker={
            "color": MERGE,
            "size": size,
            "opacity": 1.0 if name == "chosen" else 0.55,
            "line": {"width": 1, "color": "rgba(255,255,255,0.8)"},
        },
        customdata=[[_hover(row)] for row in rows],
        hovertemplate="%{customdata[0]}<extra></extra>",
        showlegend=False,
    )


def _hover(row: Row) -> str:
    lines = (
        f"<b>{escape(row.model)}</b>",
        escape(row.method),
        f"average {words.scored(row.average, row.average_interval, row.average_stderr)} %",
        f"speed {words.interval(row.speedup, row.speedup_ci)}",
    )
    return "<br>".join(lines)


def beside_parents(row: Row) -> go.Figure | None:
    """A dot for each model on each task, with whiskers of 95 % or one standard error; None without scores."""
    tasks = list(row.scores)
    if not tasks:
        return None
    figure = go.Figure()
    series = [(source, scores) for source, scores in row.source_scores.items()]
    for place, (source, scores) in enumerate(series):
        look = {
            "color": PARENTS[place % len(PARENTS)],
            "symbol": PARENT_SYMBOLS[place % len(PARENT_SYMBOLS)],
            "size": 10,
            "line": {"width": 2, "color": PARENTS[place % len(PARENTS)]},
        }
        figure.add_trace(_dots(row, source, scores, look, _offset(place + 1, len(series) + 1)))
    merge = {"color": MERGE, "symbol": "diamond", "size": 13}
    # Drawn last, so that it lies on top; it stands first in each task and in the legend.
    figure.add_trace(_dots(row, row.model, row.scores, merge, _offset(0, len(series) + 1)).update(legendrank=1))
    figure.update_yaxes(
        tickmode="array", tickvals=list(range(len(tasks))), ticktext=[_wrapped(task) for task in tasks],
        range=[len(tasks) - 0.5, -0.5], showgrid=False, zeroline=False,
    )  # fmt: skip
    figure.update_xaxes(
        title_text="score, % with 95 % intervals" if row.intervals else "score, % ± one standard error",
        range=[-2, 102],
        zeroline=False,
    )
    legend = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "xanchor": "left"}
    figure.update_layout(legend=legend)
    return _dressed(figure, height=150 + ROW_PX * len(tasks))


def _dots(
    row: Row,
    model: str,
    scores: dict[str, tuple[float, float | None]],
    marker: dict[str, Any],
    offset: float,
) -> go.Scatter:
    tasks = list(row.scores)
    present = [(place, task, *scores[task]) for place, task in enumerate(tasks) if task in scores]
    ends = [_ends(row, model, task, value, error) for _, task, value, error in present]
    shown = [
        words.percent(value, error) if (model, task) not in row.intervals else words.within(value, end)
        for (_, task, value, error), end in zip(present, ends, strict=True)
    ]
    name = str(escape("this merge" if model == row.model else model))
    return go.Scatter(
        x=[100 * value for *_, value, _ in present],
        y=[place + offset for place, *_ in present],
        error_x={
            "type": "data",
            "array": [100 * (high - value) for (*_, value, _), (_, high) in zip(present, ends, strict=True)],
            "arrayminus": [100 * (value - low) for (*_, value, _), (low, _) in zip(present, ends, strict=True)],
            **_whisker(marker["color"]),
        },
        mode="markers",
        name=name,
        marker=marker,
        customdata=[[escape(task), told] for (_, task, *_), told in zip(present, shown, strict=True)],
        hovertemplate="%{customdata[0]}: %{customdata[1]} %<extra>" + name + "</extra>",
    )


def _ends(row: Row, model: str, task: str, value: float, error: float | None) -> tuple[float, float]:
    """Ends of the whisker: the interval if there is one, else one standard error to both sides."""
    return row.intervals.get((model, task), (value - (error or 0.0), value + (error or 0.0)))


def _offset(place: int, of: int) -> float:
    """Offset of series `place` within a task's band, so that whiskers do not overlap."""
    return (place - (of - 1) / 2) * min(0.2, 0.7 / of)


def _wrapped(task: str) -> str:
    return str(escape(task)).replace("_", "_​") if len(task) > 18 else str(escape(task))


def _whisker(colour: str) -> dict[str, Any]:
    return {"color": colour, "thickness": 1.5, "width": 4}


def _dressed(figure: go.Figure, height: int) -> go.Figure:
    return figure.update_layout(
        height=height,
        margin={"l": 8, "r": 12, "t": 16, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": ", ".join(SANS), "size": 13, "color": "#77746d"},
        xaxis={"automargin": True, "gridcolor": "rgba(128,128,128,0.2)", "zeroline": False, "fixedrange": True,
               "title": {"font": {"size": 13}}},
        yaxis={"automargin": True, "gridcolor": "rgba(128,128,128,0.2)", "zeroline": False, "fixedrange": True,
               "title": {"font": {"size": 13}}},
        hoverlabel={"font": {"family": ", ".join(SANS)}, "align": "left"},
        dragmode=False,
    )  # fmt: skip
