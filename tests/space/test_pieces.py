"""Components of the page without a server: markup, words, filters, figures, limits."""

from __future__ import annotations

import asyncio
import base64
import html
import itertools
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bot.errors import Refused
from bot.jobs.job import Failure, Job, Progress, Source, Stage
from bot.jobs.request import MergeRequest, Origin
from bot.settings import LIVE_HUB, Settings
from space import board, figures, words
from space.desk import Refusal, attempt, read_form
from space.job_page import job_page
from space.limits import BODY_LIMIT_BYTES, BodyLimit
from space.markup import escape, link, plain, tag
from space.submit import EXAMPLES, examples
from tests.space import exhibits

SVG = "{http://www.w3.org/2000/svg}"
ROWS = exhibits.board_rows("http://hub.test")
NOW = datetime(2026, 11, 23, 20, 0, tzinfo=UTC)


class Elements(HTMLParser):
    """The elements and the text of a piece of HTML."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names.append(name)
        self.attributes += attributes

    def handle_data(self, data: str) -> None:
        self.text += data


@given(st.text(max_size=200), st.text(max_size=200))
def test_no_text_becomes_an_element_or_an_attribute(text: str, value: str) -> None:
    found = Elements(tag("p", text, title=value))
    assert found.names == ["p"]
    assert [name for name, _ in found.attributes] == ["title"]
    assert found.text == plain(text)
    assert found.attributes[0][1] == plain(value)


@given(st.text(max_size=200))
def test_no_text_holds_what_gradio_reads_as_a_template(text: str) -> None:
    escaped = escape(text)
    assert not any(mark in escaped for mark in ("{", "}", "$", "`"))
    assert html.unescape(escaped) == plain(text)


@pytest.mark.parametrize("address", ["javascript:alert(1)", "data:text/html,x", "//x", "http://[", "", None])
def test_only_web_addresses_become_links(address: str | None) -> None:
    assert Elements(link(address, "x")).names == ["span"]


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (words.percent(0.831, 0.0223), "83.1 ± 2.2"),
        (words.scored(0.831, (0.75, 0.9), 0.0223), "83.1 (75.0–90.0)"),
        (words.scored(0.831, None, 0.0223), "83.1 ± 2.2"),
        (words.scored(None, (0.75, 0.9), None), "–"),
        (words.percent(None), "–"),
        (words.interval(1.84, (1.79, 1.9)), "1.84× (1.79–1.90)"),
        (words.count(134_515_008), "134.5 M"),
        (words.count(7_240_000_000), "7.24 B"),
        (words.duration(200), "3 min 20 s"),
        (words.duration(7500), "2 h 5 min"),
        (words.age(NOW - timedelta(minutes=7), NOW), "7 min ago"),
        (words.size(5536), "6 kB"),
        (words.plural(1, "job"), "1 job"),
    ],
)
def test_figures_are_formatted_for_people(told: str, expected: str) -> None:
    assert told == expected


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        ("faster", ": faster."),
        ("slower", ": slower."),
        ("same", "not clearly"),
        ("inconclusive", "too few questions"),
        (None, "no verdict was stored"),
    ],
)
def test_the_board_shows_the_verdict_of_the_speed_test(verdict: str | None, said: str) -> None:
    row = replace(exhibits.board_rows("http://hub")[0], speedup_ci=(1.1, 1.3), speed_verdict=verdict)
    assert said in board.speed_sentence(row)


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        (board.Filters(words="TIES carol"), {"carol-ties-density-05", "carol-ties-density-02"}),
        (board.Filters(methods=("slerp",)), {"bob-between", "dana-untested"}),
        (board.Filters(licences=("mit",), least_percent=1), {"dana-weighted-early-layers"}),
        (board.Filters(sources=(exhibits.BASE,), least_percent=70), {"alice-both-skills", "carol-ties-density-05"}),
        (board.Filters(words="absent"), set()),
    ],
)
def test_filters_keep_the_matching_rows(filters: board.Filters, names: set[str]) -> None:
    assert {row.model.rpartition("/")[2] for row in filters.pick(ROWS)} == names


def test_only_merges_measured_under_equal_conditions_share_a_ranking() -> None:
    other = [
        replace(row, model=f"x/{place}", ranking="other", asked="quick, bfloat16", average=0.99)
        for place, row in enumerate(ROWS[:3])
    ]
    rows = [*other, *ROWS]
    scored = {row.model for row in ROWS if row.average is not None}
    unscored = {row.model for row in ROWS if row.average is None}
    assert [value for _, value in board.rankings(rows)] == [ROWS[0].ranked_in, "other"]
    for order in ("average", "newest", "task:invented_crests"):
        assert {row.model for row in board.Filters(order=order).pick(rows)} == scored | unscored
        picked = board.Filters(order=order, ranking="other").pick(rows)
        assert {row.model for row in picked} == {row.model for row in other} | unscored
    assert {row.model for row in board.Filters(ranking="gone").pick(rows)} == scored | unscored
    twice = [*rows, replace(other[0], model="x/9", ranking="third")]
    labels = [label for label, _ in board.rankings(twice)]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("order", [*board.ORDERS, "task:invented_crests", "unheard of"])
def test_every_order_puts_the_best_first_and_unmeasured_rows_last(order: str) -> None:
    filters = board.Filters(order=order)
    measured = [filters._figure(row) for row in filters.pick(ROWS)]
    assert len(measured) == len(ROWS)
    known = [figure for figure in measured if figure is not None]
    assert measured[: len(known)] == sorted(known, reverse=True)


def test_the_table_sorts_by_numbers_and_shows_their_intervals() -> None:
    value = board.table_value(ROWS)
    headers, rows, shown = (
        value["value"]["headers"],
        value["value"]["data"],
        value["value"]["metadata"]["display_value"],
    )
    assert len(headers) == len(value["datatype"]) == len(value["column_widths"]) == len(rows[0]) == len(shown[0])
    at = headers.index("Average %")
    assert rows[0][at] == pytest.approx(0.705)
    assert shown[0][at] == "70.5 (63.5–76.5)"
    assert all(isinstance(row[at], float) for row in rows)


def marks(svg: str) -> list[tuple[str, str]]:
    """Shape and hover text of each dot, in drawing order."""
    found = ElementTree.fromstring(svg).iter()
    titles = ((node.tag.rpartition("}")[2], node.findtext(f"{SVG}title")) for node in found if node.tag != f"{SVG}svg")
    return [(shape, title) for shape, title in titles if title]


def test_the_plot_has_a_point_with_intervals_per_measured_merge() -> None:
    svg = figures.quality_speed(ROWS, ROWS[0])
    measured = [row for row in ROWS if row.average is not None and row.speedup is not None]
    assert {title.partition(",")[0] for _, title in marks(svg)} == {row.model for row in measured}
    for row in measured:
        score = words.scored(row.average, row.average_interval, row.average_stderr)
        speed = words.interval(row.speedup, row.speedup_ci)
        assert ("circle", f"{row.model}, {row.method}: average {score} %, speed {speed}") in marks(svg)
    root = ElementTree.fromstring(svg)
    assert len([line for line in root.iter(f"{SVG}line") if line.get("class") == "merge"]) == 2 * len(measured)
    dots = {node.findtext(f"{SVG}title", "").partition(",")[0]: node for node in root.iter(f"{SVG}circle")}
    for one, other in itertools.combinations(measured, 2):
        assert _order(one.speedup, other.speedup) == _order(*(dots[row.model].get("cx") for row in (one, other)))
        assert _order(other.average, one.average) == _order(*(dots[row.model].get("cy") for row in (one, other)))
    assert figures.quality_speed([row for row in ROWS if row.speedup is None], None) == ""


def _order(left: Any, right: Any) -> int:
    return (float(left) > float(right)) - (float(left) < float(right))


def test_the_figure_shows_the_merge_and_each_parent_per_task() -> None:
    svg = figures.beside_parents(ROWS[0])
    shown = [round(float(title.partition(" ")[0])) for _, title in marks(svg)]
    assert shown == [83, 3, 98, 13, 58, 23, 20, 75]
    texts = [node.text for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert {exhibits.BASE, exhibits.POET, exhibits.SMITH, ROWS[0].model.rpartition("/")[2]} <= set(texts)
    assert figures.beside_parents(ROWS[-1]) == ""


def test_the_figure_shows_intervals_or_else_standard_errors() -> None:
    row = ROWS[0]
    results = tuple(replace(each, interval=(each.value - 0.02, each.value + 0.03)) for each in row.results)
    svg = figures.beside_parents(replace(row, results=results))
    assert "with 95 % intervals" in svg
    assert "± one standard error" in figures.beside_parents(
        replace(row, results=tuple(replace(each, interval=None) for each in row.results))
    )
    for (_, title), each in zip(marks(svg)[:1], results[:1], strict=True):
        value = 100 * each.value
        assert title == f"{value:.1f} % ({value - 2:.1f} to {value + 3:.1f})"


def a_job(**facts: Any) -> Job:
    request = MergeRequest("alice", Origin.FORM, exhibits.RECIPE, "both")
    source = Source(exhibits.BASE, "1a" * 20, "apache-2.0", 10)
    return Job("ab12", "0" * 64, request, "{}", (source,), {"method": "linear"}, NOW, **facts)


def test_a_job_page_lists_each_retried_failure() -> None:
    away = Failure(Stage.MERGING, "HUB_UNAVAILABLE", "The Hub is away.", "Nothing to do.", NOW + timedelta(minutes=5))
    final = Failure(Stage.EVALUATING, "TIME_LIMIT", "Evaluating took 8 h.", "Ask for fewer tasks.")
    waiting = Elements(job_page(a_job(failures=(away,)), LIVE_HUB, 2, NOW)).text
    assert "tried again at 20:05 UTC" in waiting and "The Hub is away." in waiting
    failed = Elements(job_page(a_job(failures=(away, final)), LIVE_HUB, 0, NOW)).text
    assert "Evaluating took 8 h." in failed and "Ask for fewer tasks." in failed and "That ended the job." in failed


def test_a_job_page_shows_the_comparison_with_the_parents() -> None:
    page = Elements(job_page(a_job(evaluation=exhibits.evaluation()), LIVE_HUB, 0, NOW))
    assert "Against its parents, on average over 2 tasks: better than all 3." in page.text
    assert "82.5 (72.7 to 89.3)" in page.text and "Detectable" in page.text and "Same answer as" in page.text
    assert f"{exhibits.SMITH}31 (1.43)72%" in page.text
    for source in [value or "" for name, value in page.attributes if name == "src"]:
        head, _, data = source.partition(",")
        assert head == "data:image/svg+xml;base64" and base64.b64decode(data).startswith(b"<svg ")
    shown = [value for name, value in page.attributes if name == "alt"]
    assert shown == ["both beside its parents", "Decoding speed relative to baseline decoding"]
    assert page.text.count("2.31 tokens per step") == page.text.count("0.84 to 0.90") == 1


def test_a_job_page_without_a_verdict_shows_intervals_and_the_reason() -> None:
    found = replace(exhibits.evaluation(), comparison=None, vitals={}, not_compared="<b>gone</b>", decode_speed=None)
    page = Elements(job_page(a_job(evaluation=found), LIVE_HUB, 0, NOW))
    assert (
        "82.5 (72.7 to 89.3)" in page.text
        and "± " not in page.text
        and "<b>gone</b>" in page.text
        and "img" not in page.names
    )


@pytest.mark.parametrize(("done", "total"), [(0.0, 0.0), (-1.0, 2.0), (5.0, 2.0)])
def test_invalid_progress_still_draws_a_bar(done: float, total: float) -> None:
    from space.job_page import progress_bar

    found = dict(Elements(progress_bar(Progress("x", done, total))).attributes)
    assert 0 <= float(found["value"] or "") <= 1


@pytest.mark.parametrize(
    ("form", "field"),
    [({"recipe": 1, "name": "a"}, "recipe"), ({"recipe": "a"}, "name"), ({"recipe": "a", "name": "a", "x": 1}, "x")],
)
def test_a_form_with_a_wrong_field_is_refused_by_its_name(form: dict[str, Any], field: str) -> None:
    with pytest.raises(Refused, match=f"`{field}`"):
        read_form(form)


def test_an_internal_error_is_shown_by_its_request_id_only() -> None:
    def broken() -> None:
        raise KeyError("hf_secretsecretsecretsecret")

    found = attempt(broken)
    assert isinstance(found, Refusal) and found.code == "INTERNAL"
    assert "secret" not in str(found.as_dict()) and found.request_id in found.next_step


def test_configured_examples_replace_the_built_in_ones(tmp_path: Path) -> None:
    (tmp_path / "b_two.yml").write_text("merge_method: linear\n")
    (tmp_path / "a.yml").write_text("# First of all\nmerge_method: slerp\n")
    (tmp_path / "huge.yml").write_text("#" * 70_000)
    assert list(examples(Settings(examples=tmp_path))) == ["First of all", "b two"]
    assert examples(Settings()) == EXAMPLES
    assert examples(Settings(hub="http://127.0.0.1:1")) == {}


@pytest.mark.parametrize("title", EXAMPLES)
def test_built_in_examples_pass_the_limits_of_untrusted_requests(title: str) -> None:
    from bot.merge.recipe import reading as recipe

    assert len(recipe.parse(EXAMPLES[title], trust="stranger").sources) == 2


@pytest.mark.parametrize("chunks", [[b"x" * 1000], [b"x" * (BODY_LIMIT_BYTES // 2)] * 4])
def test_a_body_of_undeclared_length_ends_at_the_limit(chunks: list[bytes]) -> None:
    read: list[int] = []
    waiting = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    waiting.append({"type": "http.request", "body": b"", "more_body": False})

    async def application(scope: Any, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            read.append(len(message["body"]))
            if not message["more_body"]:
                return

    async def receive() -> Any:
        return waiting.pop(0)

    async def send(message: Any) -> None:
        raise AssertionError(message)

    asyncio.run(BodyLimit(application)({"type": "http", "headers": []}, receive, send))
    assert sum(read) <= BODY_LIMIT_BYTES
    assert (len(waiting) == 0) is (sum(map(len, chunks)) <= BODY_LIMIT_BYTES)
