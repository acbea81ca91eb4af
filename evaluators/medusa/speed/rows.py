"""Report rows from measurements. Nothing is timed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from evaluators import repetition
from evaluators.medusa.drafting.heads import Heads
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.speed import bench, conclusions, exactness, transfer
from evaluators.medusa.speed.bench import Block, Ratio
from evaluators.medusa.speed.calibrate import CostCurve
from evaluators.medusa.speed.report import (
    Baseline,
    Category,
    ClockName,
    Curve,
    Exact,
    HeadAccuracy,
    HeadShape,
    Interval,
    Point,
    Report,
    Row,
    Speedup,
    Steadiness,
    TimedTree,
    TokensPerStep,
    Training,
)
from evaluators.medusa.speed.transfer import HeadSet
from evaluators.medusa.training import simulation
from evaluators.medusa.training.distillation import Features
from evaluators.medusa.training.training_file import COSTS
from evaluators.medusa.trees.tree import Tree

SIMULATION_LIMIT = 0.01
UNTRAINED = "identity"  # the row of untrained heads
Shares = Mapping[str, simulation.Accuracy]


@dataclass(frozen=True)
class Measured:
    """The timings behind a report, by the baseline alone or also by sets of heads.

    Past `deadline` (time.monotonic) only the first divergence of each row is checked.
    """

    base: Base
    blocks: Sequence[Block]
    versus: Sequence[bench.Versus]
    max_new_tokens: int
    seed: int
    deadline: float | None = None

    @cached_property
    def clock(self) -> ClockName:
        """The wall clock if the A/A comparison holds on it, else (shared machine) this process's CPU clock."""
        wall_ok = bench.a_a_ok(bench.a_a(self.blocks, "wall", self.seed))
        return "wall" if wall_ok or self.base.device.type != "cpu" else "cpu"

    @cached_property
    def aa(self) -> Steadiness:
        """The A/A comparison on the decisive clock."""
        ratio = bench.a_a(self.blocks, self.clock, self.seed)
        return Steadiness(_value(ratio), _interval(ratio), bench.a_a_ok(ratio))


@dataclass(frozen=True)
class Compared:
    """The sets of heads behind a report.

    `untrained` heads have the shape of the reference; `common` is the tree all sets are compared with. `timed` are the
    answers of the timing, `held_out` those and the calibration's.
    """

    sets: Sequence[HeadSet]
    untrained: Heads
    common: Tree
    timed: Features
    held_out: Features
    cost: CostCurve

    @property
    def reference(self) -> HeadSet:
        """The set trained for this model."""
        return next(each for each in self.sets if each.origin == "fresh")

    @property
    def best(self) -> HeadSet:
        """The set whose tree has the highest predicted gain; of equals the one trained for this model."""
        able = [each for each in self.sets if each.choice is not None]
        return max(able, key=lambda each: (each.choice.gain, each is self.reference))  # type: ignore[union-attr]


def described(report: Report, m: Measured) -> Report:
    """Add the suite as run, the baseline, the machine, and warnings of repetitive answers and shortened questions."""
    blocks = m.blocks
    shortened = [block.question.prompt.id for block in blocks if block.question.shortened]
    looping = [block.question.prompt.id for block in blocks if _loops(block)]
    context = sum(len(b.question.ids) + len(b.plain[0].tokens) / 2 for b in blocks) / max(len(blocks), 1)
    suite = replace(
        report.suite,
        questions=len({block.question.prompt.id for block in blocks}),
        max_new_tokens=m.max_new_tokens,
        mean_context_tokens=round(context, 1),
        looping=len(looping),
        shortened=len(shortened),
    )
    warnings = list(report.warnings)
    if looping:
        warnings.append(
            f"{len(looping)} of {len(blocks)} answers repeat themselves (fewer than half of their 4-grams differ), "
            f"which inflates tokens per step: {', '.join(looping)}"
        )
    if shortened:
        warnings.append(
            f"{len(shortened)} of {len(blocks)} questions exceed the model's context together with their answers, so "
            f"only their ends were used: {', '.join(shortened)}"
        )
    return replace(report, suite=suite, plain=_baseline(blocks), aa=m.aa, warnings=tuple(warnings))


def completed(report: Report, m: Measured, heads: Compared) -> Report:
    """Return the report with the baselines, all candidates and the conclusions."""
    report = described(report, m)
    sets = {UNTRAINED: heads.untrained} | {each.id: each.heads for each in heads.sets if each.heads is not None}
    shares = {name: simulation.accuracy(each, heads.held_out, 1) for name, each in sets.items()}
    found = [_heads_row(each, m, heads, shares) for each in heads.sets]
    candidates = (none_row(m), native_row(m), _lookup_row(m), _untrained_row(heads, shares), *found)
    timed = dict.fromkeys(name for block in m.blocks for name in block.runs)
    assert heads.best.choice is not None  # the reference always has heads, so the best of all has
    facts = conclusions.Facts(
        candidates,
        reference=heads.reference.id,
        best=heads.best.id,
        promised=heads.best.choice.speculate,
        slow_baseline=bench.baseline_is_slow(m.versus, m.clock),
        clock_errors={name: error for name in timed if (error := bench.clock_error(m.blocks, name)) is not None},
        common_nodes=transfer.COMMON_NODES,
    )
    unequal = transfer.unequal_training(heads.sets, heads.reference)
    return replace(
        report,
        cost_curve=_curve(heads.cost),
        candidates=candidates,
        warnings=(*report.warnings, *_unlike_simulation(found, m.base), *unequal),
        **asdict(conclusions.drawn(facts)),
    )


