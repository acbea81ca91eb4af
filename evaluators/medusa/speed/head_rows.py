"""Report rows for sets of heads. Nothing is timed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from evaluators.medusa.drafting.heads import Heads
from evaluators.medusa.speed import baselines, bench, conclusions, rows, transfer
from evaluators.medusa.speed.document import (
    HeadAccuracy,
    HeadFacts,
    Made,
    Report,
    Row,
    Speedup,
    TokensPerStep,
    TreeFacts,
)
from evaluators.medusa.speed.rows import GOOD_OVERHEAD, Machine, Measured, Scored, over, rounded
from evaluators.medusa.training import simulation
from evaluators.medusa.training.training_file import COSTS
from evaluators.medusa.trees.tree import Tree

SIMULATION_LIMIT = 0.01
FLOOR = "identity"  # the row of untrained heads
Known = Mapping[str, simulation.Accuracy]


def completed(report: Report, m: Measured) -> Report:
    """Return the report with the baselines, all candidates and the conclusions."""
    machine = rows.machine_of(m.base, m.blocks, m.seed)
    report = rows.described(report, m.blocks, m.max_new_tokens, machine)
    heads = {FLOOR: m.floor} | {each.set.id: each.set.heads for each in m.scored if each.set.heads is not None}
    known = {name: simulation.accuracy(each, m.features["held_out"], 5) for name, each in heads.items()}
    found = [_row(each, m, machine, known) for each in m.scored]
    candidates = (*rows.baseline_rows(m, machine), _identity(m, known[FLOOR]), *found)
    unequal = transfer.unequal_training([each.set for each in m.scored], m.reference.set)
    return replace(
        report,
        cost_curve=rows.curve_of(m.cost),
        candidates=candidates,
        warnings=(*report.warnings, *_unlike_simulation(found, m), *unequal),
        **asdict(conclusions.drawn(_facts(candidates, m, machine))),
    )


def _facts(candidates: Sequence[Row], m: Measured, machine: Machine) -> conclusions.Facts:
    best, choice = m.best, m.best.choice
    assert choice is not None  # the reference always has heads, so the best of all has
    names = dict.fromkeys(name for block in m.blocks for name in block.runs)
    return conclusions.Facts(
        candidates,
        reference=m.reference.set.id,
        best=best.set.id,
        promised=choice.speculate,
        slow_plain=baselines.plain_is_slow(m.versus, machine.clock),
        torn=[name for name in names if bench.clocks_disagree(m.blocks, name)],
        common_nodes=transfer.COMMON_NODES,
    )


def _row(scored: Scored, m: Measured, machine: Machine, known: Known) -> Row:
    each, heads, choice = scored.set, scored.set.heads, scored.choice
    row = Row(each.id, each.origin, each.source, each.absent_because, hidden_cosine=rounded(scored.cosine))
    if heads is None or choice is None:
        return row
    mine, floor, best = (_top1(known[name]) for name in (each.id, FLOOR, m.reference.set.id))
    simulated = _simulated(heads, m, choice.tree)
    row = replace(
        row,
        heads=_heads(heads, m),
        accuracy=_accuracy(known[each.id]),
        retention=tuple(rounded(share) for share in transfer.retention(mine, floor, best)),
        overhead=rounded(choice.overhead),
        tree=TreeFacts(choice.tree.nodes, choice.tree.max_depth, choice.tree.paths, choice.chosen),
        tokens_per_step=TokensPerStep(
            expected=rounded(choice.expected),
            simulated=simulated,
            common_tree=_simulated(heads, m, m.common.shallow(heads.spec.heads)),
        ),
        speedup=Speedup(
            predicted_here=rounded((choice.expected if simulated is None else simulated) / choice.overhead),
            predicted_at_1_2=None if simulated is None else rounded(simulated / GOOD_OVERHEAD),
        ),
    )
    ratio = None
    if all(each.id in block.runs for block in m.blocks):
        row = rows.with_timings(row, m, machine)
        ratio = bench.speedup(m.blocks, each.id, machine.clock, m.seed)
    if all(len(block.plain[0].tokens) < 2 for block in m.blocks):
        row = replace(row, absent_because="the model ended every answer with its first token, so nothing was decoded.")
    return replace(row, training=_training(each, ratio, m))


def _unlike_simulation(found: Sequence[Row], m: Measured) -> list[str]:
    """Check measured against simulated tokens per step; in float32 they are equal unless one of them is wrong."""
    said = []
    for row in found:
        measured, simulated = row.tokens_per_step.measured, row.tokens_per_step.simulated
        if measured and simulated and m.base.dtype.itemsize == 4 and abs(measured / simulated - 1) > SIMULATION_LIMIT:
            said.append(
                f"{row.id}: decoding brought {measured:.3f} tokens per step where the simulation says {simulated:.3f}"
            )
    return said


def _identity(m: Measured, known: simulation.Accuracy) -> Row:
    """Row of untrained heads on the same answers, by simulation alone: the reference for trained ones."""
    choice = m.reference.choice
    return Row(
        FLOOR,
        "identity",
        heads=replace(_heads(m.floor, m), parameters=0, bytes=0),
        accuracy=_accuracy(known),
        tokens_per_step=TokensPerStep(
            simulated=None if choice is None else _simulated(m.floor, m, choice.tree),
            common_tree=_simulated(m.floor, m, m.common),
        ),
    )


def _heads(heads: Heads, m: Measured) -> HeadFacts:
    spec = heads.spec
    tokens: list[int] = m.features["timed"].tokens.tolist()
    known = None if spec.keep is None else set(spec.keep)
    covered = 1.0 if known is None else None
    if known is not None and tokens:
        covered = sum(token in known for token in tokens) / len(tokens)
    return HeadFacts(
        kind=spec.kind,
        count=spec.heads,
        layers=spec.layers,
        conditioned=spec.conditioned,
        kept_vocab=m.base.vocab if spec.keep is None else len(spec.keep),
        vocab_coverage=rounded(covered),
        parameters=heads.trained_parameters(),
        bytes=heads.size_bytes(),
    )


def _accuracy(known: simulation.Accuracy) -> tuple[HeadAccuracy, ...]:
    return tuple(
        HeadAccuracy(head, rounded(shares[0]), rounded(sum(shares)), count)
        for head, (shares, count) in enumerate(zip(known.shares, known.positions, strict=True), start=1)
    )


def _top1(known: simulation.Accuracy) -> list[float]:
    return [shares[0] for shares in known.shares]


def _simulated(heads: Heads, m: Measured, tree: Tree) -> float | None:
    features = m.features["timed"]
    return rounded(simulation.simulate(heads, features, tree)) if features.lengths else None


def _training(each: transfer.HeadSet, ratio: bench.Ratio | None, m: Measured) -> Made:
    """Cost of making the heads, and the tokens after which it pays off at the measured speed."""
    known = Made(**{key: (each.training or {}).get(key) for key in COSTS})
    spent = [part for part in (known.generate_s, known.features_s, known.fit_s) if part is not None]
    speed = rows.plain_figures(m.blocks).tokens_per_s
    if ratio is None or ratio.value <= 1 or not speed or len(spent) < 3:
        return known
    saved_s = (1 - 1 / ratio.value) / speed
    return replace(known, break_even_tokens=round(over(sum(spent), saved_s) or 0))
