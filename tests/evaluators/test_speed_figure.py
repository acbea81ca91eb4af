"""The picture of a speed report: true to its rows, quiet about strangers, absent where nothing was measured."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from evaluators.medusa.speed.report import Report, Row
from evaluators.pictures.speed_figure import speed_figure

SVG = "{http://www.w3.org/2000/svg}"
speeds = st.floats(0.05, 9)


def row(name: str, speed: float, *, timed: bool = True, spread: float = 0.1) -> dict[str, Any]:
    made = Row(name, "parent").as_dict()
    made["tokens_per_step"]["measured" if timed else "simulated"] = 1.5
    if timed:
        made["speedup"] |= {"wall": speed, "wall_ci95": [speed - spread, speed + spread], "clock_used": "wall"}
    else:
        made["speedup"]["predicted_here"] = speed
    return made


def drawn(*rows: dict[str, Any]) -> str:
    return speed_figure(Report.from_dict({"candidates": list(rows)}))


@given(st.lists(st.tuples(st.text(max_size=50), speeds, st.booleans()), min_size=2, max_size=9))
def test_every_way_of_decoding_stands_in_the_picture_and_nothing_else(rows: list[tuple[str, float, bool]]) -> None:
    root = ElementTree.fromstring(drawn(*(row(name, speed, timed=timed) for name, speed, timed in rows)))
    assert len(list(root.iter(f"{SVG}circle"))) == len(rows)
    tags = {str(node.tag).removeprefix(SVG) for node in root.iter()}
    assert tags <= {"svg", "title", "desc", "style", "rect", "line", "circle", "text"}
    wide, high = float(root.get("width", 0)), float(root.get("height", 0))
    for mark in root.iter(f"{SVG}circle"):
        assert 0 <= float(mark.get("cx", -1)) <= wide and 0 <= float(mark.get("cy", -1)) <= high
    said = ["".join(node.itertext()) for node in root.iter(f"{SVG}text")]
    assert all(f"{speed:.2f}" in said for _, speed, _ in rows)


def test_a_prediction_is_drawn_open_and_called_one() -> None:
    svg = drawn(row("none", 1.0), row("parent:a/b", 1.2, timed=False))
    assert svg.count('class="open"') == 1 and "1.50, speed predicted" in svg and "heads of a/b" in svg


def test_names_of_strangers_do_nothing() -> None:
    hostile = '</text><script>alert(1)</script>" onload="x'
    svg = drawn(row("none", 1.0), row(hostile, 1.1))
    assert "<script" not in svg and 'onload="' not in svg


def test_nothing_is_drawn_where_only_plain_decoding_was_measured() -> None:
    absent = Row("fresh", "fresh", absent_because="it was not tried.").as_dict()
    assert drawn(row("none", 1.0), absent) == ""
