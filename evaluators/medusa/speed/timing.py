"""Timing stage of a speed test: choice of candidates and answer lengths within the rest of the budget."""

from __future__ import annotations

import time
from collections.abc import Sequence

from evaluators.medusa.decoding import decode
from evaluators.medusa.decoding.runners import Runner
from evaluators.medusa.drafting.drafters import HeadDrafter, PromptLookup
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.speed import bench
from evaluators.medusa.speed.conclusions import LEAST_FOR_A_VERDICT
from evaluators.medusa.speed.run import Run
from evaluators.medusa.speed.transfer import HeadSet
from evaluators.medusa.trees.tree import chain

# Shares of the budget: for writing the report, and for checking divergences in float32.
WRITTEN_WITHIN = 0.2
CHECKED_WITHIN = 0.05
LEAST_TIMED_TOKENS = 16  # below this, questions are dropped instead
LOOKUP_QUESTIONS = 4
LOOKUP_TOKENS = 4
NATIVE_QUESTIONS = 3


def time_candidates(
    run: Run, base: Base, test: Sequence[bench.Question], sets: Sequence[HeadSet], runner: Runner
) -> tuple[decode.Limits, list[bench.Block]]:
    """Time the heads trained for this model, the best transferred ones, and prompt lookup if there is time.

    A short block measures the speed here. Answers are as long as the budget allows for the questions of a verdict, but
    at least 16 tokens; no block starts that would not end within the budget, except the first.
    """
    options = run.options
    writing_s = min(run.report.seconds["calibrate"], WRITTEN_WITHIN * options.budget_s)  # it simulates as much
    ends = run.deadline - writing_s - CHECKED_WITHIN * options.budget_s
    candidates = _candidates(sets)
    lookup = bench.Candidate("prompt_lookup", PromptLookup(base.device), chain(LOOKUP_TOKENS))
    most = decode.Limits(options.max_new_tokens, base.stop_ids)
    bench.warm_up(runner, [*candidates, lookup], test[0], most)
    traces = bench.warm_up(runner, [*candidates, lookup], test[0], most)
    runs = 2 * options.repeats * options.turns
    if runs * _seconds(traces, most.max_new_tokens) * min(LOOKUP_QUESTIONS, len(test)) < ends - time.monotonic():
        candidates.append(lookup)
    else:
        traces.pop()
    question_s = (ends - time.monotonic()) / min(LEAST_FOR_A_VERDICT, len(test)) / runs
    limits = decode.Limits(_affordable(traces, question_s, most.max_new_tokens), base.stop_ids)

    def next_turn(question: bench.Question, answer: Sequence[int]) -> bench.Question | None:
        return _next_turn(base, question, answer, limits.max_new_tokens) if options.turns > 1 else None

    schedule = bench.Schedule(options.repeats, next_turn, ends, run.named("bench"), warm=True)
    return limits, bench.run_blocks(runner, candidates, test, limits, schedule)


def time_native(
    run: Run, base: Base, blocks: Sequence[bench.Block], limits: decode.Limits, runner: Runner
) -> list[bench.Versus]:
    """Time transformers' `generate` on the first questions, as far as the budget allows."""
    likely_s = 2.5 * max(bench.end_to_end_s(trace) for trace in blocks[0].plain)
    ends = run.deadline - CHECKED_WITHIN * run.options.budget_s
    if time.monotonic() + likely_s > ends:
        return []
    questions = [block.question for block in blocks[:NATIVE_QUESTIONS]]
    versus = bench.against_native(base, questions, limits, runner=runner, deadline=ends)
    if (different := bench.never_equal(versus)) is not None:
        run.warn(different)
    return versus


def _candidates(sets: Sequence[HeadSet]) -> list[bench.Candidate]:
    """Return the sets to be timed; the others only get a prediction."""
    able = [(each, each.heads, each.choice) for each in sets if each.heads is not None and each.choice is not None]
    best = max((each for each in able if each[0].origin != "fresh"), key=lambda each: each[2].gain, default=None)
    timed = [each for each in able if each[0].origin == "fresh" or each is best]
    return [bench.Candidate(each.id, HeadDrafter(heads), choice.tree) for each, heads, choice in timed]


def _next_turn(base: Base, question: bench.Question, answer: Sequence[int], new_tokens: int) -> bench.Question | None:
    """Return the next turn of the prompt after the baseline's answer to this one; None after the last."""
    answers = (*question.answers, base.tokenizer.decode(list(answer), skip_special_tokens=True))
    if len(answers) >= len(question.prompt.turns):
        return None
    return bench.question(base, question.prompt, new_tokens, answers)


def _seconds(traces: Sequence[decode.Trace], tokens: int) -> float:
    """Seconds of answers of so many tokens at the speed of these traces, prefill included."""
    return sum(trace.prefill.wall_s + tokens * trace.decode.wall_s / max(1, len(trace.tokens) - 1) for trace in traces)


def _affordable(traces: Sequence[decode.Trace], question_s: float, most: int) -> int:
    """Return the length of answers that fit into `question_s`, from sixteen tokens up to `most`."""
    reading_s = _seconds(traces, 0)
    token_s = _seconds(traces, 1) - reading_s
    fitting = int((question_s - reading_s) / token_s) if token_s > 0 else most
    return max(min(LEAST_TIMED_TOKENS, most), min(most, fitting))
