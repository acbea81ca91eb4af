"""Few-shot tasks beside lm-eval's command line: the same model, questions and batch, in alternation.

    python -m benchmarks.few_shot MODEL [--rounds N] [--limit N] [--batch N] [--out benchmarks/RESULTS.md]

    shared     5 examples that are the same for every question, four answers of one token (the shape of MMLU)
    drawn      25 examples drawn anew for every question, four answers (the shape of arc_challenge)
    written    5 examples that are the same for every question, answers of up to 64 tokens (the shape of gsm8k)

Each run is a process that starts with nothing cached, once with one question and once with `--limit`; the difference
is the cost of the questions. float32, one thread. CPU seconds are of all processes together, memory is the peak.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evaluation import ONE_THREAD
from benchmarks.measure import Cost, run
from benchmarks.sections import with_section
from evaluators.tasks import offline

SHAPES = ("shared", "drawn", "written")
ROWS = 64
OURS = """
import os, sys
from pathlib import Path
from evaluators import harness
from evaluators.harness import EvalConfig, Question, RunOptions
from evaluators.harness.suites import ANY, Suite, SuiteTask
model, place, file = (Path(each) for each in sys.argv[1:4])
limit, batch = int(sys.argv[4]), sys.argv[5]
suite = Suite("benchmark", 1, (SuiteTask(file.stem, ANY, file=file),))
run = RunOptions(place / "cache", place / "scratch", timeout_s=7200, environment=os.environ)
harness.evaluate(model, Question(suite, EvalConfig(limit, batch_size=batch)), run, identity="benchmark")
"""


_HEAD = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    train: {folder}/train.jsonl
    test: {folder}/test.jsonl
fewshot_split: train
test_split: test
doc_to_text: "{{{{prompt}}}}"
metadata: {{version: 1.0}}
"""
_CHOICE = """output_type: multiple_choice
doc_to_choice: %s
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
_FIRST = "num_fewshot: 5\nfewshot_config: {sampler: first_n}\n"
_BODIES = {
    "shared": _CHOICE % "[A, B, C, D]" + _FIRST,
    "drawn": _CHOICE % "choices" + "num_fewshot: 25\n",
    "written": """output_type: generate_until
doc_to_target: "{{written}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 64, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
    + _FIRST,
}


def write_tasks(folder: Path) -> None:
    """Task files and data of the three shapes, from the capitals of the offline suite."""
    draw = random.Random(7)
    rows = list(offline.capitals()["test"])
    facts = [f"{row['prompt']} {row['choices'][row['answer']]}." for row in rows]
    for name, body in _BODIES.items():
        (folder / name).mkdir()
        (folder / f"{name}.yaml").write_text(_HEAD.format(name=name, folder=folder / name) + body)
        for split in ("train", "test"):
            (folder / name / f"{split}.jsonl").write_text(
                "".join(json.dumps(_row(name, draw, rows, facts)) + "\n" for _ in range(ROWS))
            )


def _row(shape: str, draw: random.Random, rows: Sequence[Mapping[str, Any]], facts: Sequence[str]) -> dict[str, Any]:
    number = draw.randrange(len(rows))
    row, known = rows[number], draw.sample(facts, 3)
    listed = "".join(f"\n{letter}. {city}" for letter, city in zip("ABCD", row["choices"], strict=True))
    question = f"{' '.join(known)}\nQuestion: complete the sentence. {row['prompt']}"
    return {
        "prompt": f"{question}{listed if shape == 'shared' else ''}\nAnswer:",
        "choices": row["choices"],
        "answer": row["answer"],
        "written": f"{facts[number]} {known[0]}",
    }


def measured(side: str, shape: str, model: Path, limit: int, batch: int, place: Path, tasks: Path) -> Cost:
    place.mkdir(parents=True)
    if side == "ours":
        words = [str(model), str(place), str(tasks / f"{shape}.yaml"), str(limit), str(batch)]
        cost = run([sys.executable, "-c", OURS, *words], cwd=Path.cwd(), environment=ONE_THREAD)
    else:
        words = ["-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", str(batch)]
        words += ["--model_args", f"pretrained={model},dtype=float32", "--limit", str(limit), "--tasks", shape]
        words += ["--include_path", str(tasks), "--log_samples", "--output_path", str(place)]
        cost = run([sys.executable, *words], cwd=place, environment=ONE_THREAD)
    if cost.status != 0:
        raise SystemExit(f"a run failed ({cost.status}): {cost.said}")
    return cost


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    costs: dict[tuple[str, str, int], list[Cost]] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_tasks(folder)
        for number in range(options.rounds):
            for shape in SHAPES:
                for limit in (1, options.limit):
                    for side in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
                        place = folder / f"{number}-{shape}-{limit}-{side}"
                        cost = measured(side, shape, options.model.resolve(), limit, options.batch, place, folder)
                        costs.setdefault((side, shape, limit), []).append(cost)
                        print(f"{shape} {side} {limit}: {cost.wall_s:.1f} s, {cost.cpu_s:.1f} s of CPU", flush=True)
    text = report(costs, options.limit, options.batch)
    print(text)
    if options.out is not None:
        section = f"## Few-shot tasks beside lm-eval's command line\n\n{text}"
        options.out.write_text(with_section(options.out.read_text(), "few-shot", section))


def report(costs: dict[tuple[str, str, int], list[Cost]], limit: int, batch: int) -> str:
    """The section of RESULTS.md: CPU seconds of the questions, medians, and their ratio."""
    runs = len(next(iter(costs.values())))
    lines = [
        f"{limit - 1} questions beyond start-up, batches of {batch}, float32, one thread; medians of {runs} runs, in "
        "alternation.",
        "",
        "| task | lm-eval, CPU s | mergebot, CPU s | ratio | lm-eval, GB | mergebot, GB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for shape in SHAPES:
        work, memory = [], []
        for side in ("theirs", "ours"):
            seconds = [statistics.median(each.cpu_s for each in costs[side, shape, n]) for n in (1, limit)]
            work.append(seconds[1] - seconds[0])
            memory.append(max(each.rss_bytes for each in costs[side, shape, limit]) / 1e9)
        lines.append(
            f"| {shape} | {work[0]:.1f} | {work[1]:.1f} | {work[0] / work[1]:.1f} | {memory[0]:.1f} | {memory[1]:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
