"""How fast Medusa decodes on a GPU beside a plain loop that is as optimised: static shapes, CUDA graphs for both.

usage: python -m benchmarks.decoding [--shape 1B 3B 8B] [--out FILE]
       python -m benchmarks.decoding --model FOLDER --heads FOLDER [--out FILE]

Without a checkpoint, Llama-shaped models with random weights are made on the device and the acceptance is simulated:
real heads run and are paid for, then their guesses are replaced by ones that are right as often as `--misses` says.
Writes the section between the `decoding` markers of --out (benchmarks/RESULTS.md) after each model. Without a GPU it
says so and exits with 2; `--shape tiny --device cpu` shows that it runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import report
from benchmarks.sections import with_section
from benchmarks.simulated import SHAPES, Simulated, SimulatedDrafter, real_heads, shares, simulated
from bot.errors import EvaluationError
from evaluators.medusa import formats
from evaluators.medusa.decoding.decode import Limits, Trace
from evaluators.medusa.decoding.runners import EagerRunner, Runner
from evaluators.medusa.decoding.static_runner import StaticRunner, fastest
from evaluators.medusa.drafting.drafters import Drafter, HeadDrafter
from evaluators.medusa.model import causal_lm
from evaluators.medusa.model.attention import use_grouped
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.speed import bench
from evaluators.medusa.training import prompt_sets
from evaluators.medusa.trees.tree import expected_tokens, greedy_tree

RESULTS = Path(__file__).resolve().parent / "RESULTS.md"
NODES = (1, 8, 16, 32, 64)
FAILED, NO_GPU = 1, 2  # exit status
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OTHERS = {"generate": None, "generate, static cache, compiled": "static"}


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, who drafts for it and how accurately, and what it is asked."""

    name: str
    base: Base
    drafter: Drafter
    accuracy: Sequence[Sequence[float]]
    questions: list[bench.Question]


