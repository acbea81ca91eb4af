"""Timing stage of a speed test: choice of candidates and answer lengths within the rest of the budget."""

from __future__ import annotations

import time
from collections.abc import Sequence

from evaluators.medusa.decoding import decode
from evaluators.medusa.decoding.runners import Runner
from evaluators.medusa.drafting.drafters import HeadDrafter, PromptLookup
from evaluators.medusa.drafting.heads import Heads
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.speed import baselines, bench, calibrate
from evaluators.medusa.speed.conclusions import LEAST_FOR_A_VERDICT
from evaluators.medusa.speed.rows import Scored
from evaluators.medusa.speed.run import Run
from evaluators.medusa.trees.tree import chain

# Shares of the budget at which timing must have ended, with and without other models to compare afterwards.
TIMED_BY = 0.92
FINISHED_BY = 0.97
WRITTEN_WITHIN = 0.2
JUDGED_WITHIN = 0.05  # texts that left plain decoding's, in float32
LEAST_TIMED_TOKENS = 16  # rather fewer questions than shorter answers
LOOKUP_QUESTIONS = 4
LOOKUP_TOKENS = 4
NATIVE_QUESTIONS = 3
PREFILL_STEPS = 3  # reading a prompt of ordinary length, in plain steps


def time_candidates(
    run: Run,
    base: Base,
    test: Sequence[bench.Question],
    scored: Sequence[Scored],
    cost: calibrate.CostCurve,
    runner: Runner,
) -> tuple[decode.Limits, list[bench.Block]]:
    """Time the heads made for this model, the best transferred ones, and prompt lookup if there is time.

    Answers are as long as lets enough questions for a verdict be asked, from 16 tokens on; then there are fewer
    questions, in the end one, whatever that takes. What is left of the budget has to last for the report, too.
    """
    worth = _worth(scored)
    candidates = [bench.Candidate(name, HeadDrafter(heads), choice.tree) for name, heads, choice in worth]
    share = TIMED_BY if any(each.set.model for each in scored) else FINISHED_BY
    writing_s = min(run.report.seconds["calibrate"], WRITTEN_WITHIN * run.options.budget_s)  # they do much the same
    ends = min(run.until(share), run.deadline - writing_s - JUDGED_WITHIN * run.options.budget_s)
    # Seconds that a token takes with each candidate, in plain steps.
    prices = [choice.overhead / max(choice.expected, 1.0) for _, _, choice in worth]
    most = decode.Limits(run.options.max_new_tokens, base.stop_ids)
    overheads = [1.0, *(choice.overhead for _, _, choice in worth)]
    slower = _slower(bench.warm_up(runner, candidates, test[0], most), [cost.plain_wall_s * each for each in overheads])
    lookup_price = cost.overhead(LOOKUP_TOKENS + 1)
    whole_s = slower * _question_s(run, cost, [*prices, lookup_price], most.max_new_tokens)
    if whole_s * min(LOOKUP_QUESTIONS, len(test)) < ends - time.monotonic():
        prices.append(lookup_price)
        candidates.append(bench.Candidate("prompt_lookup", PromptLookup(base.device), chain(LOOKUP_TOKENS)))
        bench.warm_up(runner, candidates[-1:], test[0], most)
    question_s = (ends - time.monotonic()) / min(LEAST_FOR_A_VERDICT, len(test))
    limits = decode.Limits(_affordable(run, cost, prices, question_s / slower), base.stop_ids)

    def next_turn(question: bench.Question, answer: Sequence[int]) -> bench.Question | None:
        return _next_turn(base, question, answer, limits.max_new_tokens) if run.options.turns > 1 else None

    schedule = bench.Schedule(run.options.repeats, next_turn, ends, run.named("bench"), warm=True)
    blocks = bench.run_blocks(runner, candidates, test, limits, schedule)
    return limits, blocks


def _worth(scored: Sequence[Scored]) -> list[tuple[str, Heads, calibrate.Choice]]:
    """Return the sets to be timed; the others only get a prediction."""
    able = [(each.set, each.set.heads, each.choice) for each in scored if each.set.heads and each.choice]
    moved = [each for each in able if each[0].origin != "fresh"]
    best = max(moved, key=lambda each: each[2].gain, default=None)
    return [(each[0].id, each[1], each[2]) for each in able if each[0].origin == "fresh" or each is best]


def _next_turn(base: Base, question: bench.Question, answer: Sequence[int], new_tokens: int) -> bench.Question | None:
    """Return the next turn of the prompt after the baseline's answer to this one; None after the last."""
    answers = (*question.answers, base.tokenizer.decode(list(answer), skip_special_tokens=True))
    if len(answers) >= len(question.prompt.turns):
        return None
    return bench.question(base, question.prompt, new_tokens, answers)


def _question_s(run: Run, cost: calibrate.CostCurve, prices: Sequence[float], tokens: int) -> float:
    """Seconds per question: baseline and every candidate twice, each with its prefill."""
    runs = 2 * run.options.repeats * run.options.turns
    return runs * cost.plain_wall_s * (PREFILL_STEPS * (1 + len(prices)) + tokens * (1 + sum(prices)))


def _slower(traces: Sequence[decode.Trace], promised_s: Sequence[float]) -> float:
    """Return the ratio of real steps to the fastest passes, from one trace each; well above 1 on a shared machine."""
    whole_s = sum(trace.steps * step_s for trace, step_s in zip(traces, promised_s, strict=True))
    return max(1.0, sum(trace.decode.wall_s for trace in traces) / whole_s) if whole_s else 1.0


def _affordable(run: Run, cost: calibrate.CostCurve, prices: Sequence[float], question_s: float) -> int:
    """Return the tokens that can be decoded in `question_s`, from sixteen up to the requested number."""
    reading_s = _question_s(run, cost, prices, 0)
    each_s = _question_s(run, cost, prices, 1) - reading_s
    most = run.options.max_new_tokens
    return max(min(LEAST_TIMED_TOKENS, most), min(most, int((question_s - reading_s) / each_s)))


def time_native(
    run: Run, base: Base, blocks: Sequence[bench.Block], limits: decode.Limits, runner: Runner
) -> list[baselines.Versus]:
    """Time transformers' own loop on the first questions, as far as the budget allows."""
    likely_s = 2.5 * max(bench.end_to_end_s(trace) for trace in blocks[0].plain)
    questions = [block.question for block in blocks[:NATIVE_QUESTIONS]]
    ends = run.deadline - JUDGED_WITHIN * run.options.budget_s
    if time.monotonic() + likely_s > ends:
        return []
    versus = baselines.against_native(base, questions, limits, runner=runner, deadline=ends)
    if (different := baselines.never_equal(versus)) is not None:
        run.warn(different)
    return versus
