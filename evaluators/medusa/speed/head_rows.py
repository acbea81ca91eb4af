"""The rows of sets of heads in the speed report. No timing happens here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from evaluators.medusa.drafting.heads import Heads
from evaluators.medusa.speed import baselines, bench, conclusions, report, rows, transfer
from evaluators.medusa.speed.rows import GOOD_OVERHEAD, Machine, Measured, Row, Scored, over, rounded
from evaluators.medusa.training import simulation

SIMULATION_LIMIT = 0.01
FLOOR = "identity"  # the row of untrained heads
Known = Mapping[str, simulation.Accuracy]


def write(into: Row, m: Measured) -> None:
    """Fill the report `into` with the baselines, all candidates and what follows from them."""
    others, machine = rows.baseline_rows(into, m)
    heads = {FLOOR: m.floor} | {each.set.id: each.set.heads for each in m.scored if each.set.heads is not None}
    known = {name: simulation.accuracy(each, m.features["held_out"], 5) for name, each in heads.items()}
    found = [_row(into, each, m, machine, known) for each in m.scored]
    into["candidates"] = [*others, _identity(m, known[FLOOR]), *found]
    into["warnings"] += transfer.unequal_training([each.set for each in m.scored], m.reference.set)
    into |= asdict(conclusions.drawn(_facts(into["candidates"], m, machine)))


def _facts(candidates: Sequence[Row], m: Measured, machine: Machine) -> conclusions.Facts:
    best, choice = m.best, m.best.choice
    assert choice is not None  # the reference always has heads, so the best of all has
    timed = dict.fromkeys(name for block in m.blocks for name in block.runs)
    return conclusions.Facts(
        candidates,
        reference=m.reference.set.id,
        best=best.set.id,
        promised=choice.speculate,
        slow_plain=baselines.plain_is_slow(m.versus, machine.clock),
        torn=[name for name in timed if bench.clocks_disagree(m.blocks, name)],
        common_nodes=transfer.COMMON_NODES,
    )


def _row(into: Row, scored: Scored, m: Measured, machine: Machine, known: Known) -> Row:
    each = scored.set
    row = report.blank_row(each.id, each.origin, each.absent_because)
    row["source"] = each.source
    row["hidden_cosine"] = rounded(scored.cosine)
    heads, choice = each.heads, scored.choice
    if heads is None or choice is None:
        return row
    row["heads"] = _heads(heads, m)
    row["accuracy"] = _accuracy(known[each.id])
    mine, floor, best = (_top1(known[name]) for name in (each.id, FLOOR, m.reference.set.id))
    row["retention"] = [rounded(share) for share in transfer.retention(mine, floor, best)]
    row["tree"] = {
        "nodes": choice.tree.nodes,
        "depth": choice.tree.max_depth,
        "paths": [list(path) for path in choice.tree.paths],
        "chosen": choice.chosen,
    }
    simulated = _simulated(heads, m, choice.tree)
    row["tokens_per_step"] |= {
        "expected": rounded(choice.expected),
        "simulated": simulated,
        "common_tree": _simulated(heads, m, m.common.shallow(heads.spec.heads)),
    }
    row["speedup"]["predicted_here"] = rounded((choice.expected if simulated is None else simulated) / choice.overhead)
    if all(each.id in block.runs for block in m.blocks):
        rows.timed(row, m, machine)
        _compare_with_simulation(into, row, m)
    else:
        row["overhead"] = rounded(choice.overhead)
        row["speedup"]["predicted_at_1_2"] = None if simulated is None else rounded(simulated / GOOD_OVERHEAD)
    row["training"] |= _training(
        each, bench.speedup(m.blocks, each.id, machine.clock, m.seed) if _was_timed(row) else None, m
    )
    if all(len(block.plain[0].tokens) < 2 for block in m.blocks):
        row["absent_because"] = "the model ended every answer with its first token, so nothing was decoded."
    return row


def _was_timed(row: Row) -> bool:
    return row["speedup"]["clock_used"] is not None


def _compare_with_simulation(into: Row, row: Row, m: Measured) -> None:
    """In float32 decoding does what the arithmetic on the same text says, or one of the two is wrong."""
    measured, simulated = row["tokens_per_step"]["measured"], row["tokens_per_step"]["simulated"]
    if measured and simulated and m.base.dtype.itemsize == 4 and abs(measured / simulated - 1) > SIMULATION_LIMIT:
        into["warnings"].append(
            f"{row['id']}: decoding brought {measured:.3f} tokens per step where the simulation says {simulated:.3f}"
        )


def _identity(m: Measured, known: simulation.Accuracy) -> Row:
    """Untrained heads on the same answers: what the trained ones are held against, by arithmetic alone."""
    row = report.blank_row(FLOOR, "identity")
    row["heads"] = _heads(m.floor, m) | {"parameters": 0, "bytes": 0}
    row["accuracy"] = _accuracy(known)
    choice = m.reference.choice
    row["tokens_per_step"] |= {
        "simulated": None if choice is None else _simulated(m.floor, m, choice.tree),
        "common_tree": _simulated(m.floor, m, m.common),
    }
    return row


def _heads(heads: Heads, m: Measured) -> Row:
    spec = heads.spec
    kept = m.base.vocab if spec.keep is None else len(spec.keep)
    tokens: list[int] = m.features["timed"].tokens.tolist()
    known = None if spec.keep is None else set(spec.keep)
    covered = 1.0 if known is None else None
    if known is not None and tokens:
        covered = sum(token in known for token in tokens) / len(tokens)
    return {
        "kind": spec.kind,
        "count": spec.heads,
        "layers": spec.layers,
        "conditioned": spec.conditioned,
        "kept_vocab": kept,
        "vocab_coverage": rounded(covered),
        "parameters": heads.trained_parameters(),
        "bytes": heads.size_bytes(),
    }


def _accuracy(known: simulation.Accuracy) -> list[Row]:
    return [
        {"head": head, "top1": rounded(shares[0]), "top5": rounded(sum(shares)), "positions": count}
        for head, (shares, count) in enumerate(zip(known.shares, known.positions, strict=True), start=1)
    ]


def _top1(known: simulation.Accuracy) -> list[float]:
    return [shares[0] for shares in known.shares]


def _simulated(heads: Heads, m: Measured, tree: Any) -> float | None:
    features = m.features["timed"]
    return rounded(simulation.simulate(heads, features, tree)) if features.lengths else None


def _training(each: transfer.HeadSet, ratio: bench.Ratio | None, m: Measured) -> Row:
    """What it cost to make the heads, and after how many tokens that is won back at the measured speed."""
    known = {key: (each.training or {}).get(key) for key in report.TRAINING}
    spent: list[Any] = [known[key] for key in ("generate_s", "features_s", "fit_s")]
    speed = rows.plain_figures(m.blocks)["tokens_per_s"]
    if ratio is None or ratio.value <= 1 or not speed or any(part is None for part in spent):
        return known
    saved_s = (1 - 1 / ratio.value) / speed
    return known | {"break_even_tokens": round(over(sum(spent), saved_s) or 0)}
