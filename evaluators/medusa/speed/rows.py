"""Report rows from measurements. Nothing is timed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from evaluators import repetition
from evaluators.medusa.decoding.decode import Trace
from evaluators.medusa.drafting.heads import Heads
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.speed import baselines, bench, calibrate, conclusions, exactness
from evaluators.medusa.speed.document import (
    Category,
    ClockName,
    Curve,
    EndToEnd,
    Exact,
    Interval,
    Parting,
    Plain,
    Point,
    Report,
    Row,
    Speedup,
    Steadiness,
    StepMs,
    TokensPerStep,
    TreeFacts,
)
from evaluators.medusa.speed.transfer import HeadSet
from evaluators.medusa.training import distillation
from evaluators.medusa.trees.tree import Tree

GOOD_OVERHEAD = 1.2


@dataclass(frozen=True, slots=True)
class Scored:
    """A set of heads and the tree chosen for it; None without heads. `cosine` is relative to the heads' own model."""

    set: HeadSet
    choice: calibrate.Choice | None
    cosine: float | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """All measurements behind a report. `features` has the splits timed and held_out, which includes the calibration's.

    `reference` is the set made for this model, `floor` untrained heads of its shape, `common` the tree all are
    compared at. Past `deadline` (time.monotonic) no more than must be is still looked at.
    """

    base: Base
    scored: Sequence[Scored]
    reference: Scored
    floor: Heads
    common: Tree
    features: Mapping[str, distillation.Features]
    cost: calibrate.CostCurve
    blocks: Sequence[bench.Block]
    versus: Sequence[baselines.Versus]
    max_new_tokens: int
    seed: int
    deadline: float | None = None

    @property
    def best(self) -> Scored:
        """The set whose tree has the highest predicted gain; of equals the one made for this model."""
        able = [each for each in self.scored if each.choice is not None]
        return max(able, key=lambda each: (each.choice.gain, each is self.reference))  # type: ignore[union-attr]


@dataclass(frozen=True, slots=True)
class Machine:
    """The decisive clock and the A/A comparison on it."""

    clock: ClockName
    steadiness: Steadiness

    @property
    def ok(self) -> bool:
        """True if the A/A comparison holds."""
        return self.steadiness.ok is True


def baseline_rows(m: Measured, machine: Machine) -> tuple[Row, Row, Row]:
    """Rows beside those of heads: baseline, transformers' own loop, prompt lookup."""
    lookup = Row("prompt_lookup", "prompt_lookup")
    if all("prompt_lookup" in block.runs for block in m.blocks):
        lookup = with_timings(replace(lookup, tree=TreeFacts(chosen="common")), m, machine)
    else:
        lookup = replace(lookup, absent_because="the budget was too short to time it.")
    return none_row(m.blocks, m.seed, machine), native_row(m.versus, machine), lookup


def described(report: Report, blocks: Sequence[bench.Block], max_new_tokens: int, machine: Machine) -> Report:
    """Add the suite as run, the baseline, the machine, and warnings of repetitive answers and shortened questions."""
    shortened = [block.question.prompt.id for block in blocks if block.question.shortened]
    looping = [block.question.prompt.id for block in blocks if repetition.loops(block.plain[0].tokens)]
    context = sum(len(b.question.ids) + len(b.plain[0].tokens) / 2 for b in blocks) / max(len(blocks), 1)
    suite = replace(
        report.suite,
        questions=len({block.question.prompt.id for block in blocks}),
        max_new_tokens=max_new_tokens,
        mean_context_tokens=round(context, 1),
        looping=len(looping),
        shortened=len(shortened),
    )
    flattered = (
        f"{len(looping)} of {len(blocks)} answers repeat themselves (fewer than half of their 4-grams differ), which "
        f"inflates tokens per step: {', '.join(looping)}"
    )
    cut = (
        f"{len(shortened)} of {len(blocks)} questions exceed the model's context together with their answers, so only "
        f"their ends were used: {', '.join(shortened)}"
    )
    warnings = (*report.warnings, *[flattered] * bool(looping), *[cut] * bool(shortened))
    return replace(report, suite=suite, plain=plain_figures(blocks), aa=machine.steadiness, warnings=warnings)


