"""What packed weights bring on a CPU: one forward pass by number of tokens, packed and not, in alternation.

    python -m benchmarks.packed MODEL [--threads 1 2] [--rounds 5] [--out benchmarks/RESULTS.md]

Each round times every width with torch's own products and with packed ones, the order turned round each time; the
table has medians over the rounds. Both sides attend alike. Writes the section `packed` of --out.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from statistics import median

import torch
from rich.console import Console

from benchmarks.sections import with_section
from evaluators.medusa.decoding.runners import EagerRunner
from evaluators.medusa.model import packed
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.speed import calibrate

WIDTHS = (1, 2, 4, 8, 16, 32)
CONTEXT = 128
DTYPES = ("float32", "bfloat16")
Curve = dict[int, float]  # milliseconds by width


def main() -> int:
    asked = _options()
    console = Console(highlight=False, width=130)
    lines = [
        "## One forward pass on a CPU, packed weights and torch's own",
        "",
        f"{asked.model.name}, {CONTEXT} cached tokens, {asked.rounds} rounds in alternation, medians in ms; in "
        "brackets the ratio to one token of the same row. Load average "
        f"{os.getloadavg()[0]:.1f} before; torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}. "
        f"`python -m benchmarks.packed MODEL` on a Linux machine with {os.cpu_count()} cores.",
        "",
        f"| type, threads, products | {' | '.join(f'{n} tokens' if n > 1 else '1 token' for n in WIDTHS)} |",
        f"|---|{'---:|' * len(WIDTHS)}",
    ]
    for dtype in DTYPES:
        base, reason = packed.load(asked.model, dtype=dtype)
        if reason is not None:
            console.print(f"Not packed: {reason}.")
            return 2
        for threads in asked.threads:
            torch.set_num_threads(threads)
            for products, curve in _alternated(base, asked.rounds).items():
                cells = " | ".join(f"{curve[n]:.1f} ({curve[n] / curve[1]:.2f})" for n in WIDTHS)
                lines.append(f"| {dtype}, {threads}, {products} | {cells} |")
                console.print(lines[-1], soft_wrap=True)
    page = asked.out.read_text(encoding="utf-8") if asked.out.is_file() else ""
    asked.out.write_text(with_section(page, "packed", "\n".join(lines)), encoding="utf-8")
    return 0


def _alternated(base: Base, rounds: int) -> dict[str, Curve]:
    """Medians over the rounds, torch's own products first."""
    seen: dict[str, list[Curve]] = {"torch's own": [], "packed": []}
    for number in range(rounds):
        for products in list(seen)[:: 1 if number % 2 else -1]:
            if products == "packed":
                packed.pack(base)
            else:
                packed.unpack(base)
            cost = calibrate.cost_curve(EagerRunner(base), None, CONTEXT, widths=WIDTHS)
            seen[products].append(dict(cost.points))
    return {name: {n: median(curve[n] for curve in curves) for n in WIDTHS} for name, curves in seen.items()}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Packed weights beside torch's own products.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "RESULTS.md")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
