"""The two figures of the leaderboard: quality against speed, and a merge beside its parents."""

from __future__ import annotations

from collections.abc import Sequence

from bot.publishing.leaderboard import Row
from evaluators.comparison.verdict import Scored
from evaluators.pictures.quality_figure import Point, quality_figure
from evaluators.pictures.score_figure import Band, bands_figure
from space import words


def quality_speed(rows: Sequence[Row], chosen: Row | None) -> str:
    """SVG of the average score against the speedup, with the 95 % intervals of both; "" when no row has both."""
    return quality_figure(
        [
            _point(row, row.average, row.speedup, chosen is not None and row.model == chosen.model)
            for row in rows
            if row.average is not None and row.speedup is not None
        ]
    )


def _point(row: Row, average: float, speedup: float, chosen: bool) -> Point:
    low, high = row.average_interval or (average, average)
    score = words.scored(average, row.average_interval, row.average_stderr)
    about = f"{row.model}, {row.method}: average {score} %, speed {words.interval(speedup, row.speedup_ci)}"
    return Point(about, speedup, row.speedup_ci or (speedup, speedup), 100 * average, (100 * low, 100 * high), chosen)


def beside_parents(row: Row) -> str:
    """SVG of each model's score per task, with 95 % intervals or else one standard error; "" without scores."""
    models = {row.model: row.scores, **row.source_scores}
    bands = [
        Band(task, "", tuple(_scored(row, model, task, scores.get(task)) for model, scores in models.items()))
        for task, (value, _) in row.scores.items()
        if 0 <= value <= 1
    ]
    unit = "score in %, with 95 % intervals" if row.intervals else "score in % ± one standard error"
    return bands_figure(bands, row.model.rpartition("/")[2], list(row.source_scores), unit)


def _scored(row: Row, model: str, task: str, score: tuple[float, float | None] | None) -> Scored | None:
    if score is None:
        return None
    value, error = score[0], score[1] or 0.0
    around = (max(0.0, value - error), min(1.0, value + error))
    return Scored(model, value, row.intervals.get((model, task), around))