def machine_of(base: Base, blocks: Sequence[bench.Block], seed: int) -> Machine:
    """Choose the wall clock if the A/A comparison holds on it, else (shared machine) this process's CPU clock."""
    clock: ClockName = "wall"
    ratio = bench.a_a(blocks, clock, seed)
    if not bench.a_a_ok(ratio) and base.device.type == "cpu":
        clock = "cpu"
        ratio = bench.a_a(blocks, clock, seed)
    return Machine(clock, Steadiness(value(ratio), ci(ratio), bench.a_a_ok(ratio)))


def curve_of(cost: calibrate.CostCurve) -> Curve:
    """Cost curve, each point also as a ratio to one token."""
    points = (Point(n, round(ms, 2), round(ms / cost.points[0][1], 3)) for n, ms in cost.points)
    return Curve(cost.context, cost.clock, tuple(points))


def plain_figures(blocks: Sequence[bench.Block]) -> Plain:
    """Figures of the baseline, all its runs together."""
    traces = [trace for block in blocks for trace in block.plain]
    tokens = bench.decoded(traces)
    wall, cpu = sum(t.decode.wall_s for t in traces), sum(t.decode.cpu_s for t in traces)
    prefill = sum(t.prefill.wall_s for t in traces)
    steps = sum(t.steps for t in traces)
    return Plain(
        tokens=tokens,
        steps=steps,
        wall_s=round(wall, 4),
        cpu_s=round(cpu, 4),
        tokens_per_s=over(tokens, wall),
        step_ms=over(1000 * wall, steps),
        prefill_ms=over(1000 * prefill, len(traces)),
        end_to_end_tokens_per_s=over(sum(len(t.tokens) for t in traces), wall + prefill),
    )


def none_row(blocks: Sequence[bench.Block], seed: int, machine: Machine) -> Row:
    """Row of the baseline itself: its speedup is that of the first runs over the second (A/A)."""
    wall, cpu = bench.a_a(blocks, "wall", seed), bench.a_a(blocks, "cpu", seed)
    speed = replace(_on_both_clocks(wall, cpu, machine), predicted_here=1.0)
    return Row(
        "none",
        "none",
        overhead=1.0,
        tokens_per_s=plain_figures(blocks).tokens_per_s,
        tree=TreeFacts(1, 0, ()),
        tokens_per_step=TokensPerStep(expected=1.0, simulated=1.0, measured=1.0, common_tree=1.0),
        speedup=replace(speed, verdict="same" if machine.ok else "inconclusive"),
    )


def _on_both_clocks(wall: bench.Ratio | None, cpu: bench.Ratio | None, machine: Machine) -> Speedup:
    """Speedup by each clock with its interval, and the decisive clock."""
    return Speedup(value(wall), ci(wall), value(cpu), ci(cpu), machine.clock)


def native_row(versus: Sequence[baselines.Versus], machine: Machine) -> Row:
    """Row of transformers' own loop against the baseline, end to end, prefill included. A slow baseline shows here."""
    if not versus:
        return Row("native", "native", absent_because="there was no time left to run it.")
    plain_s, native_s = (sum(getattr(each, side).wall_s for each in versus) for side in ("plain", "native"))
    plain_cpu_s, native_cpu_s = (sum(getattr(each, side).cpu_s for each in versus) for side in ("plain", "native"))
    wall, rate = over(plain_s, native_s), over(sum(len(each.tokens) for each in versus), native_s)
    return Row(
        "native",
        "native",
        tokens_per_s=rate,
        tree=TreeFacts(1, 0, ()),
        tokens_per_step=TokensPerStep(measured=1.0),
        end_to_end=EndToEnd(rate, wall),
        speedup=Speedup(wall=wall, cpu=over(plain_cpu_s, native_cpu_s), clock_used=machine.clock),
        exact=Exact(len(versus), sum(each.tokens == each.plain_tokens for each in versus)),
    )


