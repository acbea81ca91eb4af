"""From what was measured to the rows of the speed report. No timing happens here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluators import repetition
from evaluators.medusa.drafting.heads import Heads
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.speed import baselines, bench, calibrate, conclusions, exactness, report
from evaluators.medusa.speed.transfer import HeadSet
from evaluators.medusa.training import data
from evaluators.medusa.trees.tree import Tree

Row = dict[str, Any]
GOOD_OVERHEAD = 1.2


@dataclass(frozen=True, slots=True)
class Scored:
    """A set of heads and the tree that was chosen for it; no choice without heads. `cosine` is to its own model."""

    set: HeadSet
    choice: calibrate.Choice | None
    cosine: float | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything a report is written from. `features` has the splits timed, and held_out: with the calibration's.

    `reference` is the set made for this model, `floor` untrained heads of its shape, `common` the tree all are
    compared at. Past `deadline` (time.monotonic) no more than must be is still looked at.
    """

    base: Base
    scored: Sequence[Scored]
    reference: Scored
    floor: Heads
    common: Tree
    features: Mapping[str, data.Features]
    cost: calibrate.CostCurve
    blocks: Sequence[bench.Block]
    versus: Sequence[baselines.Versus]
    max_new_tokens: int
    seed: int
    deadline: float | None = None

    @property
    def best(self) -> Scored:
        """The set whose tree promises most; of equals the one made for this model."""
        able = [each for each in self.scored if each.choice is not None]
        return max(able, key=lambda each: (each.choice.gain, each is self.reference))  # type: ignore[union-attr]


@dataclass(frozen=True, slots=True)
class Machine:
    """The clock that counts, and whether equal work took equal time on it."""

    clock: bench.ClockName
    ok: bool


def baseline_rows(into: Row, m: Measured) -> tuple[list[Row], Machine]:
    """What stands beside any heads: plain decoding, transformers' own loop, prompt lookup."""
    machine = machine_of(into, m.base, m.blocks, m.seed)
    describe(into, m.blocks, m.max_new_tokens)
    into["cost_curve"] = {
        "context_tokens": m.cost.context,
        "clock": m.cost.clock,
        "points": [
            {"n": n, "forward_ms": round(ms, 2), "ratio": round(ms / m.cost.points[0][1], 3)} for n, ms in m.cost.points
        ],
    }
    lookup = report.blank_row("prompt_lookup", "prompt_lookup")
    if all("prompt_lookup" in block.runs for block in m.blocks):
        lookup["tree"] |= {"chosen": "common"}
        timed(lookup, m, machine)
    else:
        lookup["absent_because"] = "the budget was too short to time it."
    return [none_row(m.blocks, m.seed, machine), native_row(m.versus, machine), lookup], machine


def describe(into: Row, blocks: Sequence[bench.Block], max_new_tokens: int) -> None:
    """The suite as it was run, plain decoding, and answers that repeat themselves."""
    into["suite"] |= {
        "questions": len({block.question.prompt.id for block in blocks}),
        "max_new_tokens": max_new_tokens,
        "mean_context_tokens": round(
            sum(len(b.question.ids) + len(b.plain[0].tokens) / 2 for b in blocks) / max(len(blocks), 1), 1
        ),
    }
    into["plain"] = plain_figures(blocks)
    _flag_loops(into, blocks)


def machine_of(into: Row, base: Base, blocks: Sequence[bench.Block], seed: int) -> Machine:
    """The wall clock if equal work took equal time on it; else, the machine being shared, this process's CPU clock."""
    clock: bench.ClockName = "wall"
    ratio = bench.a_a(blocks, clock, seed)
    if not bench.a_a_ok(ratio) and base.device.type == "cpu":
        clock = "cpu"
        ratio = bench.a_a(blocks, clock, seed)
    ok = bench.a_a_ok(ratio)
    into["aa"] = {"ratio": value(ratio), "ci95": ci(ratio), "ok": ok}
    return Machine(clock, ok)


