"""Tokens per step by minute of training, for each kind of heads, on questions that nothing was trained on.

    python -m benchmarks.heads MODEL --prompts question.jsonl [--minutes 10] [--out heads.md] [--cache DIR] [--kinds ..]

Each kind gets what `mergebot medusa train` gets in that time on this machine: the same answers (written once, their
seconds count for every kind), then training for what is left. The figures are tokens per step of the exact simulation
on the model's own answers to the questions, with trees that were grown on the calibration answers: nothing is chosen
on the questions. OUT is a page whose section `heads` is rewritten after each kind; heads.json in the cache holds all
figures.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.sections import with_section
from evaluators.medusa import formats
from evaluators.medusa.drafting import drafters
from evaluators.medusa.drafting.heads import Heads, identity_heads
from evaluators.medusa.model import packed
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.training import distillation, prompt_sets, simulation
from evaluators.medusa.training.head_training import HEADS_BY, HeadTrainingConfig, train_heads
from evaluators.medusa.trees.tree import greedy_tree

KINDS = {
    "shared, conditioned, reduced": HeadTrainingConfig(),
    "shared, reduced": HeadTrainingConfig(conditioned=False),
    "shared, conditioned, full": HeadTrainingConfig(vocab=None),
    "own, full": HeadTrainingConfig(kind="own", vocab=None, conditioned=False),
}
SIZES = (8, 16, 64)
FOREVER_S = 1e9
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Clocks:
    """Seconds since something began, on the wall and of this process's threads."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Clocks:
        return cls(time.monotonic(), time.process_time())

    def since(self) -> Clocks:
        return Clocks(time.monotonic() - self.wall, time.process_time() - self.cpu)


def main(arguments: Sequence[str] | None = None) -> int:
    asked = _options(arguments)
    console = Console(highlight=False, width=130)
    asked.cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(asked.threads)
    began = Clocks.now()
    base, _ = packed.load(asked.model)
    test = _own_answers(base, asked.prompts, asked.tokens)
    console.print(f"{len(test.lengths)} questions, {len(test.tokens)} tokens, {began.since().wall:.0f} s")
    rows: dict[str, Row] = {}
    first: Row | None = None
    for name in asked.kinds or KINDS:
        rows[name] = _row(asked, name, base, test, first, console)
        first = first or rows[name]["facts"]
        machine = _machine(base, began.since())
        (asked.cache / "heads.json").write_text(json.dumps({"rows": rows, "machine": machine}, indent=1) + "\n")
        section = _section(asked, rows, test, machine)
        if asked.out is not None:
            page = asked.out.read_text() if asked.out.exists() else ""
            asked.out.write_text(with_section(page, "heads", f"## Heads by minute of training\n\n{section}"))
    console.print(section, soft_wrap=True, markup=False)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tokens per step by minute of training.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=Path, required=True, help="test questions, JSON lines as in MT-bench")
    parser.add_argument("--cache", type=Path, default=Path("heads-benchmark"))
    parser.add_argument("--minutes", type=float, default=10.0, help="for each kind, answers and loading included")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=48, help="of each answer to a question")
    parser.add_argument("--out", type=Path, help="the section in markdown")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, metavar="KIND", help="; ".join(KINDS))
    return parser.parse_args(arguments)


def _own_answers(base: Base, questions: Path, tokens: int) -> distillation.Features:
    """The model's own answers to the first turns."""
    ids = sorted((prompt_sets.encode(base, prompt.turns[0]) for prompt in prompt_sets.read(questions)), key=len)
    return distillation.stack_features(base, distillation.self_distil(base, ids, max_new_tokens=tokens, batch=20))


