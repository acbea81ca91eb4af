"""The leaderboard: every published merge in a table, quality against speed, and one merge beside its parents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from bot.publishing.leaderboard import Row
from space import figures, words
from space.desk import Board, Desk
from space.markup import Markup, join, link, plain, repo_link, tag
from space.pieces import QUIET, Look, drawing, empty, facts_table, panel, refused

FIXED = ("Model", "Method", "Sources", "Average %")
TAIL = ("Tokens / step", "Speedup", "Parameters")
MISSING_SORTS_AS = -1.0  # below every score and every speed
# Together with two tasks as wide as a desk's page.
TASK_WIDTH = "136px"
WIDTHS = {
    "Model": "190px",
    "Method": "130px",
    "Sources": "136px",
    "Average %": TASK_WIDTH,
    "Tokens / step": "96px",
    "Speedup": "148px",
    "Parameters": "112px",
}


# What the board can be ordered by, the best first; rows without the figure come last. Tasks join as `task:<name>`.
ORDERS: dict[str, Callable[[Row], Any]] = {
    "average": lambda row: row.average,
    "speedup": lambda row: row.speedup,
    "tokens per step": lambda row: row.tokens_per_step,
    "parameters": lambda row: row.parameters,
    "newest": lambda row: row.published_at or None,
}
TASK_ORDER = "task:"


@dataclass(frozen=True, slots=True)
class Filters:
    """Filters and order chosen by the visitor."""

    words: str = ""
    methods: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    licences: tuple[str, ...] = ()
    least_percent: float = 0.0
    order: str = "average"
    ranking: str = ""

    @classmethod
    def of(
        cls, search: Any, methods: Any, sources: Any, licences: Any, least: Any, order: Any, ranking: Any = ""
    ) -> Filters:
        """Filters from the values of the widgets, which may be None."""
        lists = (tuple(methods or ()), tuple(sources or ()), tuple(licences or ()))
        return cls(str(search or ""), *lists, float(least or 0), str(order or "average"), str(ranking or ""))

    def ranked(self, rows: Sequence[Row]) -> str | None:
        """The one ranking that is shown: the one that was chosen, else the one with most merges."""
        known = [value for _, value in rankings(rows)]
        return self.ranking if self.ranking in known else known[0] if known else None

    def pick(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that pass, in order: of one ranking, and those that were never scored."""
        wanted, ranking = self.words.casefold().split(), self.ranked(rows)
        kept = [
            row
            for row in rows
            if row.ranked_in in (None, ranking)
            and all(word in _searched(row) for word in wanted)
            and (not self.methods or row.method in self.methods)
            and (not self.sources or set(self.sources) <= set(row.sources))
            and (not self.licences or row.licence in self.licences)
            and (self.least_percent <= 0 or 100 * (row.average or 0.0) >= self.least_percent)
        ]
        figures_of = [(self._figure(row), row) for row in kept]
        known = [(figure, row) for figure, row in figures_of if figure is not None]
        known.sort(key=lambda each: each[0], reverse=True)
        return [row for _, row in known] + [row for figure, row in figures_of if figure is None]

    def _figure(self, row: Row) -> Any:
        if self.order.startswith(TASK_ORDER):
            return row.scores.get(self.order.removeprefix(TASK_ORDER), (None, None))[0]
        return ORDERS.get(self.order, ORDERS["average"])(row)


