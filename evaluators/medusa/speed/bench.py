"""Paired timing of candidates against the baseline in alternating order, with checks of the machine.

Each question is run plain, candidates, candidates backwards, plain (ABBA; every other question starts with the
candidates), so that drift cancels. Both loops share code, cache, dtype and kernels. Only decoding is compared; the
prefill is timed apart. A second turn continues the plain answer to the first one, whoever is asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from evaluators.medusa.decoding.decode import Clock, Limits, Trace, baseline, medusa
from evaluators.medusa.decoding.runners import Runner
from evaluators.medusa.drafting.drafters import Drafter
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.speed.document import ClockName, Interval
from evaluators.medusa.training import prompt_sets
from evaluators.medusa.training.distillation import Dialogue
from evaluators.medusa.training.prompt_sets import Prompt
from evaluators.medusa.trees.tree import Tree

RESAMPLES = 10_000
IDENTITY_LIMIT = 0.02
IDENTITY_FLOOR_S = 0.1
AA_WIDTH = 0.10
WARM_UP_TOKENS = 6
AA_SLACK = 0.02


@dataclass(frozen=True, slots=True)
class Question:
    """One turn of a prompt as token ids. `answers` are the baseline's answers to earlier turns; `shortened` means that
    the context holds only the end of the prompt."""

    prompt: Prompt
    ids: tuple[int, ...]
    answers: tuple[str, ...] = ()
    shortened: bool = False


def question(base: Base, prompt: Prompt, new_tokens: int, answers: Sequence[str] = ()) -> Question:
    """Build the turn of `prompt` that follows `answers`, with room for `new_tokens` of its own answer."""
    turn = len(answers)
    whole = prompt_sets.encode(base, prompt.turns[turn], list(zip(prompt.turns, answers, strict=False)))
    ids = prompt_sets.shortened(base, whole, new_tokens)
    return Question(prompt, tuple(ids), tuple(answers), len(ids) < len(whole))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A drafter with a tree, timed against the baseline."""

    id: str
    drafter: Drafter
    tree: Tree


