"""Output of `mergebot evaluate`: the estimate, then scores with intervals and verdicts per task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from bot.cli.output import console
from bot.storage import size_text
from evaluators import sanity_check
from evaluators.comparison import report
from evaluators.comparison.remarks import remarks
from evaluators.comparison.verdict import Outcome

if TYPE_CHECKING:
    from bot.stages.local_runs import Evaluated
    from evaluators.comparison.verdict import Comparison
    from evaluators.harness import Estimate
    from evaluators.harness.scores import ModelEvaluation
    from evaluators.sanity_check import SanityCheck

MIN_NAME_WIDTH = 8  # characters, on any screen
_GAP = 2  # spaces before a number
_STYLES = {Outcome.BETTER: "green", Outcome.WORSE: "red"}


def estimate(model: str, ahead: Estimate) -> None:
    """Workload estimate of an evaluation."""
    parts = [f"{ahead.requests:,} requests", f"{ahead.tokens:,} prompt tokens"]
    if ahead.new_tokens:
        parts.append(f"at most {ahead.new_tokens:,} generated tokens")
    if ahead.memory_bytes:
        parts.append(f"{size_text(ahead.memory_bytes)} of memory")
    time = "" if ahead.seconds is None else f"about {_duration(ahead.seconds)}: "
    _say(f"{model}: {time}{', '.join(parts)}.")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def sanity_checks(checks: Mapping[str, SanityCheck]) -> None:
    """Results of the sanity check, one column per model."""
    if not checks:
        return
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("sanity check", no_wrap=True)
    for name in labels(list(checks)).values():
        table.add_column(escape(name), justify="right", overflow="fold")
    for title, *cells in zip(sanity_check.COLUMNS, *map(sanity_check.cells, checks.values()), strict=True):
        table.add_row(title, *cells)
    console.print(table)
    console.print()


def evaluations(evaluated: Evaluated, comparison: Comparison | None, why_not: str) -> None:
    """One block per task: scores, differences and verdicts; then the average and the EvalConfig."""
    full = labels(list(evaluated.found))
    subject, *others = evaluated.found
    models = {"": evaluated.found[subject], **{name: evaluated.found[name] for name in others}}
    rows = report.scores(models, comparison)
    columns = _columns(rows, report.differences(comparison) if comparison else ())
    room = console.width - sum(wide for _, wide in columns) - 2
    names = fitted(full, room)
    own = evaluated.found[subject]
    _say(f"[bold]{escape(own.suite)}[/bold]  [dim]percent, with 95 % confidence intervals[/dim]", markup=True)
    drawn = _Blocks({"": names[subject], **{name: names[name] for name in others}}, columns, comparison)
    for row in rows:
        drawn.show(row)
    if comparison:
        terms = report.Terms(names[subject], report.joined([names[name] for name in others]), "other model")
        for sentence in _verdict(comparison, names, terms):
            _say(sentence)
        _say(report.legend(comparison, terms), style="dim")
    elif why_not:
        _say(why_not)
    for sentence in remarks(evaluated.found, names.__getitem__):
        _say(f"Note: {sentence}")
    _say(f"{_origin(evaluated, full)} {_eval_config(own)}", style="dim")


def labels(models: Sequence[str]) -> dict[str, str]:
    """Display labels: the last path component where unique, else the full name."""
    last = {model: report.short(Path(model).name) or model for model in models}
    return {model: name if list(last.values()).count(name) == 1 else model for model, name in last.items()}


def fitted(names: Mapping[str, str], room: int) -> dict[str, str]:
    """Names of at most `room` characters. Long names lose their middle where the results stay different."""
    room = max(room, MIN_NAME_WIDTH)
    cut = {
        model: name if len(name) <= room else f"{name[: room // 2]}…{name[len(name) - (room - 1) // 2 :]}"
        for model, name in names.items()
    }
    return cut if len(set(cut.values())) == len(cut) else dict(names)


def _columns(
    rows: Sequence[report.ScoreRow], differences: Sequence[report.DifferenceRow]
) -> tuple[tuple[str, int], ...]:
    """Title of each column of numbers, and its width with the gap before it."""
    figures = [figure for row in rows for figure in row.figures.values()]
    columns = [("score", [each.value for each in figures]), ("95 % interval", [each.interval for each in figures])]
    if differences:
        columns += [
            ("difference", [each.difference.value for each in differences]),
            ("95 % interval", [each.difference.interval for each in differences]),
            ("p", [each.p for each in differences]),
        ]
    return tuple((title, _GAP + max(map(len, (title, *cells)))) for title, cells in columns)


class _Blocks:
    """Table of tasks and averages with columns of equal width. Long names are folded."""

    def __init__(
        self, names: Mapping[str, str], columns: Sequence[tuple[str, int]], comparison: Comparison | None
    ) -> None:
        self._names, self._columns = names, columns
        self._rows = report.differences(comparison) if comparison else []
        self._tasks = {task.task: task for task in comparison.tasks} if comparison else {}
        wide = console.width - sum(wide for _, wide in self._columns)
        self._width = min(max(wide, 2 + MIN_NAME_WIDTH), 2 + max(map(len, names.values())))
        heads = self._table()
        heads.add_row("", *(title for title, _ in self._columns), style="dim")
        console.print(heads)

    def _table(self) -> Table:
        table = Table(box=None, show_header=False, padding=0, pad_edge=False)
        table.add_column(width=self._width, overflow="fold")
        for _, wide in self._columns:
            table.add_column(justify="right", width=wide, no_wrap=True)
        return table

    def show(self, row: report.ScoreRow) -> None:
        about = f"  [dim]{escape(row.about)}[/dim]" if row.about else ""
        _say(f"[bold]{escape(row.title)}[/bold]{about}", markup=True)
        table = self._table()
        against = {each.parent: each for each in self._rows if each.title == row.title}
        for model, figure in row.figures.items():
            cells, style = [figure.value, figure.interval], "" if model else "bold"
            if (difference := against.get(model)) is not None:
                cells += [difference.difference.value, difference.difference.interval, difference.p]
                style = _STYLES.get(difference.outcome, "")
            table.add_row(Padding(escape(self._names[model]), (0, 0, 0, 2)), *cells, style=style)
        console.print(table)
        if task := self._tasks.get(row.title) if row.is_task else None:
            share = report.is_share(task)
            outcome = report.words(task.differences, self._names.__getitem__, brief=True, share=share)
            sentence = outcome if outcome.startswith("no ") else f"{self._names['']} is {outcome}"
            console.print(Padding(escape(sentence), (0, 0, 0, 2), expand=False), highlight=False)
        console.print()


def _verdict(comparison: Comparison, names: Mapping[str, str], terms: report.Terms) -> Iterable[str]:
    """Verdict, then agreement with the parents' answers."""

    def show(model: str) -> str:
        return names.get(model, model)

    if headline := report.headline(comparison, show, terms):
        yield f"{terms.merge} {headline[0].lower()}{headline[1:]}"
    yield from (f"  {line}" for line in report.inherited(comparison, show, terms))
    yield from report.left_out(comparison)