def rankings(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Rankings by their description: only rows of one ranking are compared. The largest first."""
    counts = Counter(row.ranked_in for row in rows if row.ranked_in is not None)
    titles = {row.ranked_in: row.asked or row.suite or "" for row in reversed(rows)}
    shown = [titles[key] for key in counts]
    return [
        (f"{titles[key]} ({key[:6]})" if shown.count(titles[key]) > 1 else titles[key], key)
        for key, _ in counts.most_common()
    ]


def build(desk: Desk) -> Look:
    """The tab; returns the handler that reads the board again."""
    summary = panel(elem_id="board-summary")
    with gr.Row(elem_classes="filters"):
        search = gr.Textbox(label="Search", placeholder="name, source, method", elem_id="search", scale=3, max_lines=1)
        method = gr.Dropdown(label="Method", multiselect=True, choices=[], elem_id="filter-method", scale=2)
        source = gr.Dropdown(label="Source models", multiselect=True, choices=[], elem_id="filter-source", scale=3)
        licence = gr.Dropdown(label="License", multiselect=True, choices=[], elem_id="filter-licence", scale=2)
        least = gr.Number(
            label="Minimum average, %", minimum=0, maximum=100, value=0, precision=0, elem_id="least", scale=2
        )
        order = gr.Dropdown(label="Sort by", choices=list(ORDERS), value="average", elem_id="order", scale=2)
        ranking = gr.Dropdown(label="Measured on", choices=[], elem_id="ranking", scale=3, visible=False)
    table = gr.Dataframe(
        interactive=False,
        show_label=False,
        label="Published merges",
        pinned_columns=1,
        show_search="none",
        max_height=460,
        buttons=["fullscreen"],
        elem_id="board",
        wrap=False,
    )
    empty = panel(visible=False, elem_id="board-empty")
    with gr.Row(elem_classes="columns", visible=False) as below:
        with gr.Column(scale=6, min_width=320):
            panel(tag("h3", "Quality against speed"), elem_classes="panel")
            scatter = panel(elem_id="quality-speed")
            unseen = panel(elem_id="unseen")
        with gr.Column(scale=6, min_width=320):
            chosen = gr.Dropdown(label="Merge to show", elem_id="chosen", filterable=True)
            heading = panel(elem_classes="panel")
            parents = panel(elem_id="parents")
            detail = panel(elem_id="detail", elem_classes="panel")

    filters = [search, method, source, licence, least, order, ranking]
    shown = [summary, table, empty, below, heading, parents, detail, scatter, unseen, chosen]
    look = Look(_looker(desk), [*filters, chosen], [*shown, method, source, licence, order, ranking])
    # A dropdown also "changes" when its choices are replaced; `input` is the visitor's own change.
    for event in (search.change, least.change, *(each.input for each in (*filters[1:4], order, ranking, chosen))):
        look.on(event, trigger_mode="always_last")
    table.select(_selector(desk), filters, [heading, parents, detail, scatter, chosen], **QUIET)
    return look


def _looker(desk: Desk) -> Callable[..., tuple[Any, ...]]:
    def look(*values: Any) -> tuple[Any, ...]:
        *filtered, chosen = values
        board, filters = desk.board(), Filters.of(*filtered)
        rows, known = filters.pick(board.rows), rankings(board.rows)
        row = next((each for each in rows if each.model == chosen), rows[0] if rows else None)
        return (
            _summary(board, len(rows)),
            gr.Dataframe(**table_value(rows), visible=bool(rows)),
            panel(_nothing(board), visible=not rows),
            gr.Row(visible=bool(rows)),
            *_detail(row, desk.settings.hub),
            _scatter(rows, row),
            _unseen(rows),
            gr.Dropdown(choices=_names(rows), value=row.model if row else None),
            gr.Dropdown(choices=sorted({each.method for each in board.rows})),
            gr.Dropdown(choices=sorted({each for row in board.rows for each in row.sources})),
            gr.Dropdown(choices=sorted({each.licence for each in board.rows})),
            gr.Dropdown(choices=_orders(board.rows)),
            gr.Dropdown(choices=known, value=filters.ranked(board.rows), visible=len(known) > 1),
        )

    return look


def _selector(desk: Desk) -> Callable[..., tuple[Any, ...]]:
    def select(
        search: str,
        methods: Any,
        sources: Any,
        licences: Any,
        least: Any,
        order: str,
        ranking: str,
        event: gr.SelectData,
    ) -> tuple[Any, ...]:
        """Handle the choice of a cell: its row is identified by its first cell, in any order of the table."""
        rows = Filters.of(search, methods, sources, licences, least, order, ranking).pick(desk.board().rows)
        row = next((each for each in rows if event.row_value and _model_cell(each) == event.row_value[0]), None)
        if row is None:
            return (gr.skip(),) * 5
        return *_detail(row, desk.settings.hub), _scatter(rows, row), row.model

    return select


def table_value(rows: Sequence[Row]) -> dict[str, Any]:
    """Values, headers and types of the table: numbers to sort by, with their display."""
    tasks = sorted({task for row in rows for task in row.scores})
    headers = [*FIXED, *(_header(task) for task in tasks), *TAIL]
    cells = [_cells(row, tasks) for row in rows]
    values, displayed = ([[cell[at] for cell in row] for row in cells] for at in (0, 1))
    types = ["html", "str", "str", *["number"] * (1 + len(tasks) + len(TAIL))]
    return {
        "value": {"headers": headers, "data": values, "metadata": {"display_value": displayed}},
        "headers": headers,
        "datatype": types,
        "column_widths": [WIDTHS.get(header, TASK_WIDTH) for header in headers],
    }


def _header(task: str) -> str:
    """Task name with line breaks allowed at the ends of words."""
    return plain(task).replace("_", "_\u200b") + " %"


def _cells(row: Row, tasks: Sequence[str]) -> list[tuple[Any, str]]:
    """Cells with their sort key and their display."""
    model = _model_cell(row)
    sources = ", ".join(source.rpartition("/")[2] for source in row.sources)
    scores = [(*row.scores.get(task, (None, None)), row.intervals.get((row.model, task))) for task in tasks]
    return [
        (model, model),
        (row.method, row.method),
        (sources, sources),
        (_sorted(row.average), words.scored(row.average, row.average_interval, row.average_stderr)),
        *((_sorted(value), words.scored(value, interval, stderr)) for value, stderr, interval in scores),
        (_sorted(row.tokens_per_step), words.MISSING if row.tokens_per_step is None else f"{row.tokens_per_step:.2f}"),
        (_sorted(row.speedup), words.interval(row.speedup, row.speedup_ci)),
        (row.parameters, words.count(row.parameters)),
    ]


def _sorted(value: float | None) -> float:
    return MISSING_SORTS_AS if value is None else value


def _model_cell(row: Row) -> str:
    return str(link(row.repo_url, row.model.rpartition("/")[2]))


def _searched(row: Row) -> str:
    return " ".join((row.model, row.method, row.requester, row.licence, *row.sources)).casefold()


def _orders(rows: Sequence[Row]) -> list[tuple[str, str]]:
    tasks = sorted({task for row in rows for task in row.scores})
    return [*((name, name) for name in ORDERS), *((plain(task), TASK_ORDER + task) for task in tasks)]


def _names(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return [(row.model.rpartition("/")[2], row.model) for row in rows]


def _summary(board: Board, kept: int) -> Markup:
    merges = words.plural(len(board.rows), "published merge")
    picked = f"{kept} of {merges}" if kept != len(board.rows) else merges
    several = len(rankings(board.rows)) > 1
    mixed = " Merges measured under other conditions are in a separate ranking." if several else ""
    note = tag("p", picked, ". Scores by lm-eval, percent with 95\u00a0% intervals.", mixed, class_="fine")
    return join([refused(board.stale) if board.stale else None, note if board.rows else None])


def _nothing(board: Board) -> Markup:
    if board.rows:
        return empty("No merge matches these filters. Remove some of them.")
    return empty(
        "No merges yet. Submit one in the first tab." if board.stale is None else "The leaderboard could not be read."
    )


def _unseen(rows: Sequence[Row]) -> Markup:
    without = sum(row.average is None or row.speedup is None for row in rows)
    if not without:
        return Markup("")
    if without == len(rows):
        return tag("p", "None of these merges had a speed test, so there is nothing to plot.", class_="fine")
    return tag("p", f"{words.plural(without, 'merge')} without a speed test or scores not shown.", class_="fine")


def _scatter(rows: Sequence[Row], chosen: Row | None) -> Markup:
    return drawing(figures.quality_speed(rows, chosen), "Quality against speed")


def _detail(row: Row | None, hub: str) -> tuple[Markup, Markup, Markup]:
    """Heading, figure and table of the chosen merge."""
    if row is None:
        return Markup(""), Markup(""), Markup("")
    commit = tag("code", row.commit[:7], class_="sha", title=row.commit)
    rows: list[tuple[str, object]] = [
        ("Published", [link(f"{row.repo_url}/tree/{row.commit}", row.model), " ", commit]),
        ("Sources", tag("ul", [tag("li", repo_link(hub, source)) for source in row.sources], class_="bare")),
        ("License", row.licence),
        ("Requested by", [row.requester, f", {row.published_at[:10]}" if row.published_at else None]),
        ("Measured", f"{row.asked or row.suite} on {row.device}" if row.suite else "not evaluated"),
    ]
    if row.verdict:
        rows.append(("Verdict", row.verdict))
    if row.speedup is not None:
        rows.append(("Speed", speed_sentence(row)))
    if row.plain_tokens_per_s is not None:
        rows.append(("Baseline greedy", f"{row.plain_tokens_per_s:,.1f} tokens per second"))
    name = row.model.rpartition("/")[2]
    figure = figures.beside_parents(row)
    heading = tag("h3", name, ", ", row.method, ", beside its parents" if figure else None)
    return heading, drawing(figure, f"{name} beside its parents"), facts_table(rows)


SPEED_VERDICTS = {
    "faster": "faster",
    "slower": "slower",
    "same": "not clearly different",
    "inconclusive": "no verdict: too few questions, or the machine is too unsteady",
}


def speed_sentence(row: Row) -> str:
    """Result and conclusion of the speed test."""
    steps = f"{row.tokens_per_step:.2f} tokens per step; " if row.tokens_per_step else ""
    low, high = row.speedup_ci or (None, None)
    spread = "" if low is None else f", 95\u00a0% interval {low:.2f} to {high:.2f}"
    verdict = SPEED_VERDICTS.get(row.speed_verdict or "", "no verdict was stored")
    return f"{steps}{words.times(row.speedup)} the speed of baseline greedy decoding{spread}: {verdict}."