# -- baselines ---------------------------------------------------------------------------------------------------------


def none_row(m: Measured) -> Row:
    """Row of the baseline itself: its speedup is that of the first runs over the second (A/A)."""
    ratios = (bench.a_a(m.blocks, "wall", m.seed), bench.a_a(m.blocks, "cpu", m.seed))
    return Row(
        "none",
        "none",
        overhead=1.0,
        tokens_per_s=_baseline(m.blocks).tokens_per_s,
        tree=TimedTree(1, 0, ()),
        tokens_per_step=TokensPerStep(expected=1.0, simulated=1.0, measured=1.0, common_tree=1.0),
        speedup=replace(
            _by_both_clocks(*ratios, m.clock), predicted_here=1.0, verdict="same" if m.aa.ok else "inconclusive"
        ),
    )


def native_row(m: Measured) -> Row:
    """Row of transformers' `generate` against the baseline, end to end, prefill included."""
    if not m.versus:
        return Row("native", "native", absent_because="there was no time left to run it.")
    native_s = sum(each.native.wall_s for each in m.versus)
    wall = _over(sum(each.plain.wall_s for each in m.versus), native_s)
    cpu = _over(sum(each.plain.cpu_s for each in m.versus), sum(each.native.cpu_s for each in m.versus))
    return Row(
        "native",
        "native",
        tokens_per_s=_over(sum(len(each.tokens) for each in m.versus), native_s),
        tree=TimedTree(1, 0, ()),
        tokens_per_step=TokensPerStep(measured=1.0),
        speedup=Speedup(wall=wall, cpu=cpu, clock_used=m.clock),
        exact=Exact(len(m.versus), sum(each.tokens == each.plain_tokens for each in m.versus)),
    )


def _lookup_row(m: Measured) -> Row:
    row = Row("prompt_lookup", "prompt_lookup")
    if not all("prompt_lookup" in block.runs for block in m.blocks):
        return replace(row, absent_because="the budget was too short to time it.")
    return _with_timings(replace(row, tree=TimedTree(chosen="common")), m)


def _baseline(blocks: Sequence[Block]) -> Baseline:
    traces = [trace for block in blocks for trace in block.plain]
    tokens, wall = bench.decoded(traces), sum(trace.decode.wall_s for trace in traces)
    return Baseline(
        tokens=tokens,
        steps=sum(trace.steps for trace in traces),
        wall_s=round(wall, 4),
        cpu_s=round(sum(trace.decode.cpu_s for trace in traces), 4),
        tokens_per_s=_over(tokens, wall),
    )


def _curve(cost: CostCurve) -> Curve:
    points = (Point(n, round(ms, 2), round(ms / cost.points[0][1], 3)) for n, ms in cost.points)
    return Curve(cost.context, cost.clock, tuple(points))


# -- timed candidates --------------------------------------------------------------------------------------------------


def _with_timings(row: Row, m: Measured) -> Row:
    """Add speed, tokens per step and exactness from the blocks of the row's candidate."""
    name = row.id
    runs = [trace for block in m.blocks for trace in block.runs[name]]
    wall, cpu = bench.speedup(m.blocks, name, "wall", m.seed), bench.speedup(m.blocks, name, "cpu", m.seed)
    decisive = wall if m.clock == "wall" else cpu
    verdict = None if decisive is None else conclusions.verdict(decisive.interval, decisive.questions, m.aa.ok is True)
    rate = bench.rate(m.blocks, name, m.seed)
    return replace(
        row,
        overhead=_rounded(bench.overhead(m.blocks, name)),
        tokens_per_s=_over(bench.decoded(runs), sum(trace.decode.wall_s for trace in runs)),
        tokens_per_step=replace(row.tokens_per_step, measured=_value(rate)),
        speedup=replace(
            _by_both_clocks(wall, cpu, m.clock),
            predicted_here=row.speedup.predicted_here,
            verdict=verdict or "inconclusive",
        ),
        exact=_exact(m, name),
        categories=_categories(m, name),
    )


def _by_both_clocks(wall: Ratio | None, cpu: Ratio | None, clock: ClockName) -> Speedup:
    return Speedup(_value(wall), _interval(wall), _value(cpu), _interval(cpu), clock)


