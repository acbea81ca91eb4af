"""Output of `mergebot medusa`: speeds of the decoding methods, and streamed text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bot.cli.output import console, say
from evaluators.medusa.speed.report import Report, Row, TokensPerStep
from evaluators.pictures.speed_figure import speed_figure

if TYPE_CHECKING:
    from evaluators.medusa.decoding.decode import Trace
    from evaluators.medusa.generation import Chunk


def speed(measured: Mapping[str, Any], file: Path) -> None:
    """Table of the speed test: one row per decoding method, one per category of questions."""
    report = Report.from_dict(measured)
    say(escape(report.sentence or ""))
    if report.candidates:
        _show_rows(report)
    for warning in report.warnings:
        say(escape(f"Note: {warning}."))
    drawn = speed_figure(report)
    if drawn:
        file.with_suffix(".svg").write_text(drawn, encoding="utf-8")
    beside = f", the figure in {escape(str(file.with_suffix('.svg')))}" if drawn else ""
    say(f"The report is in {escape(str(file))}{beside}.")


def _show_rows(report: Report) -> None:
    """Decoding methods, the meaning of the columns, the methods that were not timed, and the categories."""
    columns = ("decoding", "accuracy", "nodes", "tok/step", "cost", "tok/s", "speedup (95 %)")
    table = _table(f"Decoding speed, {report.model.dtype} on {report.environment.device}", columns)
    for row in report.candidates:
        if row.absent_because is None:
            cost = "" if row.overhead is None else f"{row.overhead:.2f}"
            rate = "" if row.tokens_per_s is None else f"{row.tokens_per_s:.1f}"
            nodes = "" if row.tree.nodes is None else str(row.tree.nodes)
            shares = " ".join(f"{head.top1:.2f}" for head in row.accuracy)
            table.add_row(escape(row.label), shares, nodes, _steps(row.tokens_per_step), cost, rate, _ratio(row))
    console.print(table)
    say(
        "accuracy: top-1 accuracy of each head; cost: duration of a step relative to a baseline step; "
        "speedup: relative to baseline decoding, which was timed twice to show the noise."
    )
    for row in report.candidates:
        if row.absent_because is not None:
            say(escape(f"Not timed: {row.label}: {row.absent_because}"))
    by_category = [row for row in report.candidates if row.categories]
    if by_category:
        console.print(_categories(by_category))


def stream(chunks: Iterable[Chunk]) -> None:
    """Stream text, accepted draft tokens in green. Control sequences that a model emits are removed."""
    for chunk in chunks:
        harmless = "".join(letter for letter in chunk.text if letter.isprintable() or letter in "\n\t")
        console.print(Text(harmless, "green" if chunk.guessed else ""), end="", soft_wrap=True)
    console.print()


def summary(trace: Trace, nodes: int, notes: Iterable[str]) -> None:
    """Token count, time and notes of an answer."""
    seconds = trace.prefill.wall_s + trace.decode.wall_s
    guessing = trace.tokens_per_step is not None and nodes > 1
    rate = f", {trace.tokens_per_step:.2f} per step with a tree of {nodes} nodes" if guessing else ""
    console.print(f"{len(trace.tokens)} tokens in {seconds:.1f} s{rate}.", style="dim", highlight=False)
    full = ["the answer ends here because the model's context is full"] if trace.finish == "context" else []
    for note in (*notes, *full):
        say(escape(f"Note: {note}."))


def _table(title: str, columns: Iterable[str]) -> Table:
    """Table with two left-aligned columns; the others are right-aligned."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 2 else "right", overflow="fold")
    return table


def _categories(candidates: Sequence[Row]) -> Table:
    """Tokens per step and speed of each timed candidate, by category of questions."""
    names = (escape(row.label) for row in candidates)
    table = _table("By category: tokens/step, speed", ("category", "questions", *names))
    for rows in zip(*(row.categories for row in candidates), strict=True):
        cells = [" ".join("–" if x is None else f"{x:.2f}" for x in (r.tokens_per_step, r.speedup)) for r in rows]
        table.add_row(escape(rows[0].name), str(rows[0].prompts), *cells)
    return table


def _steps(rate: TokensPerStep) -> str:
    found = rate.simulated if rate.measured is None else rate.measured
    return "" if found is None else f"{found:.2f}"


def _ratio(row: Row) -> str:
    """Measured speedup over baseline decoding; a predicted one is marked."""
    found = row.speedup
    if found.clock_used is None:
        return "" if found.predicted_here is None else f"{found.predicted_here:.2f} predicted"
    if found.ratio is None:
        return ""
    return f"{found.ratio:.2f}" + (f" ({found.interval[0]:.2f}–{found.interval[1]:.2f})" if found.interval else "")