def plain_figures(blocks: Sequence[bench.Block]) -> Row:
    traces = [trace for block in blocks for trace in block.plain]
    tokens = bench.decoded(traces)
    wall, cpu = sum(t.decode.wall_s for t in traces), sum(t.decode.cpu_s for t in traces)
    prefill = sum(t.prefill.wall_s for t in traces)
    steps = sum(t.steps for t in traces)
    return {
        "tokens": tokens,
        "steps": steps,
        "wall_s": round(wall, 4),
        "cpu_s": round(cpu, 4),
        "tokens_per_s": over(tokens, wall),
        "step_ms": over(1000 * wall, steps),
        "prefill_ms": over(1000 * prefill, len(traces)),
        "end_to_end_tokens_per_s": over(sum(len(t.tokens) for t in traces), wall + prefill),
    }


def none_row(blocks: Sequence[bench.Block], seed: int, machine: Machine) -> Row:
    """Not speculating is plain decoding, so its speedup is that of the first plain runs over the second: A/A."""
    row = report.blank_row("none", "none")
    wall, cpu = bench.a_a(blocks, "wall", seed), bench.a_a(blocks, "cpu", seed)
    row["overhead"] = 1.0
    row["tokens_per_s"] = plain_figures(blocks)["tokens_per_s"]
    row["tree"] |= {"nodes": 1, "depth": 0, "paths": []}
    row["tokens_per_step"] |= {"expected": 1.0, "simulated": 1.0, "measured": 1.0, "common_tree": 1.0}
    row["speedup"] |= _on_both_clocks(wall, cpu, machine) | {
        "predicted_here": 1.0,
        "verdict": "same" if machine.ok else "inconclusive",
    }
    return row


def _on_both_clocks(wall: bench.Ratio | None, cpu: bench.Ratio | None, machine: Machine) -> Row:
    """A speedup by each clock with its interval, and which of them counts."""
    return {"wall": value(wall), "wall_ci95": ci(wall), "cpu": value(cpu), "cpu_ci95": ci(cpu),
            "clock_used": machine.clock}  # fmt: skip


def native_row(versus: Sequence[baselines.Versus], machine: Machine) -> Row:
    """Against plain decoding end to end, prefill included. A plain loop that was made slow shows here."""
    if not versus:
        return report.blank_row("native", "native", "there was no time left to run it.")
    row = report.blank_row("native", "native")
    plain_s, native_s = (sum(getattr(each, side).wall_s for each in versus) for side in ("plain", "native"))
    tokens = sum(len(each.tokens) for each in versus)
    row["tokens_per_s"] = over(tokens, native_s)
    row["end_to_end"] |= {"tokens_per_s": over(tokens, native_s), "speedup": over(plain_s, native_s)}
    row["tree"] |= {"nodes": 1, "depth": 0, "paths": []}
    row["tokens_per_step"]["measured"] = 1.0
    row["speedup"] |= {
        "wall": over(plain_s, native_s),
        "cpu": over(sum(each.plain.cpu_s for each in versus), sum(each.native.cpu_s for each in versus)),
        "clock_used": machine.clock,
    }
    equal = sum(each.tokens == each.plain_tokens for each in versus)
    row["exact"] = {"prompts": len(versus), "equal": equal, "divergences": []}
    return row


