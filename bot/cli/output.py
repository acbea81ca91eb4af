"""Tables and progress bars of the command line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from bot.progress import Show, in_lines
from bot.storage import size_text

if TYPE_CHECKING:
    from bot.jobs.job import Job
    from bot.stages.verification import Verdict
    from evaluators.harness.scores import ModelEvaluation

console = Console()
_INPUT = ("model", "tensor", "dtype", "base", "adapter")  # keys of an input in `values_of` besides its parameters


def say(sentence: str) -> None:
    """Print one line per sentence; wrapping is left to the terminal."""
    console.print(sentence, soft_wrap=True)


@contextmanager
def progress(*, hidden: bool = False) -> Iterator[Show]:
    """Progress bars, one per task; yields `report(task, done, total)`. `hidden`: for JSON output.

    Without a terminal, a line is printed at the start and at the end of each task.
    """
    if not (hidden or console.is_interactive):
        with in_lines(lambda line: say(escape(line))) as report:
            yield report
        return
    columns = (TextColumn("{task.description:<44}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    bars = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=hidden)
    known: dict[str, Any] = {}

    def show(what: str, done: float, total: float) -> None:
        if not known:
            bars.start()
        if what not in known:
            for earlier in known.values():
                bars.update(earlier, completed=bars.tasks[earlier].total)
            known[what] = bars.add_task(escape(what[:44]), total=total)
        bars.update(known[what], completed=done, total=total)

    try:
        yield show
    finally:
        if known:  # a progress that never started would print an empty line
            bars.stop()


def plan(summary: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        console.print_json(json.dumps(summary))
        return
    table = Table(title=f"Plan: {summary['method']}", show_header=False, title_justify="left")
    rows = (
        ("sources", "\n".join(f"{each['model']}  ({', '.join(each['roles'])})" for each in summary["sources"])),
        ("layers", f"{summary['layers']}"),
        ("tensors", f"{summary['tensors']:,}"),
        ("parameters", f"{summary['parameters']:,}"),
        ("reads", size_text(summary["bytes_in"])),
        (
            "writes",
            f"{size_text(summary['bytes_out'])} in {len(summary['shards'])} file{'s' * (len(summary['shards']) > 1)}",
        ),
        ("memory at most", size_text(summary["peak_memory_bytes"])),
        ("dtypes", ", ".join(f"{dtype} {size_text(size)}" for dtype, size in summary["dtypes"].items())),
        ("values", _values(summary["values"])),
        ("stages", "\n".join(_stage(each) for each in summary.get("stages", ()))),
        ("recipe digest", str(summary["recipe_digest"])[:16]),
    )
    for name, value in rows:
        if value:
            table.add_row(name, escape(value))
    console.print(table)
    for notice in summary["notices"]:
        say(f"[yellow]note[/yellow] {escape(notice['text'])}")


def _stage(stage: Mapping[str, Any]) -> str:
    values = _values(stage["values"]).replace("\n", "; ")
    return f"{stage['name']}: {stage['method']}, {size_text(stage['bytes_out'])}" + (f" ({values})" if values else "")


def _values(values: Mapping[str, Any]) -> str:
    """One line per parameter, or per filter of a parameter: `t for self_attn: 0.3`."""
    lines = []
    for name, value in values.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            for each in value:
                when = f"for {each['filter']}" if "filter" in each else "otherwise"
                lines.append(f"{name} {when}: {_value(each['value'])}")
        else:
            lines.append(f"{name}: {_value(value)}")
    return "\n".join(lines)


def _value(value: Any) -> str:
    """`true`, `0.5`, `0 → 0.5 → 1 over the layers`, `0.2 to 0.7`."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return f"{_value(value['lowest'])} to {_value(value['highest'])}"
    if not isinstance(value, list):
        return value if isinstance(value, str) else f"{value:g}"
    return " → ".join(map(_value, value)) + " over the layers"