def with_timings(row: Row, m: Measured, machine: Machine) -> Row:
    """Add speed, tokens per step, exactness and agreement of the clocks from the blocks of the row's candidate."""
    name = row.id
    runs = [trace for block in m.blocks for trace in block.runs[name]]
    steps = sum(trace.steps for trace in runs)
    rate = bench.rate(m.blocks, name, m.seed)
    overhead, error = bench.identity_error(m.blocks, name)
    categories = _categories(m, name, machine.clock)
    return replace(
        row,
        overhead=rounded(overhead),
        identity_error=rounded(error),
        tokens_per_s=over(bench.decoded(runs), sum(t.decode.wall_s for t in runs)),
        end_to_end=_end_to_end(m.blocks, name, machine.clock),
        step_ms=StepMs(
            draft=over(1000 * sum(t.draft_s for t in runs), steps),
            forward=over(1000 * sum(t.forward_s for t in runs), steps),
            accept=over(1000 * sum(t.accept_s for t in runs), steps),
        ),
        tokens_per_step=replace(
            row.tokens_per_step, measured=value(rate), ci95=ci(rate), without_loops=_without_loops(m, name)
        ),
        speedup=_speedup(row.speedup, m, name, machine, rate),
        exact=_exact(m, name),
        categories=categories,
    )


def _speedup(known: Speedup, m: Measured, name: str, machine: Machine, rate: bench.Ratio | None) -> Speedup:
    wall, cpu = bench.speedup(m.blocks, name, "wall", m.seed), bench.speedup(m.blocks, name, "cpu", m.seed)
    counts = wall if machine.clock == "wall" else cpu
    return replace(
        _on_both_clocks(wall, cpu, machine),
        predicted_here=known.predicted_here,
        predicted_at_1_2=None if rate is None else rounded(rate.value / GOOD_OVERHEAD),
        verdict="inconclusive"
        if counts is None
        else conclusions.verdict(counts.interval, counts.questions, machine.ok),
    )


def _end_to_end(blocks: Sequence[bench.Block], name: str, clock: ClockName) -> EndToEnd:
    """Figures that include the prefill, as a user experiences them."""
    runs = [trace for block in blocks for trace in block.runs[name]]
    plain = [trace for block in blocks for trace in block.plain]

    def rate(traces: Sequence[Trace], by: ClockName) -> float | None:
        return over(sum(len(t.tokens) for t in traces), sum(bench.end_to_end_s(t, by) for t in traces))

    mine, theirs = rate(runs, clock), rate(plain, clock)
    return EndToEnd(rate(runs, "wall"), over(mine, theirs) if mine and theirs else None)


def _without_loops(m: Measured, name: str) -> float | None:
    straight = [block for block in m.blocks if not repetition.loops(block.plain[0].tokens)]
    return value(bench.rate(straight, name, m.seed))


def _exact(m: Measured, name: str) -> Exact:
    found = exactness.divergences(m.base, m.blocks, name, m.deadline)
    return Exact(
        prompts=len(m.blocks),
        equal=len(m.blocks) - len({each.question for each in found}),
        divergences=tuple(
            Parting(each.prompt, each.index, rounded(each.gap), rounded(each.limit), each.tie) for each in found
        ),
    )


def _categories(m: Measured, candidate: str, clock: ClockName) -> tuple[Category, ...]:
    found: dict[str, list[bench.Block]] = {}
    for block in m.blocks:
        found.setdefault(block.question.prompt.category, []).append(block)
    return tuple(
        Category(
            name,
            len(blocks),
            value(bench.rate(blocks, candidate, m.seed)),
            value(bench.speedup(blocks, candidate, clock, m.seed)),
        )
        for name, blocks in found.items()
    )


def value(ratio: bench.Ratio | None) -> float | None:
    return None if ratio is None else round(ratio.value, 4)


def ci(ratio: bench.Ratio | None) -> Interval | None:
    if ratio is None or ratio.interval is None:
        return None
    low, high = ratio.interval
    return round(low, 4), round(high, 4)


def rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 4)


def over(above: float, below: float) -> float | None:
    return round(above / below, 3) if below else None