def timed(row: Row, m: Measured, machine: Machine) -> None:
    """What the blocks say about the candidate of this row: speed, rate, exactness, and whether the clocks agree."""
    name = row["id"]
    runs = [trace for block in m.blocks for trace in block.runs[name]]
    steps = sum(trace.steps for trace in runs)
    wall, cpu = bench.speedup(m.blocks, name, "wall", m.seed), bench.speedup(m.blocks, name, "cpu", m.seed)
    rate = bench.rate(m.blocks, name, m.seed)
    overhead, error = bench.identity_error(m.blocks, name)
    row |= {"overhead": rounded(overhead), "identity_error": rounded(error)}
    row["tokens_per_s"] = over(bench.decoded(runs), sum(t.decode.wall_s for t in runs))
    row["end_to_end"] = _end_to_end(m.blocks, name, machine.clock)
    row["step_ms"] = {
        "draft": over(1000 * sum(t.draft_s for t in runs), steps),
        "forward": over(1000 * sum(t.forward_s for t in runs), steps),
        "accept": over(1000 * sum(t.accept_s for t in runs), steps),
    }
    row["tokens_per_step"] |= {"measured": value(rate), "ci95": ci(rate), "without_loops": _without_loops(m, name)}
    row["speedup"] |= _on_both_clocks(wall, cpu, machine) | {
        "predicted_at_1_2": None if rate is None else rounded(rate.value / GOOD_OVERHEAD),
        "verdict": _verdict(wall if machine.clock == "wall" else cpu, machine),
    }
    row["exact"] = _exact(m, name)
    row["categories"] = _categories(m, name, machine.clock)
    row["macro"] = {key: _mean([each[key] for each in row["categories"]]) for key in ("tokens_per_step", "speedup")}


def _verdict(ratio: bench.Ratio | None, machine: Machine) -> conclusions.Verdict:
    if ratio is None:
        return "inconclusive"
    return conclusions.verdict(ratio.interval, ratio.questions, machine.ok)


def _end_to_end(blocks: Sequence[bench.Block], name: str, clock: bench.ClockName) -> Row:
    """With reading the prompt, as a user waits for it."""
    runs = [trace for block in blocks for trace in block.runs[name]]
    plain = [trace for block in blocks for trace in block.plain]

    def rate(traces: Sequence[Any], by: bench.ClockName) -> float | None:
        return over(sum(len(t.tokens) for t in traces), sum(bench.end_to_end_s(t, by) for t in traces))

    mine, theirs = rate(runs, clock), rate(plain, clock)
    return {"tokens_per_s": rate(runs, "wall"), "speedup": over(mine, theirs) if mine and theirs else None}


def _without_loops(m: Measured, name: str) -> float | None:
    straight = [block for block in m.blocks if not repetition.loops(block.plain[0].tokens)]
    return value(bench.rate(straight, name, m.seed))


def _flag_loops(into: Row, blocks: Sequence[bench.Block]) -> None:
    looping = [block.question.prompt.id for block in blocks if repetition.loops(block.plain[0].tokens)]
    into["suite"]["looping"] = len(looping)
    if looping:
        into["warnings"].append(
            f"{len(looping)} of {len(blocks)} answers repeat themselves (fewer than half of their 4-grams differ), "
            f"which inflates tokens per step: {', '.join(looping)}"
        )


def _exact(m: Measured, name: str) -> Row:
    found = exactness.divergences(m.base, m.blocks, name, m.deadline)
    return {
        "prompts": len(m.blocks),
        "equal": len(m.blocks) - len({each.question for each in found}),
        "divergences": [
            {
                "prompt": each.prompt,
                "index": each.index,
                "gap": rounded(each.gap),
                "limit": rounded(each.limit),
                "tie": each.tie,
            }
            for each in found
        ],
    }


def _categories(m: Measured, candidate: str, clock: bench.ClockName) -> list[Row]:
    names = list(dict.fromkeys(block.question.prompt.category for block in m.blocks))
    rows = []
    for name in names:
        blocks = [block for block in m.blocks if block.question.prompt.category == name]
        rows.append(
            {
                "name": name,
                "prompts": len(blocks),
                "tokens_per_step": value(bench.rate(blocks, candidate, m.seed)),
                "speedup": value(bench.speedup(blocks, candidate, clock, m.seed)),
            }
        )
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    """Every category counts once, whatever its number of tokens."""
    known = [each for each in values if each is not None]
    return rounded(sum(known) / len(known)) if known else None


def value(ratio: bench.Ratio | None) -> float | None:
    return None if ratio is None else round(ratio.value, 4)


def ci(ratio: bench.Ratio | None) -> list[float] | None:
    return None if ratio is None or ratio.interval is None else [round(bound, 4) for bound in ratio.interval]


def rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 4)


def over(above: float, below: float) -> float | None:
    return round(above / below, 3) if below else None