def tensor(values: Mapping[str, Any], *, as_json: bool) -> None:
    """Resolved values of one tensor: a row per input with its parameters; a table per earlier stage."""
    if as_json:
        console.print_json(json.dumps(values))
        return
    for each in (*values.get("stages", ()), values):
        stage = f"{each['stage']}: " if "stage" in each else ""
        shared = ", ".join(f"{name} {_value(value)}" for name, value in each["parameters"].items())
        title = f"{stage}{each['tensor']}  {each['shape']} {each['dtype']}: {each['does']}"
        say(escape(title + f" ({shared})" * bool(shared)))
        console.print(_inputs(each))


def _inputs(values: Mapping[str, Any]) -> Table:
    names = list(dict.fromkeys(name for each in values["inputs"] for name in each if name not in _INPUT))
    table = Table("input", "dtype", *names, Column("tensor", overflow="fold"))
    for each in values["inputs"]:
        parameters = (_value(each[name]) if name in each else "" for name in names)
        table.add_row(
            escape(each["model"] + " (base)" * each["base"]), each["dtype"], *parameters, escape(each["tensor"])
        )
        for factor in each["adapter"]["tensors"] if "adapter" in each else ():
            label = f"+ {each['adapter']['model']} (scale {each['adapter']['scale']:g})"
            table.add_row(escape(label), factor["dtype"], *("" for _ in names), escape(factor["tensor"]))
    return table


def merged(result: Any, out: Path) -> None:
    """Result of a merge; None if `out` already holds it."""
    if result is None:
        say(f"[green]Already done[/green]: {escape(str(out))} holds this merge; nothing was changed.")
        return
    say(f"[green]Merged[/green] {size_text(result.bytes)} into {escape(str(out))} in {result.seconds:.1f} s.")
    for notice in result.notices:
        say(f"[yellow]note[/yellow] {escape(notice.text)}")


def verdict(result: Verdict, *, as_json: bool) -> None:
    """Differences of a verification, at most 20."""
    if as_json:
        console.print_json(json.dumps(result.as_dict()))
        return
    if not result.differences:
        say(f"[green]{escape(result.sentence)}[/green]")
    for each in result.differences[:20]:
        say(f"[red]{each.what}[/red] {escape(each.sentence)}")
    if len(result.differences) > 20:
        say(f"... and {len(result.differences) - 20:,} more; `--json` lists all.")
    for remark in result.remarks:
        say(f"[yellow]note[/yellow] {escape(remark)}")


def scores(evaluations: Mapping[str, ModelEvaluation]) -> None:
    """Models as rows, tasks as columns, percent with 95 % intervals."""
    from evaluators.comparison import report

    rows = [row for row in report.scores(evaluations, None) if row.is_task]
    columns = (Column(row.title, justify="right") for row in rows)
    table = Table("model", *columns, title="Scores in percent, with 95 % intervals", title_justify="left")
    for model in evaluations:
        table.add_row(escape(model), *(str(row.figures[model]) for row in rows))
    console.print(table)


def jobs(recent: Iterable[Job]) -> None:
    from bot.jobs.job import stage

    table = Table("job", "name", "requester", "stage", "progress", "result")
    now = datetime.now(UTC)
    for each in recent:
        result = each.publication.repo if each.publication else (each.failures[-1].code if each.failures else "")
        running = each.progress if each.progress and each.progress.total else None
        done = f"{running.text} {running.done / running.total:.0%}" if running else ""
        row = (each.id, each.request.name, each.request.requester, stage(each, now).value, done, result)
        table.add_row(*(escape(cell) for cell in row))
    if not table.row_count:
        say("No jobs yet. Submit one with `mergebot submit RECIPE --name NAME`.")
        return
    console.print(table)


def job(shown: Job) -> None:
    jobs([shown])
    for failure in shown.failures:
        reason = escape(f"{failure.sentence} {failure.next_step}")
        say(f"[red]{failure.stage.value} failed[/red] {reason} ({failure.code})")
    if shown.evaluation and shown.evaluation.merged:
        scores({"merge": shown.evaluation.merged, **shown.evaluation.sources})