@dataclass(frozen=True, slots=True)
class Block:
    """All runs of one question: the baseline twice and each candidate twice per repetition."""

    question: Question
    plain: tuple[Trace, ...]
    runs: dict[str, tuple[Trace, ...]]


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of summed tokens/s with its 95 % interval over `questions` (None from a single one)."""

    value: float
    interval: Interval | None
    questions: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """Order and end of a timing. `next_turn` makes the question that follows an answer, or returns None.

    Each question is run `repeats` times. `deadline` is a time of time.monotonic(). `progress` receives (done, total).
    `warm` means that `warm_up` has already run.
    """

    repeats: int = 1
    next_turn: Callable[[Question, Sequence[int]], Question | None] = lambda question, answer: None
    deadline: float | None = None
    progress: Callable[[int, int], None] | None = None
    warm: bool = False


def run_blocks(
    runner: Runner,
    candidates: Sequence[Candidate],
    questions: Sequence[Question],
    limits: Limits,
    schedule: Schedule | None = None,
) -> list[Block]:
    """Run the questions in order until all are done or the next would not fit before the deadline of the schedule.

    At least one block is always run.
    """
    schedule = schedule or Schedule()
    if questions and not schedule.warm:
        warm_up(runner, candidates, questions[0], limits)
    blocks: list[Block] = []
    longest_s = 0.0
    for number, question in enumerate(questions):
        following: Question | None = question
        while following is not None:
            started = time.monotonic()
            if schedule.deadline is not None and blocks and started + longest_s > schedule.deadline:
                return blocks
            inside_out = [(number + n) % 2 == 1 for n in range(schedule.repeats)]
            rounds = [_round(runner, candidates, following, limits, each) for each in inside_out]
            blocks.append(_joined(following, rounds))
            longest_s = max(longest_s, time.monotonic() - started)
            following = schedule.next_turn(following, blocks[-1].plain[0].tokens)
        if schedule.progress is not None:
            schedule.progress(number + 1, len(questions))
    return blocks


def warm_up(runner: Runner, candidates: Sequence[Candidate], question: Question, limits: Limits) -> list[Trace]:
    """Decode a few tokens with the baseline and each candidate, so that first-time work is not timed."""
    few = Limits(min(WARM_UP_TOKENS, limits.max_new_tokens), limits.stop_ids)
    return [
        baseline(runner, question.ids, few),
        *(medusa(runner, each.drafter, each.tree, question.ids, few) for each in candidates),
    ]


_Round = tuple[tuple[Trace, Trace], dict[str, tuple[Trace, Trace]]]


def _round(
    runner: Runner, candidates: Sequence[Candidate], question: Question, limits: Limits, inside_out: bool
) -> _Round:
    ids = question.ids

    def plainly(keep_hidden: bool = False) -> Trace:
        return baseline(runner, ids, limits, keep_hidden=keep_hidden)

    def all_candidates(order: Sequence[Candidate]) -> dict[str, Trace]:
        return {c.id: medusa(runner, c.drafter, c.tree, ids, limits) for c in order}

    if inside_out:
        first = all_candidates(candidates)
        both = (plainly(True), plainly())
        second = all_candidates(candidates[::-1])
    else:
        before = plainly(True)
        first, second = all_candidates(candidates), all_candidates(candidates[::-1])
        both = (before, plainly())
    return both, {c.id: (first[c.id], second[c.id]) for c in candidates}


def _joined(question: Question, rounds: Sequence[_Round]) -> Block:
    names = rounds[0][1]
    runs = {name: tuple(trace for _, each in rounds for trace in each[name]) for name in names}
    return Block(question, tuple(trace for both, _ in rounds for trace in both), runs)


def spoken(base: Base, blocks: Sequence[Block]) -> list[Dialogue]:
    """Return the baseline's answers with the states that predicted them; heads can be evaluated on these without the
    base."""
    return [
        Dialogue(block.question.ids, tuple(block.plain[0].tokens), torch.stack(block.plain[0].hidden).to(base.device))
        for block in blocks
        if block.plain[0].hidden
    ]


# -- figures -----------------------------------------------------------------------------------------------------------


def seconds(clock: Clock, name: ClockName) -> float:
    return clock.wall_s if name == "wall" else clock.cpu_s


def decoded(traces: Sequence[Trace]) -> int:
    """Count the tokens of the decoding phase, without the one from the prefill."""
    return sum(len(trace.tokens) - 1 for trace in traces)


def speedup(blocks: Sequence[Block], candidate: str, clock: ClockName, seed: int = 0) -> Ratio | None:
    """Return the ratio of summed decode tokens/s, candidate to baseline; None if nothing was decoded."""
    names = [block.question.prompt.id for block in blocks]
    return _ratio(names, [b.runs[candidate] for b in blocks], [block.plain for block in blocks], clock, seed)


def a_a(blocks: Sequence[Block], clock: ClockName, seed: int = 0) -> Ratio | None:
    """Compare the first baseline run of each block with the second: the noise of the machine."""
    names = [block.question.prompt.id for block in blocks]
    return _ratio(names, [block.plain[::2] for block in blocks], [block.plain[1::2] for block in blocks], clock, seed)


def a_a_ok(ratio: Ratio | None) -> bool:
    """Return True if the interval contains 1.0 (with 2 % of slack, since few questions make it narrow) and is within
    +-10 %."""
    if ratio is None or ratio.interval is None:
        return False
    low, high = ratio.interval
    return low - AA_SLACK <= 1.0 <= high + AA_SLACK and low >= 1 - AA_WIDTH and high <= 1 + AA_WIDTH


def _ratio(
    names: Sequence[str],
    above: Sequence[Sequence[Trace]],
    below: Sequence[Sequence[Trace]],
    clock: ClockName,
    seed: int,
) -> Ratio | None:
    """Ratio with an interval over prompts, by `names`; the turns of one prompt are resampled together."""
    rows = [
        (decoded(a), sum(seconds(t.decode, clock) for t in a), decoded(b), sum(seconds(t.decode, clock) for t in b))
        for a, b in zip(above, below, strict=True)
    ]
    table = _by_name([(name, row) for name, row in zip(names, rows, strict=True) if min(row) > 0])
    if not len(table):
        return None
    total = table.sum(axis=0)
    value = float(total[0] / total[1] / (total[2] / total[3]))
    if len(table) == 1:
        return Ratio(value, None, 1)
    sums = _resampled(table, seed)
    return Ratio(value, _interval(sums[:, 0] / sums[:, 1] / (sums[:, 2] / sums[:, 3])), len(table))


def rate(blocks: Sequence[Block], candidate: str, seed: int = 0) -> Ratio | None:
    """Tokens per step with its interval over questions."""
    runs = [(block.question.prompt.id, block.runs[candidate][0]) for block in blocks]
    table = _by_name([(name, (decoded([trace]), trace.steps)) for name, trace in runs if trace.steps])
    if not len(table):
        return None
    value = float(table[:, 0].sum() / table[:, 1].sum())
    if len(table) == 1:
        return Ratio(value, None, 1)
    sums = _resampled(table, seed)
    return Ratio(value, _interval(sums[:, 0] / sums[:, 1]), len(table))


def _by_name(rows: Sequence[tuple[str, tuple[float, ...]]]) -> NDArray[np.float64]:
    """Sum the rows of each name, in order of first appearance."""
    found: dict[str, NDArray[np.float64]] = {}
    for name, row in rows:
        found[name] = found.get(name, np.zeros(len(row))) + np.array(row, dtype=np.float64)
    return np.array(list(found.values()), dtype=np.float64)


def _resampled(table: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Sums over questions drawn with replacement: [questions, columns] -> [resamples, columns]."""
    drawn = np.random.default_rng(seed).integers(0, len(table), size=(RESAMPLES, len(table)))
    sums: NDArray[np.float64] = table[drawn].sum(axis=1)
    return sums