def _origin(evaluated: Evaluated, names: Mapping[str, str]) -> str:
    """Models evaluated now, and those with cached answers."""
    now = [name for model, name in names.items() if model not in evaluated.known]
    kept = [name for model, name in names.items() if model in evaluated.known]
    groups = (("Evaluated now", now), ("Cached", kept))
    return " ".join(f"{title}: {report.joined(models)}." for title, models in groups if models)


def _eval_config(evaluation: ModelEvaluation) -> str:
    here = evaluation.environment
    prompts = "in the chat template" if here.chat_template else "as plain text"
    limit = f", the first {here.limit} samples per task" if here.limit else ""
    return (
        f"lm-eval {here.lm_eval}, {here.dtype} on {here.device}, batch {here.batch_size}, prompts {prompts}, "
        f"seed {here.seed}{limit}. Generation settings: {here.generation}; softmax in {here.softmax_dtype}; "
        f"reading {here.reading}."
    )


def written(files: Iterable[Path]) -> None:
    """Paths of the scores and of the figure."""
    _say(f"The scores are in {', a figure in '.join(str(file) for file in files)}.")


def _say(sentence: str, *, style: str = "", markup: bool = False) -> None:
    """Print a sentence: wrapped on a terminal, one line in a log."""
    text = sentence if markup else escape(sentence)
    console.print(text, style=style, soft_wrap=not console.is_terminal, highlight=False)
