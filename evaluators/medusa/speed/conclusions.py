"""Conclusions of the speed test: refusal, verdict, recommendation, choice. The only place where they are drawn.

Rows and blocks are facts; the report's `refusal`, `verdict`, `recommendation`, `chosen` and `transfer` are what this
module makes of them, and so is the set of heads that a merge carries away.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluators.medusa.speed.document import Interval, Row, Verdict

LEAST_FOR_A_VERDICT = 8  # questions: a bootstrap over fewer is too narrow (equal methods were called faster too often)
# less text, or fewer steps, than heads have learnt anything from
LEAST_LEARNT_TOKENS, LEAST_STEPS = 1000, 20
DO_NOT = "do not speculate"


@dataclass(frozen=True, slots=True)
class Facts:
    """Input of the conclusions. `candidates` are the rows of the report.

    `reference` and `best` are the ids of the heads made for the model and of those whose tree promised most on the
    calibration text; `promised` says that this was enough to speculate. `slow_plain` says that the plain loop took
    clearly longer than transformers' own on every question, `torn` whose clocks inside and around the steps disagree.
    """

    candidates: Sequence[Row]
    reference: str
    best: str
    promised: bool
    slow_plain: bool
    torn: Collection[str]
    common_nodes: int


@dataclass(frozen=True, slots=True)
class Conclusions:
    """Keys of the same names in the report."""

    refusal: str | None = None
    verdict: Verdict | None = None
    recommendation: str | None = None
    chosen: str = "none"
    transfer: str | None = None


def drawn(facts: Facts) -> Conclusions:
    """Draw the conclusions. A refused report recommends nothing; measured figures override predicted ones."""
    rows = {row.id: row for row in facts.candidates}
    said = transfer_sentence(facts.candidates, facts.common_nodes)
    reason = _refusal(facts, rows)
    if reason is not None:
        return Conclusions(refusal=reason, transfer=said)
    wins = facts.promised and _no_slower(rows[facts.best])
    judged = rows[facts.best if facts.promised else facts.reference]
    return Conclusions(
        verdict=judged.speedup.verdict,
        recommendation=f"speculate with {rows[facts.best].tree.nodes} nodes" if wins else DO_NOT,
        chosen=facts.best if wins else "none",
        transfer=said,
    )


def verdict(interval: Interval | None, questions: int, machine_ok: bool) -> Verdict:
    """Return `faster` only if the whole interval is above 1; `inconclusive` for fewer than eight questions or an
    unsteady machine."""
    if interval is None or not machine_ok or questions < LEAST_FOR_A_VERDICT:
        return "inconclusive"
    low, high = interval
    return "faster" if low > 1 else "slower" if high < 1 else "same"


def carried(report: Mapping[str, Any], able: Collection[str]) -> str | None:
    """Return the row of `able` whose heads a merge carries: the fastest ones, else those made for it.

    None where the report is refused, or where they learnt nothing.
    """
    if report.get("refusal"):
        return None
    name = report["chosen"] if report["chosen"] in able else "fresh"
    row = next((row for row in report["candidates"] if row["id"] == name), None)
    # The steps of heads that were merged, not trained, are null.
    if row is None or row["absent_because"] is not None or row["training"]["steps"] == 0:
        return None
    return str(name)


def hardly_trained(training: Mapping[str, Any]) -> bool:
    """Return True if heads had too little text or time for their figures to mean anything."""
    steps, tokens = training["steps"], training["tokens"]
    return steps is not None and (steps < LEAST_STEPS or (tokens is not None and tokens < LEAST_LEARNT_TOKENS))


def _refusal(facts: Facts, rows: Mapping[str, Row]) -> str | None:
    """Return the gravest reason against stating a speed, or None."""
    for row in rows.values():
        wrong = {each.prompt for each in row.exact.divergences if each.tie is False}
        if wrong:
            return (
                f"speculating changed the greedy text of {len(wrong)} of {row.exact.prompts} questions, and "
                "rounding does not explain it."
            )
    if facts.slow_plain and (over_native := rows["native"].speedup.counting):
        return (
            f"baseline decoding ran at {1 / over_native:.2f} x the speed of transformers' own `generate` here, and a "
            "speedup over a slow baseline proves nothing."
        )
    for name in facts.torn:
        return (
            f"the clocks disagree by {rows[name].identity_error:.1%}: speedup is not tokens per step over overhead, so "
            "no speed is stated."
        )
    return None


def _no_slower(row: Row) -> bool:
    """Return True if the candidate was timed and was not slower, even without enough questions for a verdict."""
    ratio = row.speedup.counting
    return ratio is not None and ratio >= 1


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
