"""Tokens per step by minute of training, for each kind of heads, on questions that nothing was trained on.

    python -m benchmarks.heads MODEL --prompts question.jsonl [--answers 96] [--fit-s 40] [--cache DIR]

The answers are generated once and their seconds count for every kind. Each kind then has the same seconds to fit. The
figures are tokens per step of the exact simulation on the model's own answers to the questions, with trees of 8 and 64
nodes that were grown on the calibration answers: nothing is chosen on the questions. See heads.json in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from evaluators.medusa import adapters, calibrate, data, formats, suite
from evaluators.medusa.adapters import Base
from evaluators.medusa.head_training import Wanted, train_heads
from evaluators.medusa.heads import Heads, identity_heads
from evaluators.medusa.tree import greedy_tree

KINDS = {
    "shared, conditioned, 8192 tokens": Wanted(vocab=8192),
    "shared, 8192 tokens": Wanted(vocab=8192, conditioned=False),
    "shared, conditioned, full": Wanted(vocab=None),
    "own, full": Wanted(kind="own", vocab=None, conditioned=False),
}
SIZES = (8, 64)


def main() -> int:
    asked = _options()
    console = Console(highlight=False, width=130)
    asked.cache.mkdir(parents=True, exist_ok=True)
    base = adapters.load(asked.model)
    began, cpu = time.monotonic(), time.process_time()
    test = _own_answers(base, asked.prompts, asked.tokens)
    console.print(f"{len(test.lengths)} questions, {len(test.tokens)} tokens, {time.monotonic() - began:.0f} s")
    rows: dict[str, Any] = {}
    generate_s: float | None = None
    for name in asked.kinds or KINDS:
        out = asked.cache / f"{name.replace(', ', '-').replace(' ', '-')}-{time.time_ns()}"
        wanted = replace(KINDS[name], test=asked.prompts, answers=asked.answers, budget_s=1e9, fit_s=asked.fit_s)
        facts = train_heads(asked.model, out, asked.cache / "store", wanted)
        generate_s = generate_s or facts["generate_s"]
        rows[name] = _row(base, out, facts, test, asked.answers) | {"generate_s": generate_s}
        (asked.cache / "heads.json").write_text(json.dumps({"rows": rows, "machine": _machine(cpu)}, indent=1) + "\n")
        console.print(_line(name, rows[name]), soft_wrap=True)
    console.print(
        f"threads {torch.get_num_threads()}, CPU {time.process_time() - cpu:.0f} s, load {os.getloadavg()[0]}"
    )
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tokens per step by minute of training.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=Path, required=True, help="test questions, JSON lines as in MT-bench")
    parser.add_argument("--cache", type=Path, default=Path("heads-benchmark"))
    parser.add_argument("--answers", type=int, default=96, help="training prompts answered")
    parser.add_argument("--fit-s", type=float, default=40.0, help="seconds of training for each kind")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer to a question")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, metavar="KIND", help="; ".join(KINDS))
    return parser.parse_args()


def _own_answers(base: Base, questions: Path, tokens: int) -> data.Features:
    """The model's own answers to the first turns."""
    ids = sorted((suite.encode(base, prompt.turns[0]) for prompt in suite.read(questions)), key=len)
    return data.gather(base, data.self_distil(base, ids, max_new_tokens=tokens, batch=20))


def _row(base: Base, out: Path, facts: dict[str, Any], test: data.Features, answers: int) -> dict[str, Any]:
    heads, _ = formats.load(out, base)
    untrained = identity_heads(heads.spec, base)
    return {
        "facts": facts,
        "answers": answers,
        "top1": [round(shares[0], 4) for shares in calibrate.accuracy(heads, test).shares],
        "tokens_per_step": {str(size): _rate(heads, test, size, out) for size in SIZES},
        "untrained": {str(size): _rate(untrained, test, size, out) for size in SIZES},
    }


def _rate(heads: Heads, test: data.Features, size: int, out: Path) -> float:
    """With the tree that the calibration accuracies of the trained heads grow."""
    shares = json.loads((out / "training.json").read_text())["accuracy"]
    return round(calibrate.simulate(heads, test, greedy_tree(shares, size)), 4)


def _line(name: str, row: dict[str, Any]) -> str:
    facts = row["facts"]
    offset = row["generate_s"] / 60
    start = facts["curve"][0]["minutes"] - facts["curve"][0]["fit_minutes"] if facts["curve"] else 0.0
    curve = " ".join(
        f"{point['minutes'] - start + offset:.1f}:{point['tokens_per_step']:.2f}" for point in facts["curve"]
    )
    return (
        f"| {name} | {facts['steps']} steps, {facts['epochs']} epochs | {offset + facts['fit_s'] / 60:.2f} min "
        f"| {facts['coverage']:.3f} | {' '.join(f'{x:.3f}' for x in row['top1'])} "
        f"| {row['tokens_per_step']} | untrained {row['untrained']} |\n  calibration, minute:tokens/step {curve}"
    )


def _machine(cpu: float) -> dict[str, Any]:
    return {"threads": torch.get_num_threads(), "load": os.getloadavg()[0], "torch": torch.__version__,
            "cpu_s": round(time.process_time() - cpu, 1)}  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
