"""Conclusions of the speed test: refusal, verdict, recommendation, choice of heads, and the summary in words.

The rows of a report are measurements; `refusal`, `verdict`, `recommendation`, `chosen` and `transfer` are derived from
them here, and so is the set of heads that a published merge carries. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from evaluators.medusa.speed.report import Environment, Exact, Interval, Report, Row, Training, Verdict

LEAST_FOR_A_VERDICT = 8  # questions: a bootstrap interval over fewer is too narrow
# below these, heads have learnt too little for their figures to mean anything
LEAST_TRAINING_TOKENS, LEAST_STEPS = 1000, 20
DO_NOT = "do not speculate"
VERDICTS = {
    "faster": "decoding with them is faster here",
    "slower": "decoding with them is slower here",
    "same": "the difference to baseline decoding is within the noise",
    "inconclusive": "the machine was too unsteady, or the questions too few, for a verdict",
}


@dataclass(frozen=True, slots=True)
class Facts:
    """Input of the conclusions.

    `reference` and `best` are the ids of the heads trained for the model and of those with the highest predicted gain;
    `promised` means that this gain was enough to speculate. `slow_baseline` means that baseline decoding was clearly
    slower than transformers' `generate` on every question. `clock_errors` has the identity errors of the candidates
    whose clocks inside and around the steps disagree. `common_nodes` is the size of the tree common to all sets.
    """

    candidates: Sequence[Row]
    reference: str
    best: str
    promised: bool
    slow_baseline: bool
    clock_errors: Mapping[str, float]
    common_nodes: int


@dataclass(frozen=True, slots=True)
class Conclusions:
    """Fields of the same names in the report."""

    refusal: str | None = None
    verdict: Verdict | None = None
    recommendation: str | None = None
    chosen: str = "none"
    transfer: str | None = None


def drawn(facts: Facts) -> Conclusions:
    """Draw the conclusions. A refused report recommends nothing; measured figures override predicted ones."""
    rows = {row.id: row for row in facts.candidates}
    transfer = transfer_sentence(facts.candidates, facts.common_nodes)
    reason = _refusal(facts, rows)
    if reason is not None:
        return Conclusions(refusal=reason, transfer=transfer)
    ratio = rows[facts.best].speedup.ratio
    wins = facts.promised and ratio is not None and ratio >= 1
    return Conclusions(
        verdict=rows[facts.best if facts.promised else facts.reference].speedup.verdict,
        recommendation=f"speculate with {rows[facts.best].tree.nodes} nodes" if wins else DO_NOT,
        chosen=facts.best if wins else "none",
        transfer=transfer,
    )


def verdict(interval: Interval | None, questions: int, machine_ok: bool) -> Verdict:
    """Return `faster` only if the whole interval is above 1; `inconclusive` for fewer than eight questions or an
    unsteady machine."""
    if interval is None or not machine_ok or questions < LEAST_FOR_A_VERDICT:
        return "inconclusive"
    low, high = interval
    return "faster" if low > 1 else "slower" if high < 1 else "same"


def carried(report: Report, able: Collection[str]) -> Row | None:
    """Return the row of `able` whose heads a published merge carries: the chosen ones, else those trained for it.

    None if the report is refused or the heads learnt nothing.
    """
    if report.refusal:
        return None
    name = report.chosen if report.chosen in able else "fresh"
    row = next((row for row in report.candidates if row.id == name), None)
    # The steps of heads that were merged, not trained, are None.
    if row is None or row.absent_because is not None or row.training.steps == 0:
        return None
    return row


def hardly_trained(steps: int | None, tokens: int | None) -> bool:
    """Return True if heads had too little text or time for their figures to mean anything."""
    return steps is not None and (steps < LEAST_STEPS or (tokens is not None and tokens < LEAST_TRAINING_TOKENS))


def _refusal(facts: Facts, rows: Mapping[str, Row]) -> str | None:
    """Return the gravest reason against stating a speed, or None."""
    for row in rows.values():
        wrong = {each.prompt for each in row.exact.divergences if each.tie is False}
        if wrong:
            return (
                f"speculating changed the greedy text of {len(wrong)} of {row.exact.prompts} questions, and "
                "rounding does not explain it."
            )
    if facts.slow_baseline and (over_native := rows["native"].speedup.ratio):
        return (
            f"baseline decoding ran at {1 / over_native:.2f} x the speed of transformers' own `generate` here, and a "
            "speedup over a slow baseline proves nothing."
        )
    for error in facts.clock_errors.values():
        return (
            f"the clocks disagree by {error:.1%}: speedup is not tokens per step over overhead, so no speed is stated."
        )
    return None


def transfer_sentence(candidates: Sequence[Row], nodes: int) -> str | None:
    """Sentence on the transfer test: tokens per step of every kind of heads with the same tree."""
    at = {row.id: row.tokens_per_step.common_tree for row in candidates}
    parents = [rate for name, rate in at.items() if name.startswith("parent:") and rate is not None]
    own = next((row.tokens_per_step.common_tree for row in candidates if row.origin == "fresh"), None)
    if not parents or own is None:
        return None
    span = f"{min(parents):.2f}" if len(parents) == 1 else f"{min(parents):.2f} to {max(parents):.2f}"
    merged = "" if at.get("merged") is None else f", those heads merged by the same recipe {at['merged']:.2f}"
    tuned = "" if at.get("merged_tuned") is None else f" ({at['merged_tuned']:.2f} after a short fine-tune)"
    return (
        f"With one tree of {nodes} nodes for all, its parents' heads as they are bring {span} tokens per "
        f"step{merged}{tuned}, heads made for this model {own:.2f}."
    )


def sentence(report: Report) -> str:
    """Summarise the report in one paragraph. A speedup below 1 is stated first."""
    if report.refusal:
        return f"Decode speed with Medusa heads was not measured: {report.refusal}"
    fresh = [row for row in report.candidates if row.origin == "fresh"]
    timed = [row for row in fresh if row.tokens_per_step.measured is not None]
    row = next((row for row in timed if row.id == report.chosen), timed[0] if timed else None)
    if row is None or row.speedup.ratio is None:
        reason = next((row.absent_because for row in fresh if row.absent_because), None)
        reason = reason or "the model stopped at once on every prompt."
        return f"Decode speed with Medusa heads was not measured: {reason}"
    others = f" These are the {row.label}, of {len(timed)} sets." if len(timed) > 1 else ""
    interval, looping = row.speedup.interval, report.suite.looping
    unit = "x the speed of baseline decoding" + (" in CPU time" if row.speedup.clock_used == "cpu" else "")
    span = f"95 % interval {interval[0]:.2f} to {interval[1]:.2f}" if interval else "from one question, no interval"
    inflated = (
        f" {looping} of {row.exact.prompts} answers repeat themselves, which inflates this figure." if looping else ""
    )
    advice = " Do not speculate here." if report.recommendation == DO_NOT else ""
    return (
        f"{_trained(row.training)} bring {row.tokens_per_step.measured:.2f} tokens per step; "
        f"on {_where(report.environment)} decoding with them runs at {row.speedup.ratio:.2f} {unit} ({span}): "
        f"{VERDICTS[row.speedup.verdict or 'inconclusive']}."
        f"{others}{inflated}{advice} {_exactness(row.exact, report.model.dtype)}"
        f"{' ' + report.transfer if report.transfer else ''}"
    )


def _exactness(exact: Exact, dtype: str | None) -> str:
    text = f"Greedy text was equal to baseline decoding on {exact.equal} of {exact.prompts} questions"
    ties, unchecked = ({each.prompt for each in exact.divergences if each.tie is tie} for tie in (True, None))
    ties -= unchecked  # one of its runs was not checked
    if ties:
        text += f"; on {len(ties)} it differs where rounding in {dtype} decides between two tokens"
    if unchecked:
        text += f"; on {len(unchecked)} it differs, and whether rounding in {dtype} explains that was not checked"
    return f"{text}."


def _trained(training: Training) -> str:
    if training.steps is None:
        return "The Medusa heads that were given"
    if not training.steps:
        return "Untrained Medusa heads (there was no time, or no text, to train them)"
    seconds = sum(each or 0.0 for each in (training.generate_s, training.features_s, training.fit_s))
    learnt = f"trained in {seconds:.0f} s on {training.tokens} tokens of the model's own text"
    if hardly_trained(training.steps, training.tokens):
        steps = "step" if training.steps == 1 else "steps"
        return f"Medusa heads that are hardly trained ({training.steps} {steps}; {learnt}; give it more time)"
    return f"Medusa heads {learnt}"


def _where(machine: Environment) -> str:
    if machine.device != "cpu":
        return str(machine.device)
    return f"this CPU ({machine.threads} thread{'s' if machine.threads != 1 else ''})"
