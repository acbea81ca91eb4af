"""The timing stage of a measurement: which candidates, how many tokens, within what is left of the budget."""

from __future__ import annotations

import time
from collections.abc import Sequence

from evaluators.medusa import baselines, bench, calibrate, decode, suite
from evaluators.medusa.adapters import Base
from evaluators.medusa.drafters import HeadDrafter, PromptLookup
from evaluators.medusa.heads import Heads
from evaluators.medusa.measurement import Run
from evaluators.medusa.rows import Scored
from evaluators.medusa.runners import EagerRunner
from evaluators.medusa.tree import chain

# Shares of the budget at which timing must have ended, with and without other models to compare afterwards.
TIMED_BY = 0.92
FINISHED_BY = 0.97
LEAST_TIMED_TOKENS = 12
LEAST_QUESTIONS = 4
LOOKUP_TOKENS = 4
NATIVE_QUESTIONS = 3


def timed(
    run: Run,
    base: Base,
    test: Sequence[bench.Question],
    scored: Sequence[Scored],
    cost: calibrate.CostCurve,
    runner: EagerRunner,
) -> tuple[decode.Limits, list[bench.Block]]:
    """Time the heads made for this model, the best transferred ones, and prompt lookup if there is time."""
    worth = _worth(scored)
    candidates = [bench.Candidate(name, HeadDrafter(heads), choice.tree) for name, heads, choice in worth]
    ends = run.until(TIMED_BY if any(each.set.model for each in scored) else FINISHED_BY)
    limits = _limits(run, base, len(test), cost, [choice for _, _, choice in worth], ends)
    # Each token of two more runs a question priced as a wide step: only if all of it surely fits.
    runs = (2 + 2 * len(candidates) + 2) * run.asked.repeats * run.asked.turns
    if ends - time.monotonic() > len(test) * runs * cost.plain_wall_s * (3 + 2 * limits.max_new_tokens):
        candidates.append(bench.Candidate("prompt_lookup", PromptLookup(base.device), chain(LOOKUP_TOKENS)))

    def next_turn(question: bench.Question, answer: Sequence[int]) -> bench.Question | None:
        return _next_turn(base, question, answer) if run.asked.turns > 1 else None

    blocks = bench.run_blocks(
        base, candidates, test, limits, runner=runner, repeats=run.asked.repeats, next_turn=next_turn, deadline=ends,
        progress=run.named("bench"),
    )  # fmt: skip
    return limits, blocks


def _worth(scored: Sequence[Scored]) -> list[tuple[str, Heads, calibrate.Choice]]:
    """The sets that are timed; the others get a prediction."""
    able = [(each.set, each.set.heads, each.choice) for each in scored if each.set.heads and each.choice]
    moved = [each for each in able if each[0].origin != "fresh"]
    best = max(moved, key=lambda each: each[2].gain, default=None)
    return [(each[0].id, each[1], each[2]) for each in able if each[0].origin == "fresh" or each is best]


def _next_turn(base: Base, question: bench.Question, answer: Sequence[int]) -> bench.Question | None:
    """The next turn of the prompt after the plain answer to this one; None where there is none or it has no room."""
    turns = question.prompt.turns
    answers = (*question.answers, base.tokenizer.decode(list(answer), skip_special_tokens=True))
    if len(answers) >= len(turns):
        return None
    ids = suite.encode(base, turns[len(answers)], list(zip(turns, answers, strict=False)))
    return bench.Question(question.prompt, tuple(ids), answers)


def _limits(
    run: Run, base: Base, questions: int, cost: calibrate.CostCurve, choices: Sequence[calibrate.Choice], ends: float
) -> decode.Limits:
    """As many tokens a question as let a handful of questions fit into what is left of the budget."""
    plain_s, asked = cost.plain_wall_s, run.asked
    runs = asked.repeats * asked.turns
    per_token_s = runs * 2 * plain_s * (1 + sum(each.overhead / max(each.expected, 1.0) for each in choices))
    prefill_s = runs * (2 + 2 * len(choices)) * 3 * plain_s
    affordable = int(((ends - time.monotonic()) / min(LEAST_QUESTIONS, questions) - prefill_s) / per_token_s)
    tokens = max(min(LEAST_TIMED_TOKENS, asked.max_new_tokens), min(asked.max_new_tokens, affordable))
    return decode.Limits(tokens, base.stop_ids)


def native(
    run: Run, base: Base, blocks: Sequence[bench.Block], limits: decode.Limits, runner: EagerRunner
) -> list[baselines.Versus]:
    """transformers' own loop on the first questions, as far as it still fits into the budget."""
    likely_s = 2.5 * max(bench.end_to_end_s(trace) for trace in blocks[0].plain)
    questions = [block.question for block in blocks[:NATIVE_QUESTIONS]]
    ends = run.started + run.budget_s
    if time.monotonic() + likely_s > ends:
        return []
    return baselines.against_native(base, questions, limits, runner=runner, deadline=ends)
