"""How fast the merge engine is: the I/O floor, mergebot and mergekit on the same merges, in alternation.

usage: [MERGEKIT=path/to/mergekit-yaml] python -m benchmarks.merge [options]

Writes benchmarks/RESULTS.md and benchmarks/results.json after every method, so that a run cut short leaves what it
measured. mergekit runs as a command, where one is given; it is no dependency. Models are made once, in --cache.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from rich.console import Console

from benchmarks import methods, models, report
from benchmarks.measure import Cost, run
from benchmarks.report import FLOOR, HASHED, OURS, THEIRS

HERE = Path(__file__).resolve().parent
REPO = HERE.parent
MERGEBOT = (sys.executable, "-m", "bot.cli.main")  # of this checkout, whatever is installed
OFFLINE = {"HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True, slots=True)
class Bench:
    """What was asked for."""

    cache: Path
    results: Path
    mergekit: str | None
    repeat: int
    mergekit_repeat: int
    mergekit_timeout_s: float
    device: str
    ends: float  # monotonic time at which no further run is started

    def left_s(self) -> float:
        return self.ends - time.monotonic()


def main() -> int:
    """Measure what the options name and write the results."""
    asked = _options()
    console = Console(highlight=False)
    mergekit = os.environ.get("MERGEKIT")
    bench = Bench(
        asked.cache.resolve(),
        asked.results.resolve(),
        str(Path(mergekit).absolute()) if mergekit else None,
        asked.repeat,
        asked.mergekit_repeat,
        asked.mergekit_timeout_s,
        asked.device,
        time.monotonic() + asked.budget_s,
    )
    bench.cache.mkdir(parents=True, exist_ok=True)
    shape = models.shape_of(asked.parameters)
    made = models.synthetic(bench.cache, shape, asked.parents, console.print)
    given = models.real(bench.cache, asked.parents, console.print) if "real" in asked.rows else []
    bench = _started(bench, asked.budget_s)  # making models is not measuring
    results = report.Results.begin(bench.mergekit, vars(asked))
    if "start" in asked.rows:
        starting(bench, results, console)
    if "memory" in asked.rows:
        memory(bench, results, shape, console)
    if "real" in asked.rows:
        merging(bench, results, given, "135M", asked.methods, console)
    if "merge" in asked.rows:
        merging(bench, results, made, report.millions(shape.parameters), asked.methods, console)
    results.write(bench.results)
    console.print(f"{bench.results}")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=methods.METHODS[:9], metavar="A,B")
    parser.add_argument("--parameters", type=int, default=models.LARGE.parameters, help="of the synthetic model")
    parser.add_argument("--parents", type=int, default=2, help="models merged (beside the base, where one is needed)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of mergebot and of the floor")
    parser.add_argument("--mergekit-repeat", type=int, default=1, help="runs of mergekit")
    parser.add_argument("--mergekit-timeout-s", type=float, default=900, help="stop a run of mergekit after this")
    parser.add_argument("--budget-s", type=float, default=2100, help="start no further run after this")
    parser.add_argument(
        "--rows",
        type=lambda text: text.split(","),
        default=["start", "real", "merge", "memory"],
        metavar="A,B",
        help="start (help, plan), real (the 135 M model), merge (the synthetic one), memory (one 4 GB tensor)",
    )
    parser.add_argument("--device", default="cpu", help="of mergebot: cpu or cuda")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "mergebot-bench")
    parser.add_argument("--results", type=Path, default=HERE / "RESULTS.md")
    asked = parser.parse_args()
    unknown = sorted(set(asked.methods) - set(methods.METHODS))
    if unknown:
        parser.error(f"no such method: {', '.join(unknown)}")
    return asked


def _started(bench: Bench, budget_s: float) -> Bench:
    return replace(bench, ends=time.monotonic() + budget_s)


# -- merges -------------------------------------------------------------------------------------------------------


def merging(
    bench: Bench, results: report.Results, folders: Sequence[Path], size: str, names: Sequence[str], console: Console
) -> None:
    """The three programs in alternation, method by method, as long as time is left."""
    layers = int(json.loads((folders[0] / "config.json").read_text())["num_hidden_layers"])
    for method in names:
        if bench.left_s() <= 0:
            console.print(f"no time left for {method} ({size})")
            continue
        with tempfile.TemporaryDirectory(dir=bench.cache) as scratch:
            recipe = Path(scratch) / "recipe.yml"
            recipe.write_text(yaml.safe_dump(methods.recipe(method, folders, layers), sort_keys=False))
            _alternate(bench, results, method, size, recipe, Path(scratch), console)
        results.write(bench.results)


def _alternate(
    bench: Bench, results: report.Results, method: str, size: str, recipe: Path, scratch: Path, console: Console
) -> None:
    work, bytes_out = work_of(recipe)
    plan = scratch / "work.json"
    plan.write_text(json.dumps({"reads": work, "bytes_out": bytes_out}))
    bytes_in = sum(stop - start for _, start, stop in work)
    key = (size, method)
    results.sizes[key] = (bytes_in, bytes_out)
    floor = [sys.executable, "-m", "benchmarks.floor", str(plan)]
    ours = [*MERGEBOT, "merge", str(recipe)]
    timed(floor, scratch)  # warms the page cache; not counted
    for turn in range(max(bench.repeat, bench.mergekit_repeat)):
        if turn and bench.left_s() <= 0:
            return
        if turn < bench.repeat:
            _note(results, key, FLOOR, timed(floor, scratch), console)
            _note(results, key, HASHED, timed(floor, scratch, more=("--hash",)), console)
            _note(results, key, OURS, timed(ours, scratch, more=("--device", bench.device)), console)
        if bench.mergekit and turn < bench.mergekit_repeat:
            for threads in results.threads_for(method):
                cost = timed(
                    [bench.mergekit, str(recipe)],
                    scratch,
                    more=("--no-write-model-card", "--quiet"),
                    environment={**OFFLINE, "OMP_NUM_THREADS": str(threads)},
                    timeout_s=min(bench.mergekit_timeout_s, max(30.0, bench.left_s())),
                )
                _note(results, key, f"{THEIRS} {threads}", cost, console)


def timed(
    command: Sequence[str],
    scratch: Path,
    *,
    more: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    timeout_s: float = 3600,
) -> Cost:
    """Run a command whose last argument is the output, a fresh one on the disk of the models."""
    with tempfile.TemporaryDirectory(dir=scratch) as fresh:
        return run([*command, str(Path(fresh) / "out"), *more], cwd=REPO, environment=environment, timeout_s=timeout_s)


def _note(results: report.Results, key: tuple[str, str], program: str, cost: Cost, console: Console) -> None:
    results.add(key, program, cost)
    size, method = key
    state = "stopped" if cost.stopped else "failed: " + cost.said[-300:] if cost.status else ""
    console.print(
        f"{size} {method:16} {program:11} {cost.wall_s:7.1f} s wall {cost.cpu_s:7.1f} s CPU "
        f"{cost.anonymous_bytes / 1e9:5.2f} GB anonymous {cost.rss_bytes / 1e9:5.2f} GB resident {state}",
        markup=False,
    )


def work_of(recipe: Path) -> tuple[list[tuple[str, int, int]], int]:
    """What a merge reads (file, start, stop) and how many bytes of weights it writes, from its plan."""
    from bot.merge.checkpoints import checkpoint
    from bot.merge.planning import planner
    from bot.merge.planning.byte_ranges import needed
    from bot.merge.recipe import reading as recipes

    parsed = recipes.parse(recipe.read_text())
    opened = {ref: checkpoint.open_checkpoint(checkpoint.LocalFiles(Path(ref.path))) for ref in parsed.repos}
    made = planner.make(parsed, opened)
    reads = [
        (str(Path(ref.path) / file), start, stop)
        for ref, files in needed(made, bridged_bytes=1).items()
        for file, spans in files.items()
        for start, stop in spans
    ]
    return reads, made.bytes_out


# -- start-up and memory ------------------------------------------------------------------------------------------


def starting(bench: Bench, results: report.Results, console: Console) -> None:
    """`--help`, and the plan of a 70 B merge from headers alone."""
    folders = models.headers_only(bench.cache, models.SEVENTY, 4)
    with tempfile.TemporaryDirectory(dir=bench.cache) as scratch:
        recipe = Path(scratch) / "recipe.yml"
        recipe.write_text(yaml.safe_dump(methods.recipe("ties", folders, models.SEVENTY.layers), sort_keys=False))
        for _ in range(max(5, bench.repeat)):
            for what, command in (
                ("mergebot --help", [*MERGEBOT, "--help"]),
                ("mergebot plan, 70 B", [*MERGEBOT, "plan", str(recipe)]),
                ("python -c 'import torch'", [sys.executable, "-c", "import torch"]),
            ):
                results.add(("start", what), OURS, run(command, cwd=REPO))
    for size, what in list(results.costs):
        if size == "start":
            console.print(f"{what}: {report.seconds(results.walls((size, what), OURS))}", markup=False)
    results.write(bench.results)


def memory(bench: Bench, results: report.Results, shape: models.Shape, console: Console) -> None:
    """mergebot alone, once each: ties and karcher of a base and three parents, and ties with one tensor of 4 GB."""
    several = models.synthetic(bench.cache, shape, 3, console.print)
    wide = models.synthetic(bench.cache, models.WIDE, 1, console.print)
    size = report.millions(shape.parameters)
    for method, folders, what in (
        ("ties", several, f"ties, base and three of {size}"),
        ("karcher", several, f"karcher, three of {size}"),
        ("ties", wide, "ties, base and one, a tensor of 4 GB"),
        ("slerp", wide, "slerp, base and one, a tensor of 4 GB"),
    ):
        if bench.left_s() <= 0:
            return
        with tempfile.TemporaryDirectory(dir=bench.cache) as scratch:
            recipe = Path(scratch) / "recipe.yml"
            recipe.write_text(yaml.safe_dump(methods.recipe(method, folders, shape.layers), sort_keys=False))
            cost = timed([*MERGEBOT, "merge", str(recipe)], Path(scratch), more=("--device", bench.device))
            _note(results, ("memory", what), OURS, cost, console)
        results.write(bench.results)


if __name__ == "__main__":
    sys.exit(main())