def _categories(m: Measured, name: str) -> tuple[Category, ...]:
    found: dict[str, list[Block]] = {}
    for block in m.blocks:
        found.setdefault(block.question.prompt.category, []).append(block)
    return tuple(
        Category(
            category,
            len(blocks),
            _value(bench.rate(blocks, name, m.seed)),
            _value(bench.speedup(blocks, name, m.clock, m.seed)),
        )
        for category, blocks in found.items()
    )


def _exact(m: Measured, name: str) -> Exact:
    texts = [(block.plain[0].tokens, block.runs[name]) for block in m.blocks]
    equal = sum(all(trace.tokens == baseline for trace in runs) for baseline, runs in texts)
    return Exact(len(texts), equal, tuple(exactness.divergences(m.base, m.blocks, name, m.deadline)))


# -- heads -------------------------------------------------------------------------------------------------------------


def _heads_row(each: HeadSet, m: Measured, c: Compared, shares: Shares) -> Row:
    row = Row(each.id, each.origin, each.source, each.absent_because)
    heads, choice = each.heads, each.choice
    if heads is None or choice is None:
        return row
    simulated = _simulated(heads, c.timed, choice.tree)
    row = replace(
        row,
        heads=_shape(heads),
        accuracy=_accuracy(shares[each.id]),
        overhead=_rounded(choice.overhead),
        tree=TimedTree(choice.tree.nodes, choice.tree.max_depth, choice.tree.paths, choice.chosen),
        tokens_per_step=TokensPerStep(
            expected=_rounded(choice.expected),
            simulated=simulated,
            common_tree=_simulated(heads, c.timed, c.common.shallow(heads.spec.heads)),
        ),
        speedup=Speedup(
            predicted_here=_rounded((choice.expected if simulated is None else simulated) / choice.overhead)
        ),
    )
    ratio = None
    if all(each.id in block.runs for block in m.blocks):
        row = _with_timings(row, m)
        ratio = bench.speedup(m.blocks, each.id, m.clock, m.seed)
    if all(len(block.plain[0].tokens) < 2 for block in m.blocks):
        row = replace(row, absent_because="the model ended every answer with its first token, so nothing was decoded.")
    return replace(row, training=_training(each, ratio, m))


def _untrained_row(c: Compared, shares: Shares) -> Row:
    """Row of untrained heads on the same answers, by simulation alone: the reference for trained ones."""
    choice = c.reference.choice
    return Row(
        UNTRAINED,
        UNTRAINED,
        heads=_shape(c.untrained),
        accuracy=_accuracy(shares[UNTRAINED]),
        tokens_per_step=TokensPerStep(
            simulated=None if choice is None else _simulated(c.untrained, c.timed, choice.tree),
            common_tree=_simulated(c.untrained, c.timed, c.common),
        ),
    )


def _shape(heads: Heads) -> HeadShape:
    spec = heads.spec
    kept = heads.base.vocab if spec.keep is None else len(spec.keep)
    return HeadShape(spec.kind, spec.heads, spec.layers, spec.conditioned, kept)


def _accuracy(known: simulation.Accuracy) -> tuple[HeadAccuracy, ...]:
    return tuple(HeadAccuracy(head, round(shares[0], 4)) for head, shares in enumerate(known.shares, start=1))


def _simulated(heads: Heads, features: Features, tree: Tree) -> float | None:
    return _rounded(simulation.simulate(heads, features, tree)) if features.lengths else None


def _training(each: HeadSet, ratio: Ratio | None, m: Measured) -> Training:
    """Cost of making the heads, and the tokens after which it pays off at the measured speed."""
    known = Training(**{key: (each.training or {}).get(key) for key in COSTS})
    spent = [part for part in (known.generate_s, known.features_s, known.fit_s) if part is not None]
    speed = _baseline(m.blocks).tokens_per_s
    if ratio is None or ratio.value <= 1 or not speed or len(spent) < 3:
        return known
    saved_s = (1 - 1 / ratio.value) / speed
    return replace(known, break_even_tokens=round(sum(spent) / saved_s))


def _unlike_simulation(rows: Sequence[Row], base: Base) -> list[str]:
    """Check measured against simulated tokens per step; in float32 they are equal unless one of them is wrong."""
    sentences = []
    for row in rows:
        measured, simulated = row.tokens_per_step.measured, row.tokens_per_step.simulated
        if measured and simulated and base.dtype.itemsize == 4 and abs(measured / simulated - 1) > SIMULATION_LIMIT:
            sentences.append(
                f"{row.id}: decoding brought {measured:.3f} tokens per step where the simulation says {simulated:.3f}"
            )
    return sentences


def _loops(block: Block) -> bool:
    return repetition.loops(block.plain[0].tokens)


def _value(ratio: Ratio | None) -> float | None:
    return None if ratio is None else round(ratio.value, 4)


def _interval(ratio: Ratio | None) -> Interval | None:
    if ratio is None or ratio.interval is None:
        return None
    return round(ratio.interval[0], 4), round(ratio.interval[1], 4)


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 4)


def _over(above: float, below: float) -> float | None:
    return round(above / below, 3) if below else None