@dataclass(slots=True)
class Figures:
    """What was measured on one subject. `others`: tokens/s end to end by name, or why there are none."""

    name: str
    parameters: int
    execution: str
    attention: str
    accuracy: Sequence[Sequence[float]]
    blocks: list[bench.Block]
    others: dict[str, float | str] = field(default_factory=dict)

    def step_ms(self, nodes: int | None) -> float:
        """Median over generations of milliseconds per step; None: plain."""
        return statistics.median(1000 * trace.decode.wall_s / trace.steps for trace in self._traces(nodes))

    def equal(self, nodes: int) -> str:
        pairs = [(trace.tokens, block.plain[0].tokens) for block in self.blocks for trace in block.runs[str(nodes)]]
        return f"{sum(mine == plain for mine, plain in pairs)} of {len(pairs)}"

    def plain_end_to_end(self) -> float:
        return statistics.median(len(t.tokens) / bench.end_to_end_s(t) for t in self._traces(None))

    def _traces(self, nodes: int | None) -> list[Trace]:
        runs = [block.plain if nodes is None else block.runs[str(nodes)] for block in self.blocks]
        return [trace for traces in runs for trace in traces if trace.steps]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the options name and write the section."""
    asked = _options(argv)
    console = Console(highlight=False, soft_wrap=True)
    if asked.device == "cuda" and not torch.cuda.is_available():
        console.print(
            "No CUDA device is to be seen here, so nothing was measured. Run `make bench-decoding` on a machine with "
            "a GPU, or add --shape tiny --device cpu to see that it runs."
        )
        return NO_GPU
    try:
        _run(asked, console)
    except EvaluationError as error:
        console.print(f"{error} ({error.code})")
        return FAILED
    console.print(f"{asked.out}")
    return 0


def _run(asked: argparse.Namespace, console: Console) -> None:
    done: list[Figures] = []
    for subject in _subjects(asked):
        console.print(f"{subject.name}: {len(subject.questions)} prompts, {asked.tokens} tokens each")
        done.append(measure(subject, Limits(asked.tokens), asked.repeats))
        _write(asked, done)
        if not asked.no_others:
            _others(subject, Limits(asked.tokens), done[-1])
            _write(asked, done)
        del subject
        gc.collect()
        torch.cuda.empty_cache()


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["1B", "3B", "8B"], help="models to make")
    parser.add_argument("--model", type=Path, help="a checkpoint folder instead")
    parser.add_argument("--heads", type=Path, help="its heads, as `mergebot medusa train` writes them")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--misses", type=float, default=0.75, help="share of the published heads' misses that is left")
    parser.add_argument("--draft-vocabulary", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--no-others", action="store_true", help="leave out the eager loop and transformers' generate")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args(argv)
    if (asked.model is None) != (asked.heads is None):
        parser.error("--model and --heads go together")
    return asked


# -- what is measured --------------------------------------------------------------------------------------------------


def _subjects(asked: argparse.Namespace) -> Iterator[Subject]:
    """One after another, so that only one model is in memory."""
    if asked.model is not None:
        yield _checkpoint(asked)
        return
    for name in asked.shape:
        yield _made(name, asked)


def _made(name: str, asked: argparse.Namespace) -> Subject:
    model = simulated(SHAPES[name], torch.device(asked.device), DTYPES[asked.dtype])
    accuracy = shares(asked.misses)
    drafter = SimulatedDrafter(model, real_heads(model.base, asked.draft_vocabulary), accuracy)
    return Subject(f"{name} shape", model.base, drafter, accuracy, _asked_of(model, asked))


def _asked_of(model: Simulated, asked: argparse.Namespace) -> list[bench.Question]:
    """Prompts of tokens drawn at random."""
    generator = torch.Generator().manual_seed(1)
    rows: Tensor = torch.randint(0, model.base.vocab, (asked.prompts, asked.prompt_tokens), generator=generator)
    return [
        bench.Question(prompt_sets.Prompt(str(number), "made", ("",)), tuple(row))
        for number, row in enumerate(rows.tolist())
    ]


def _checkpoint(asked: argparse.Namespace) -> Subject:
    """A trained model with its heads; its tree grows from the accuracies that training noted."""
    base = causal_lm.load(asked.model, asked.device, DTYPES[asked.dtype])
    heads, _ = formats.load(asked.heads, base)
    noted = asked.heads / "training.json"
    accuracy = json.loads(noted.read_text()).get("accuracy") if noted.is_file() else None
    if accuracy is None:
        raise EvaluationError(
            "BAD_HEADS", f"{noted} with the accuracy of each head is not there.", "Train with `mergebot medusa train`."
        )
    prompts = prompt_sets.in_turns(prompt_sets.builtin("test"), asked.prompts)
    questions = [bench.Question(prompt, tuple(prompt_sets.encode(base, prompt.turns[0]))) for prompt in prompts]
    return Subject(asked.model.name, base, HeadDrafter(heads), accuracy, questions)


def measure(subject: Subject, limits: Limits, repeats: int) -> Figures:
    """Plain and every tree in ABBA order on the fastest runner that this device has for both."""
    base = subject.base
    runner = _runner(base)
    candidates = [bench.Candidate(str(nodes), subject.drafter, greedy_tree(subject.accuracy, nodes)) for nodes in NODES]
    blocks = bench.run_blocks(runner, candidates, subject.questions, limits, bench.Schedule(repeats))
    parameters = sum(parameter.numel() for parameter in base.model.parameters())
    attention = base.model.config._attn_implementation
    return Figures(subject.name, parameters, runner.execution, attention, subject.accuracy, blocks)


def _runner(base: Base) -> Runner:
    """What `mergebot medusa bench` takes on a GPU; on a CPU the same code without graphs."""
    if base.device.type == "cuda":
        return fastest(base)
    use_grouped(base)
    return StaticRunner(base)


def _others(subject: Subject, limits: Limits, into: Figures) -> None:
    """The growing cache and transformers' own loops, with the library's attention; medians, the first call warms up."""
    base = subject.base
    base.model.set_attn_implementation("sdpa")
    blocks = bench.run_blocks(EagerRunner(base), [], subject.questions, limits)
    rates = [len(t.tokens) / bench.end_to_end_s(t) for block in blocks for t in block.plain]
    into.others["plain loop, growing cache, eager"] = statistics.median(rates)
    for name, cache in OTHERS.items():
        try:
            first, *rest = [*subject.questions[:1], *subject.questions]
            bench.native(base, first, limits, cache)
            runs = [bench.native(base, question, limits, cache) for question in rest]
        except Exception as error:  # a compiler may be missing; the page says so
            into.others[name] = f"did not run ({type(error).__name__})"
            continue
        into.others[name] = statistics.median(len(tokens) / clock.wall_s for tokens, clock in runs)


# -- the page ----------------------------------------------------------------------------------------------------------


def _write(asked: argparse.Namespace, done: Sequence[Figures]) -> None:
    page = asked.out.read_text() if asked.out.exists() else ""
    asked.out.write_text(with_section(page, report.DECODING, _page(asked, done)))


def _page(asked: argparse.Namespace, done: Sequence[Figures]) -> str:
    about = report.machine()
    device = torch.cuda.get_device_name() if asked.device == "cuda" else "the CPU"
    drafts = (
        f"heads of {asked.heads.name}"
        if asked.heads
        else f"simulated: conditioned heads over {asked.draft_vocabulary} tokens run, then guesses are drawn with "
        f"{asked.misses:g} of the misses that the published heads of the 7B model have, which is assumed, not measured"
    )
    head = f"""## Decoding, plain and with Medusa, on {device}

