"""The picture of a comparison: well-formed whatever it is given, true to its numbers, and quiet about strangers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluators import comparison
from evaluators.comparison.verdict import Comparison, Difference, Overall, Scored, TaskVerdict
from evaluators.pictures.score_figure import score_figure
from tests.evaluators import stored

SVG = "{http://www.w3.org/2000/svg}"
names = st.text(max_size=60)


def scored(model: str, value: float, spread: float = 0.1) -> Scored:
    return Scored(model, value, (max(0.0, value - spread), min(1.0, value + spread)))


def compared(task: str, merge: float, parents: dict[str, float]) -> Comparison:
    models = tuple(scored(name, value) for name, value in parents.items())
    found = tuple(
        Difference(name, merge - value, (merge - value - 0.1, merge - value + 0.1), 0.01, 0.01, 0.2, "test")
        for name, value in parents.items()
    )
    judged = TaskVerdict(task, "acc", 40, 0.125, scored("", merge), models, found, (), dict.fromkeys(parents, 0))
    keys = dict.fromkeys(("", *parents), "0" * 64)
    overall = Overall((task, task), scored("", merge), models, found)
    return Comparison("quick", "d" * 64, keys, (judged, judged), overall)


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@given(names, names, st.dictionaries(names.filter(bool), st.floats(0, 1), min_size=1, max_size=8), st.floats(0, 1))
def test_the_picture_is_well_formed_and_holds_nothing_but_itself(
    task: str, name: str, parents: dict[str, float], merge: float
) -> None:
    root = ElementTree.fromstring(score_figure(compared(task, merge, parents), name))
    allowed = {"svg", "title", "desc", "style", "rect", "line", "path", "circle", "text"}
    assert {str(node.tag).removeprefix(SVG) for node in root.iter()} <= allowed
    assert not any(key.startswith("on") or "href" in key for node in root.iter() for key in node.attrib)
    wide, high = float(root.get("width", 0)), float(root.get("height", 0))
    for mark in root.iter(f"{SVG}text"):
        assert 0 <= float(mark.get("x", -1)) <= wide and 0 <= float(mark.get("y", -1)) <= high


@pytest.mark.parametrize("hostile", ["</text><script>alert(1)</script>", '" onload="alert(1)', "a\u202eb\x00c\ud800d"])
def test_names_of_strangers_are_shown_and_do_nothing(hostile: str) -> None:
    svg = score_figure(compared(hostile, 0.5, {hostile: 0.4}), hostile)
    assert "<script" not in svg and 'onload="' not in svg and "\u202e" not in svg
    assert score_figure(compared("t", 0.5, {hostile: 0.4}), "m").encode()


def places(svg: str) -> Sequence[tuple[float, float]]:
    """Start and end of each interval, from the top."""
    lines = [each for each in ElementTree.fromstring(svg).iter(f"{SVG}line") if each.get("stroke-width")]
    return [(float(each.get("x1", 0)), float(each.get("x2", 0))) for each in lines]


def test_a_dot_lies_where_its_number_says() -> None:
    svg = score_figure(compared("t", 0.5, {"a": 0.3, "b": 0.7}), "m")
    (merge, low, high) = places(svg)[:3]
    assert low[0] < merge[0] < high[0] and merge[0] - low[0] == pytest.approx(high[0] - merge[0], abs=0.2)
    assert [text for text in texts(svg) if text in ("50.0", "30.0", "70.0")][:3] == ["50.0", "30.0", "70.0"]
    assert texts(svg).count("▲ better") == texts(svg).count("▼ worse") == 3


def test_a_real_comparison_is_drawn_with_its_mean_and_without_what_is_no_share(tmp_path: Path) -> None:
    tasks = {"left": [1.0, 0.0, 1.0, 1.0] * 10, "right": [0.0, 1.0, 0.0, 1.0] * 10}
    merge, parent = (stored.evaluation(tmp_path, key, tasks) for key in ("m", "p"))
    found = comparison.compare(merge, {"org/parent@1": parent}, cache=tmp_path)
    svg = score_figure(found, "org/merge")
    assert {"left", "right", "Average", "org/parent", "guessing"} <= set(texts(svg))
    assert score_figure(found, "org/merge") == svg
    losses = {"left": [3.5, 2.0, 4.0]}
    merge, parent = (stored.evaluation(tmp_path, key, losses, metric="loss") for key in ("l", "q"))
    assert score_figure(comparison.compare(merge, {"p": parent}, cache=tmp_path), "m") == ""