def _row(
    asked: argparse.Namespace, name: str, base: Base, test: distillation.Features, first: Row | None, console: Console
) -> Row:
    """One kind of heads: trained, then scored on the questions."""
    out = asked.cache / f"{name.replace(', ', '-')}-{time.time_ns()}"
    # A store of this run alone: answers of an earlier one would come for nothing.
    store = asked.cache / f"store-{os.getpid()}"
    wanted = replace(KINDS[name], test=asked.prompts, budget_s=60 * asked.minutes)
    if first is not None:
        left_s = HEADS_BY[False] * wanted.budget_s - first["seconds"]["load"] - first["seconds"]["generate"]
        wanted = replace(wanted, answers=first["prompts"], budget_s=FOREVER_S, fit_s=left_s)
    began = Clocks.now()
    facts = train_heads(asked.model, out, store, wanted, progress=_Told(console, name))
    spent = began.since()
    heads = drafters.drafting(formats.load(out, base)[0])
    untrained = drafters.drafting(identity_heads(heads.spec, base))
    return {
        "facts": facts,
        "before_fit_s": sum((first or facts)["seconds"][stage] for stage in ("load", "generate")),
        "wall_s": round(spent.wall, 1),
        "cpu_s": round(spent.cpu, 1),
        "top1": [round(shares[0], 4) for shares in simulation.accuracy(heads, test).shares],
        "tokens_per_step": dict(zip(map(str, SIZES), _rates(heads, test, facts), strict=True)),
        "untrained": dict(zip(map(str, SIZES), _rates(untrained, test, facts), strict=True)),
    }


class _Told:
    """Prints how far a training is, a line every now and then."""

    EVERY_S = 20.0

    def __init__(self, console: Console, name: str) -> None:
        self._console, self._name = console, name
        self._began = self._last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= self.EVERY_S or done == total:
            self._last = now
            self._console.print(f"{self._name}: {now - self._began:.0f} s, {stage} {done} of {total}")


def _rates(heads: Heads, test: distillation.Features, facts: Row) -> list[float]:
    """Tokens per step by tree size, with the trees that the calibration accuracies of the trained heads grow."""
    trees = [greedy_tree(facts["accuracy"], size) for size in SIZES]
    return [round(rate, 4) for rate in simulation.simulate_each(heads, test, trees)]


def _machine(base: Base, spent: Clocks) -> Row:
    return {
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "dtype": str(base.dtype).removeprefix("torch."),
        "execution": base.execution,
        "wall_s": round(spent.wall, 1),
        "cpu_s": round(spent.cpu, 1),
    }


def _section(asked: argparse.Namespace, rows: dict[str, Row], test: distillation.Features, machine: Row) -> str:
    """All figures as a section for RESULTS.md."""
    one = next(iter(rows.values()))["facts"]
    said = [
        f"Tokens per step after {asked.minutes:g} minutes of training, {asked.model.name}, {machine['dtype']} "
        f"({machine['execution']}), {machine['threads']} threads, load {machine['load']}, torch {machine['torch']}: "
        f"{one['tokens']} tokens of {one['prompts']} own answers to the built-in prompts, written once; then each kind "
        f"learns from them for what is left of the time. Scored by the exact simulation on the model's own answers to "
        f"{len(test.lengths)} questions of {asked.prompts.name} ({len(test.tokens)} tokens, at most {asked.tokens} an "
        f"answer), trees grown on {one['held_out']['answers']} calibration answers.",
        "",
        "| heads | steps (epochs) | minutes, wall (CPU s) | coverage | top-1 | "
        + " | ".join(f"{size} nodes" for size in SIZES)
        + " | untrained, 16 |",
        "|---|---|---|---|---|" + "---|" * (len(SIZES) + 1),
        *(_line(name, row) for name, row in rows.items()),
        "",
        "Tokens per step on the calibration answers with a tree of 8 nodes, by minute (answers and loading included):",
        "",
        "| heads | minute: tokens per step |",
        "|---|---|",
        *(f"| {name} | {_curve(row)} |" for name, row in rows.items()),
    ]
    return "\n".join(said) + "\n"


def _line(name: str, row: Row) -> str:
    facts = row["facts"]
    minutes = (row["before_fit_s"] + facts["seconds"]["fit"]) / 60
    cells = [
        name,
        f"{facts['steps']} ({facts['epochs']:.1f})",
        f"{minutes:.1f} ({row['cpu_s']:.0f})",
        f"{facts['coverage']:.3f}",
        " ".join(f"{share:.3f}" for share in row["top1"]),
        *(f"{row['tokens_per_step'][str(size)]:.3f}" for size in SIZES),
        f"{row['untrained']['16']:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def _curve(row: Row) -> str:
    points: Sequence[Row] = row["facts"]["curve"]
    untrained = row["facts"]["held_out"]["untrained"]
    before = row["before_fit_s"] / 60
    return ", ".join(
        [f"{before:.1f}: {untrained:.2f}"]
        + [f"{before + point['fit_minutes']:.1f}: {point['tokens_per_step']:.2f}" for point in points]
    )


if __name__ == "__main__":
    raise SystemExit(main())