def _interval(values: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def end_to_end_s(trace: Trace, clock: ClockName = "wall") -> float:
    """Seconds of a whole generation, prefill included."""
    return seconds(trace.prefill, clock) + seconds(trace.decode, clock)


def step_s(traces: Sequence[Trace]) -> float | None:
    """Mean seconds per step, by the clocks inside the step."""
    steps = sum(trace.steps for trace in traces)
    return sum(t.draft_s + t.forward_s + t.accept_s for t in traces) / steps if steps else None


def identity_error(blocks: Sequence[Block], candidate: str) -> tuple[float | None, float | None]:
    """Return (overhead, error): overhead = step / plain step, error = |speedup * overhead / tokens per step - 1|.

    The speedup comes from the clocks around whole generations, the overhead from those inside the steps; they can
    only disagree if something outside the steps was slow, or was left out.
    """
    runs = [trace for block in blocks for trace in block.runs[candidate]]
    plains = [trace for block in blocks for trace in block.plain]
    ratio, mine, theirs = speedup(blocks, candidate, "wall"), step_s(runs), step_s(plains)
    if ratio is None or not mine or not theirs:
        return None, None
    overhead = mine / theirs
    tokens = decoded(runs) / sum(trace.steps for trace in runs)
    return overhead, abs(ratio.value * overhead / tokens - 1)


def clocks_disagree(blocks: Sequence[Block], candidate: str) -> bool:
    """Return True if the identity error exceeds 2 % and also what a process switch between two clocks explains."""
    _, error = identity_error(blocks, candidate)
    traces = [trace for block in blocks for trace in (*block.plain, *block.runs[candidate])]
    outside_s = sum(t.decode.wall_s - t.draft_s - t.forward_s - t.accept_s for t in traces)
    return error is not None and error >= IDENTITY_LIMIT and outside_s > IDENTITY_FLOOR_S
