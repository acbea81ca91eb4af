"""What the harness costs beside lm-eval itself: the same model, tasks, limit and batch, in alternation.

    python -m benchmarks.evaluation MODEL [--rounds N] [--limit N] [--batch N] [--out benchmarks/RESULTS.md]

Both sides run in a process of their own that starts with nothing cached. Each is run with one question a task and with
`--limit`: the difference of the two is what the questions cost, and the first is start-up. `lm_eval` is called as its
own documentation does, with only the tasks' folder indexed; its command line, which indexes all its tasks, is timed
for start-up alone. Samples are written on both sides. CPU seconds are of all processes together.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import Cost, run
from benchmarks.sections import with_section
from evaluators.harness import task_files

TASKS = ("offline_capitals", "offline_sums")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

OURS = """
import os, sys
from pathlib import Path
from evaluators import harness
from evaluators.harness import EvalConfig, Question, RunOptions, suites
model, limit, batch, place = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
question = Question(suites.own_suite(sys.argv[5].split(",")), EvalConfig(limit, batch_size=str(batch)))
run = RunOptions(place / "cache", place / "scratch", timeout_s=3600, environment=os.environ)
harness.evaluate(model, question, run, identity="benchmark")
"""
THEIRS = """
import json, sys
from pathlib import Path
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
model, limit, batch, place = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
found = simple_evaluate(
    "hf", model_args={"pretrained": model, "dtype": "float32"}, device="cpu", tasks=sys.argv[5].split(","),
    limit=limit, batch_size=batch, bootstrap_iters=1000,
    task_manager=TaskManager(include_path=sys.argv[6], include_defaults=False),
)
place.mkdir(parents=True)
(place / "results.json").write_text(json.dumps(found, default=handle_non_serializable))
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as made:
        costs: dict[tuple[str, int], list[Cost]] = {}
        for number in range(asked.rounds):
            for limit in (1, asked.limit):
                for side in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
                    cost = measured(side, asked.model, limit, asked.batch, Path(made) / side)
                    costs.setdefault((side, limit), []).append(cost)
                    print(f"{side} {limit}: {cost.wall_s:.1f} s, {cost.cpu_s:.1f} s of CPU", flush=True)
        text = report(costs, command_line(asked.model, Path(made)), asked.limit, asked.batch)
    print(text)
    if asked.out is not None:
        asked.out.write_text(
            with_section(asked.out.read_text(), "evaluation", f"## Evaluation beside lm-eval\n\n{text}")
        )


def measured(side: str, model: Path, limit: int, batch: int, place: Path) -> Cost:
    """One run of one side, with nothing left from an earlier one."""
    shutil.rmtree(place, ignore_errors=True)
    code = OURS if side == "ours" else THEIRS
    words = [str(model.resolve()), str(limit), str(batch), str(place), ",".join(TASKS), str(task_files.OWN_TASKS)]
    return _finished(run([sys.executable, "-c", code, *words], cwd=Path.cwd(), environment=ONE_THREAD))


def command_line(model: Path, place: Path) -> Cost:
    """lm-eval's own command, which indexes all of its tasks, with one question a task."""
    words = ["-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--limit", "1", "--tasks", ",".join(TASKS)]
    words += [
        "--model_args",
        f"pretrained={model.resolve()},dtype=float32",
        "--include_path",
        str(task_files.OWN_TASKS),
    ]
    return _finished(run([sys.executable, *words], cwd=place, environment=ONE_THREAD))


def _finished(cost: Cost) -> Cost:
    if cost.status != 0:
        raise SystemExit(f"a run failed ({cost.status}): {cost.said}")
    return cost


def report(costs: dict[tuple[str, int], list[Cost]], command: Cost, limit: int, batch: int) -> str:
    """The section of RESULTS.md: medians of both sides, and the overhead of ours."""

    def median(side: str, asked: int, cpu: bool) -> float:
        return statistics.median(each.cpu_s if cpu else each.wall_s for each in costs[side, asked])

    lines = [
        f"{', '.join(TASKS)}, {limit} questions per task, batches of {batch}, float32, one thread; medians of "
        f"{len(costs['ours', limit])} runs in alternation.",
        "",
        "| | start-up, wall s | start-up, CPU s | questions, wall s | questions, CPU s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    work: dict[tuple[str, bool], float] = {}
    for side, name in (("theirs", "lm-eval called directly"), ("ours", "mergebot")):
        for cpu in (False, True):
            work[side, cpu] = median(side, limit, cpu) - median(side, 1, cpu)
        start = [f"{median(side, 1, cpu):.1f}" for cpu in (False, True)]
        lines.append(f"| {name} | {' | '.join(start)} | {work[side, False]:.1f} | {work[side, True]:.1f} |")
    lines.append(f"| lm-eval's command line | {command.wall_s:.1f} | {command.cpu_s:.1f} | | |")
    over = [100 * (work["ours", cpu] / work["theirs", cpu] - 1) for cpu in (False, True)]
    lines += ["", f"Overhead beyond start-up: {over[0]:+.1f} % of wall time, {over[1]:+.1f} % of CPU time."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
