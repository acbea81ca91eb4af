"""From what was measured to the rows of the speed report. No timing happens here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluators.medusa import bench, calibrate, data, report
from evaluators.medusa.adapters import Base
from evaluators.medusa.heads import Heads, identity_heads
from evaluators.medusa.train import Training
from evaluators.medusa.tree import greedy_tree

Row = dict[str, Any]
GOOD_OVERHEAD = 1.2


@dataclass(frozen=True, slots=True)
class Native:
    """transformers' own greedy `generate` on the first timed question, once, end to end."""

    tokens: Sequence[int]
    wall_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything a report is written from. `features` has the splits train, calibration and test."""

    base: Base
    heads: Heads
    training: Training
    features: Mapping[str, data.Features]
    cost: calibrate.CostCurve
    choice: calibrate.Choice
    blocks: Sequence[bench.Block]
    max_new_tokens: int
    train_prompts: int
    generate_s: float
    features_s: float
    seed: int
    native: Native | None = None


def write(into: Row, m: Measured) -> None:
    """Fill the report `into` with the plain baseline, the candidates, the verdict and what follows from it."""
    clock, machine_ok = _clock(into, m)
    questions = [block.question for block in m.blocks]
    into["suite"] |= {
        "questions": len(m.blocks),
        "max_new_tokens": m.max_new_tokens,
        "mean_context_tokens": round(
            sum(len(b.question.ids) + len(b.plain[0].tokens) / 2 for b in m.blocks) / max(len(questions), 1), 1
        ),
    }
    into["cost_curve"] = {
        "context_tokens": m.cost.context,
        "clock": m.cost.clock,
        "points": [
            {"n": n, "forward_ms": round(ms, 2), "ratio": round(ms / m.cost.points[0][1], 3)} for n, ms in m.cost.points
        ],
    }
    into["plain"] = _plain(m)
    fresh = _fresh(into, m, clock, machine_ok)
    into["candidates"] = [
        _none(m),
        _native(m),
        _prompt_lookup(into, m, clock, machine_ok),
        _identity(m),
        fresh,
    ]
    into["chosen"] = "fresh" if m.choice.speculate else "none"
    into["recommendation"] = f"speculate with {m.choice.tree.nodes} nodes" if m.choice.speculate else "do not speculate"
    into["verdict"] = fresh["speedup"]["verdict"]
    _flag_loops(into, m)


def _clock(into: Row, m: Measured) -> tuple[bench.ClockName, bool]:
    """The wall clock if equal work took equal time on it; else, the machine being shared, this process's CPU clock.

    The second value says whether equal work took equal time on the clock that is used.
    """
    clock: bench.ClockName = "wall"
    ratio = bench.a_a(m.blocks, clock, m.seed)
    if not bench.a_a_ok(ratio) and m.base.device.type == "cpu":
        clock = "cpu"
        ratio = bench.a_a(m.blocks, clock, m.seed)
    ok = bench.a_a_ok(ratio)
    into["aa"] = {"ratio": _value(ratio), "ci95": _ci(ratio), "ok": ok}
    return clock, ok


def _plain(m: Measured) -> Row:
    traces = [trace for block in m.blocks for trace in block.plain]
    tokens = bench.decoded(traces)
    wall, cpu = sum(t.decode.wall_s for t in traces), sum(t.decode.cpu_s for t in traces)
    prefill = sum(t.prefill.wall_s for t in traces)
    steps = sum(t.steps for t in traces)
    return {
        "tokens": tokens,
        "steps": steps,
        "wall_s": round(wall, 4),
        "cpu_s": round(cpu, 4),
        "tokens_per_s": _over(tokens, wall),
        "step_ms": _over(1000 * wall, steps),
        "prefill_ms": _over(1000 * prefill, len(traces)),
        "end_to_end_tokens_per_s": _over(sum(len(t.tokens) for t in traces), wall + prefill),
    }


def _none(m: Measured) -> Row:
    row = report.blank_row("none", "none")
    row["overhead"] = 1.0
    row["tokens_per_s"] = _plain(m)["tokens_per_s"]
    row["tree"] |= {"nodes": 1, "depth": 0, "paths": []}
    row["tokens_per_step"] |= {"expected": 1.0, "simulated": 1.0, "measured": 1.0}
    row["speedup"] |= {"wall": 1.0, "cpu": 1.0, "predicted_here": 1.0, "verdict": "same"}
    return row


def _native(m: Measured) -> Row:
    """Against plain decoding end to end, prefill included: a plain loop made slow would show here."""
    if m.native is None:
        return report.blank_row("native", "native", "there was no time left to run it.")
    row = report.blank_row("native", "native")
    plain = m.blocks[0].plain
    plain_s = sum(trace.prefill.wall_s + trace.decode.wall_s for trace in plain) / len(plain)
    equal = list(m.native.tokens) == plain[0].tokens
    row["tokens_per_s"] = _over(len(m.native.tokens), m.native.wall_s)
    row["tree"] |= {"nodes": 1, "depth": 0, "paths": []}
    row["tokens_per_step"]["measured"] = 1.0
    row["speedup"] |= {"wall": _over(plain_s, m.native.wall_s), "clock_used": "wall"}
    row["exact"] = {"prompts": 1, "equal": int(equal), "divergences": []}
    return row


def _prompt_lookup(into: Row, m: Measured, clock: bench.ClockName, machine_ok: bool) -> Row:
    if not all("prompt_lookup" in block.runs for block in m.blocks):
        return report.blank_row("prompt_lookup", "prompt_lookup", "the budget was too short to time it.")
    row = report.blank_row("prompt_lookup", "prompt_lookup")
    row["tree"] |= {"chosen": "common"}
    _timed(into, row, m, clock, machine_ok)
    return row


def _fresh(into: Row, m: Measured, clock: bench.ClockName, machine_ok: bool) -> Row:
    row = report.blank_row("fresh", "fresh")
    _timed(into, row, m, clock, machine_ok)
    row["heads"] = _heads(m)
    row["accuracy"] = _accuracy(m.heads, m.features["calibration"])
    row["tree"] = _tree(m)
    row["tokens_per_step"] |= {
        "expected": _round(m.choice.expected),
        "simulated": _simulated(m, m.heads),
        "common_tree": _common(m, m.heads),
    }
    row["speedup"]["predicted_here"] = _round(m.choice.gain)
    row["training"] = _training(m, bench.speedup(m.blocks, "fresh", clock, m.seed))
    if row["tokens_per_step"]["measured"] is None:
        row["absent_because"] = "the model ended every answer with its first token, so nothing was decoded."
    return row


def _timed(into: Row, row: Row, m: Measured, clock: bench.ClockName, machine_ok: bool) -> None:
    """What the blocks say about the candidate of this row: speed, rate, exactness, and whether the clocks agree."""
    name = row["id"]
    runs = [trace for block in m.blocks for trace in block.runs[name]]
    steps = sum(trace.steps for trace in runs)
    wall, cpu = bench.speedup(m.blocks, name, "wall", m.seed), bench.speedup(m.blocks, name, "cpu", m.seed)
    rate = bench.rate(m.blocks, name, m.seed)
    overhead, error = bench.identity_error(m.blocks, name)
    row |= {"overhead": _round(overhead), "identity_error": _round(error)}
    row["tokens_per_s"] = _over(bench.decoded(runs), sum(t.decode.wall_s for t in runs))
    row["step_ms"] = {
        "draft": _over(1000 * sum(t.draft_s for t in runs), steps),
        "forward": _over(1000 * sum(t.forward_s for t in runs), steps),
        "accept": _over(1000 * sum(t.accept_s for t in runs), steps),
    }
    row["tokens_per_step"] |= {"measured": _value(rate), "ci95": _ci(rate), "without_loops": _without_loops(m, name)}
    row["speedup"] |= {
        "wall": _value(wall),
        "wall_ci95": _ci(wall),
        "cpu": _value(cpu),
        "cpu_ci95": _ci(cpu),
        "clock_used": clock,
        "predicted_at_1_2": None if rate is None else _round(rate.value / GOOD_OVERHEAD),
        "verdict": bench.verdict(wall if clock == "wall" else cpu, machine_ok),
    }
    row["exact"] = _exact(into, m, name)
    row["categories"] = _categories(m, name, clock)
    if bench.clocks_disagree(m.blocks, name):
        into["refusal"] = (
            f"the clocks disagree by {error:.1%}: speedup is not tokens per step over overhead, so no speed is stated."
        )


def _identity(m: Measured) -> Row:
    """Untrained heads on the same answers: what the trained ones are held against, by arithmetic alone."""
    row = report.blank_row("identity", "identity")
    heads = identity_heads(m.heads.spec, m.base)
    row["heads"] = _heads(m) | {"parameters": 0, "bytes": 0}
    row["accuracy"] = _accuracy(heads, m.features["calibration"])
    row["tokens_per_step"] |= {"simulated": _simulated(m, heads), "common_tree": _common(m, heads)}
    return row


def _heads(m: Measured) -> Row:
    spec = m.heads.spec
    kept = m.base.vocab if spec.keep is None else len(spec.keep)
    tokens: list[int] = m.features["test"].tokens.tolist()
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
        "vocab_coverage": _round(covered),
        "parameters": m.heads.trained_parameters(),
        "bytes": m.heads.size_bytes(),
    }


def _accuracy(heads: Heads, features: data.Features) -> list[Row]:
    found = calibrate.accuracy(heads, features, 5)
    return [
        {"head": head, "top1": _round(shares[0]), "top5": _round(sum(shares)), "positions": count}
        for head, (shares, count) in enumerate(zip(found.shares, found.positions, strict=True), start=1)
    ]


def _tree(m: Measured) -> Row:
    tree = m.choice.tree
    return {
        "nodes": tree.nodes,
        "depth": tree.max_depth,
        "paths": [list(path) for path in tree.paths],
        "chosen": "cost",
    }


def _simulated(m: Measured, heads: Heads) -> float | None:
    features = m.features["test"]
    return _round(calibrate.simulate(heads, features, m.choice.tree)) if features.lengths else None


def _common(m: Measured, heads: Heads) -> float | None:
    """Tokens per step on the test answers with 8 nodes, each set of heads with its own best tree of that size."""
    if not m.features["test"].lengths:
        return None
    tree = greedy_tree(calibrate.accuracy(heads, m.features["calibration"]).shares, 8)
    return _round(calibrate.simulate(heads, m.features["test"], tree))


def _without_loops(m: Measured, name: str) -> float | None:
    straight = [block for block in m.blocks if not data.loops(block.plain[0].tokens)]
    ratio = bench.rate(straight, name, m.seed)
    return _value(ratio)


def _flag_loops(into: Row, m: Measured) -> None:
    looping = [block.question.prompt.id for block in m.blocks if data.loops(block.plain[0].tokens)]
    into["suite"]["looping"] = len(looping)
    if looping:
        into["warnings"].append(
            f"{len(looping)} of {len(m.blocks)} answers repeat themselves (fewer than half of their 4-grams differ), "
            f"which inflates tokens per step: {', '.join(looping)}"
        )


def _exact(into: Row, m: Measured, name: str) -> Row:
    found = bench.divergences(m.base, m.blocks, name)
    wrong = [divergence for divergence in found if not divergence.tie]
    if wrong:
        into["refusal"] = (
            f"speculating changed the greedy text of {len(wrong)} of {len(m.blocks)} questions without a tie."
        )
    return {
        "prompts": len(m.blocks),
        "equal": len(m.blocks) - len(found),
        "divergences": [
            {"prompt": d.prompt, "index": d.index, "gap": round(d.gap, 6), "tie": d.tie} for d in found
        ],
    }  # fmt: skip


def _categories(m: Measured, candidate: str, clock: bench.ClockName) -> list[Row]:
    names = list(dict.fromkeys(block.question.prompt.category for block in m.blocks))
    rows = []
    for name in names:
        blocks = [block for block in m.blocks if block.question.prompt.category == name]
        rows.append(
            {
                "name": name,
                "prompts": len(blocks),
                "tokens_per_step": _value(bench.rate(blocks, candidate, m.seed)),
                "speedup": _value(bench.speedup(blocks, candidate, clock, m.seed)),
            }
        )
    return rows


def _training(m: Measured, ratio: bench.Ratio | None) -> Row:
    spent_s = m.generate_s + m.features_s + m.training.seconds
    speed = _plain(m)["tokens_per_s"]
    saved_s = (1 - 1 / ratio.value) / speed if ratio is not None and ratio.value > 1 and speed else None
    return {
        "prompts": m.train_prompts,
        "tokens": len(m.features["train"].tokens),
        "positions": m.training.positions,
        "generate_s": round(m.generate_s, 2),
        "features_s": round(m.features_s, 2),
        "fit_s": round(m.training.seconds, 2),
        "steps": m.training.steps,
        "seed": m.training.seed,
        "break_even_tokens": None if saved_s is None else round(spent_s / saved_s),
    }


def _value(ratio: bench.Ratio | None) -> float | None:
    return None if ratio is None else round(ratio.value, 4)


def _ci(ratio: bench.Ratio | None) -> list[float] | None:
    return None if ratio is None or ratio.interval is None else [round(bound, 4) for bound in ratio.interval]


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _over(above: float, below: float) -> float | None:
    return round(above / below, 3) if below else None