Measured {about["date"]} by `make bench-decoding` on {about["machine"]}; torch {about["torch"]}, {asked.dtype}, batch of
one, {asked.prompts} prompts, {asked.tokens} tokens each. Drafts: {drafts}.
Each prompt runs plain, every tree, every tree backwards, plain, or the other way round. Both loops are one code with
one cache, one attention and one graph for a step; **overhead** is the median step over the median plain step,
**speedup** the ratio of summed decode tokens/s with its 95 % interval over prompts. A tree of 1 node is plain decoding
again: it says how steady the machine is."""
    return "\n\n".join([head, *(_table(figures) for figures in done)])


def _table(figures: Figures) -> str:
    plain_ms = figures.step_ms(None)
    lines = [
        f"### {figures.name}: {report.millions(figures.parameters)} parameters, {figures.execution}",
        "",
        f"Plain: {plain_ms:.3f} ms a step, {figures.plain_end_to_end():.1f} tokens/s end to end; attention "
        f"{figures.attention}.",
        "",
        "| nodes | expected tokens/step | tokens/step | step ms | overhead | speedup | equal texts |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for nodes in NODES:
        rate = bench.rate(figures.blocks, str(nodes))
        speedup = bench.speedup(figures.blocks, str(nodes), "wall")
        expected = expected_tokens(figures.accuracy, greedy_tree(figures.accuracy, nodes))
        lines.append(
            f"| {nodes} | {expected:.2f} | {'-' if rate is None else f'{rate.value:.2f}'} "
            f"| {figures.step_ms(nodes):.3f} | {figures.step_ms(nodes) / plain_ms:.3f} | {_ratio(speedup)} "
            f"| {figures.equal(nodes)} |"
        )
    if figures.others:
        lines += ["", "| beside it, end to end | tokens/s |", "| --- | ---: |"]
        lines += [
            f"| {name} | {value if isinstance(value, str) else f'{value:.1f}'} |"
            for name, value in figures.others.items()
        ]
    return "\n".join(lines)


def _ratio(ratio: bench.Ratio | None) -> str:
    if ratio is None:
        return "-"
    span = f" ({ratio.interval[0]:.2f} to {ratio.interval[1]:.2f})" if ratio.interval else ""
    return f"**{ratio.value:.2f}**{span}"


if __name__ == "__main__":
    raise SystemExit(main())
