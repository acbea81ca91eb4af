"""Timed runs: candidates against baseline decoding in paired blocks, and baseline decoding against `generate`.

Each question is run baseline, candidates, candidates in reverse, baseline (ABBA; every other question starts with the
candidates), so that drift cancels. All loops share code, cache, dtype and kernels. Only decoding is compared; the
prefill is timed apart. A second turn continues the baseline's answer to the first one for every candidate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig

from evaluators.comparison.report import joined
from evaluators.generation_settings import steering
from evaluators.medusa.decoding.decode import Clock, Limits, Trace, baseline, clocked, medusa
from evaluators.medusa.decoding.runners import EagerRunner, Runner
from evaluators.medusa.drafting.drafters import Drafter
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.speed.report import ClockName, Interval
from evaluators.medusa.training import prompt_sets
from evaluators.medusa.training.distillation import Dialogue
from evaluators.medusa.training.prompt_sets import Prompt
from evaluators.medusa.trees.tree import Tree

RESAMPLES = 10_000
IDENTITY_LIMIT = 0.02
IDENTITY_FLOOR_S = 0.1
AA_WIDTH = 0.10
AA_SLACK = 0.02
NATIVE_SLACK = 1.1
WARM_UP_TOKENS = 6


@dataclass(frozen=True, slots=True)
class Question:
    """One turn of a prompt as token ids. `answers` are the baseline's answers to earlier turns; `shortened` means that
    the context holds only the end of the prompt."""

    prompt: Prompt
    ids: tuple[int, ...]
    answers: tuple[str, ...] = ()
    shortened: bool = False


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
    """A ratio of sums with its 95 % interval over `questions` (None from a single one)."""

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


def question(base: Base, prompt: Prompt, new_tokens: int, answers: Sequence[str] = ()) -> Question:
    """Build the turn of `prompt` that follows `answers`, with room for an answer of `new_tokens`."""
    turn = len(answers)
    whole = prompt_sets.encode(base, prompt.turns[turn], list(zip(prompt.turns, answers, strict=False)))
    ids = prompt_sets.shortened(base, whole, new_tokens)
    return Question(prompt, tuple(ids), tuple(answers), len(ids) < len(whole))


# -- paired blocks -----------------------------------------------------------------------------------------------------


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
            blocks.append(_block(runner, candidates, following, limits, [number + n for n in range(schedule.repeats)]))
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


def _block(
    runner: Runner, candidates: Sequence[Candidate], question: Question, limits: Limits, rounds: Sequence[int]
) -> Block:
    """Run the question once per round: in even rounds the baseline first and last, in odd ones in the middle."""
    plain: list[Trace] = []
    runs: dict[str, list[Trace]] = {each.id: [] for each in candidates}

    def run_baseline(keep_hidden: bool) -> None:
        plain.append(baseline(runner, question.ids, limits, keep_hidden=keep_hidden))

    def run_candidates(order: Sequence[Candidate]) -> None:
        for each in order:
            runs[each.id].append(medusa(runner, each.drafter, each.tree, question.ids, limits))

    for number in rounds:
        if number % 2 == 0:
            run_baseline(keep_hidden=True)
        run_candidates(candidates)
        if number % 2 == 1:
            run_baseline(keep_hidden=True)
            run_baseline(keep_hidden=False)
        run_candidates(candidates[::-1])
        if number % 2 == 0:
            run_baseline(keep_hidden=False)
    return Block(question, tuple(plain), {name: tuple(traces) for name, traces in runs.items()})


def baseline_answers(base: Base, blocks: Sequence[Block]) -> list[Dialogue]:
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


def end_to_end_s(trace: Trace, clock: ClockName = "wall") -> float:
    """Seconds of a whole generation, prefill included."""
    return seconds(trace.prefill, clock) + seconds(trace.decode, clock)


def decoded(traces: Sequence[Trace]) -> int:
    """Count the tokens of the decoding phase, without the one from the prefill."""
    return sum(len(trace.tokens) - 1 for trace in traces)


def speedup(blocks: Sequence[Block], candidate: str, clock: ClockName, seed: int = 0) -> Ratio | None:
    """Return the ratio of summed decode tokens/s, candidate to baseline; None if nothing was decoded."""
    return _speed_ratio(blocks, [(block.runs[candidate], block.plain) for block in blocks], clock, seed)


def a_a(blocks: Sequence[Block], clock: ClockName, seed: int = 0) -> Ratio | None:
    """Compare the first baseline run of each block with the second: the noise of the machine."""
    return _speed_ratio(blocks, [(block.plain[::2], block.plain[1::2]) for block in blocks], clock, seed)


def a_a_ok(ratio: Ratio | None) -> bool:
    """Return True if the interval contains 1.0 (with 2 % of slack, since few questions make it narrow) and is within
    +-10 %."""
    if ratio is None or ratio.interval is None:
        return False
    low, high = ratio.interval
    return low - AA_SLACK <= 1.0 <= high + AA_SLACK and low >= 1 - AA_WIDTH and high <= 1 + AA_WIDTH


def rate(blocks: Sequence[Block], candidate: str, seed: int = 0) -> Ratio | None:
    """Tokens per step with its interval over questions."""
    runs = [(block, block.runs[candidate][0]) for block in blocks]
    table = _by_prompt([(block, (decoded([trace]), trace.steps)) for block, trace in runs if trace.steps])
    return _ratio(table, lambda sums: sums[..., 0] / sums[..., 1], seed)


def _speed_ratio(
    blocks: Sequence[Block],
    pairs: Sequence[tuple[Sequence[Trace], Sequence[Trace]]],
    clock: ClockName,
    seed: int,
) -> Ratio | None:
    """Ratio of tokens/s of the runs in each pair, one pair per block."""

    def figures(traces: Sequence[Trace]) -> tuple[float, float]:
        return decoded(traces), sum(seconds(trace.decode, clock) for trace in traces)

    rows = [(block, (*figures(a), *figures(b))) for block, (a, b) in zip(blocks, pairs, strict=True)]
    table = _by_prompt([(block, row) for block, row in rows if min(row) > 0])
    return _ratio(table, lambda sums: sums[..., 0] / sums[..., 1] / (sums[..., 2] / sums[..., 3]), seed)


def _by_prompt(rows: Sequence[tuple[Block, tuple[float, ...]]]) -> NDArray[np.float64]:
    """Sum the rows of each prompt, in order of first appearance: its turns are resampled together."""
    found: dict[str, NDArray[np.float64]] = {}
    for block, row in rows:
        name = block.question.prompt.id
        found[name] = found.get(name, np.zeros(len(row))) + np.array(row, dtype=np.float64)
    return np.array(list(found.values()), dtype=np.float64)


def _ratio(
    table: NDArray[np.float64], value: Callable[[NDArray[np.float64]], NDArray[np.float64]], seed: int
) -> Ratio | None:
    """The `value` of the summed rows of the table, with a bootstrap interval over its rows."""
    if not len(table):
        return None
    total = float(value(table.sum(axis=0)))
    if len(table) == 1:
        return Ratio(total, None, 1)
    drawn = np.random.default_rng(seed).integers(0, len(table), size=(RESAMPLES, len(table)))
    low, high = np.percentile(value(table[drawn].sum(axis=1)), [2.5, 97.5])
    return Ratio(total, (float(low), float(high)), len(table))


def overhead(blocks: Sequence[Block], candidate: str) -> float | None:
    """Return the mean step of the candidate over that of the baseline, by the clocks inside the steps."""
    step_s = _step_s([trace for block in blocks for trace in block.runs[candidate]])
    baseline_s = _step_s([trace for block in blocks for trace in block.plain])
    return step_s / baseline_s if step_s and baseline_s else None


def clock_error(blocks: Sequence[Block], candidate: str) -> float | None:
    """Return |speedup * overhead / tokens per step - 1| if the clocks disagree, else None.

    The speedup comes from the clocks around whole generations, the overhead from those inside the steps. They disagree
    if something outside the steps was slow: by 2 % and by more than a process switch between two clocks explains.
    """
    runs = [trace for block in blocks for trace in block.runs[candidate]]
    ratio, cost = speedup(blocks, candidate, "wall"), overhead(blocks, candidate)
    if ratio is None or cost is None:
        return None
    error = abs(ratio.value * cost * sum(trace.steps for trace in runs) / decoded(runs) - 1)
    traces = [*runs, *(trace for block in blocks for trace in block.plain)]
    outside_s = sum(trace.decode.wall_s - _inside_s(trace) for trace in traces)
    return error if error >= IDENTITY_LIMIT and outside_s > IDENTITY_FLOOR_S else None


def _inside_s(trace: Trace) -> float:
    return trace.draft_s + trace.forward_s + trace.accept_s


def _step_s(traces: Sequence[Trace]) -> float | None:
    """Mean seconds per step, by the clocks inside the step."""
    steps = sum(trace.steps for trace in traces)
    return sum(_inside_s(trace) for trace in traces) / steps if steps else None


# -- transformers' generate --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Versus:
    """Runs of one question by transformers' `generate` and by the baseline loop, one after the other, end to end."""

    question: Question
    tokens: list[int]
    native: Clock
    plain_tokens: list[int]
    plain: Clock


def against_native(
    base: Base,
    questions: Sequence[Question],
    limits: Limits,
    *,
    runner: Runner | None = None,
    deadline: float | None = None,
) -> list[Versus]:
    """Time the questions by `generate` and by the baseline in alternating order until `deadline`."""
    runner = runner or EagerRunner(base)
    found: list[Versus] = []
    longest_s = 0.0
    for number, question in enumerate(questions):
        began = time.monotonic()
        if deadline is not None and began + longest_s > deadline:
            break
        if number % 2:
            trace = baseline(runner, question.ids, limits)
        tokens, clock = native(base, question, limits)
        if not number % 2:
            trace = baseline(runner, question.ids, limits)
        ours = Clock(end_to_end_s(trace, "wall"), end_to_end_s(trace, "cpu"))
        found.append(Versus(question, tokens, clock, trace.tokens, ours))
        longest_s = max(longest_s, time.monotonic() - began)
    return found


def baseline_is_slow(found: Sequence[Versus], clock: ClockName) -> bool:
    """Return True if the baseline was clearly slower than `generate` on every question, in either order."""
    return len(found) > 1 and all(
        seconds(each.plain, clock) > NATIVE_SLACK * seconds(each.native, clock) for each in found
    )


def never_equal(found: Sequence[Versus]) -> str | None:
    """Return a sentence if the two texts differ on every question, as for models that keep state outside the cache;
    else None."""
    if not found or any(each.tokens == each.plain_tokens for each in found):
        return None
    return "baseline decoding gave another text than transformers' own `generate` on every compared question"


def unapplied_settings(base: Base) -> str | None:
    """Return a clause that names the settings of the model's generation config that no loop here applies, or None."""
    found = steering(base.model.generation_config, limits=False)
    named = [f"{name} {value}" if isinstance(value, int | float) else name for name, value in found.items()]
    if not named:
        return None
    return f"the model's own settings ask for {joined(named)}, which the decoding here does not apply"


@torch.no_grad()
def native(base: Base, question: Question, limits: Limits, cache: str | None = None) -> tuple[list[int], Clock]:
    """Run transformers' own greedy `generate`; return its tokens and its end-to-end time.

    Only the stop ids are taken from the model's generation config, and it ends where the context is full, as in
    the baseline loop. With the cache "static" it compiles the model on a GPU, in the first call.
    """
    ids = torch.tensor([list(question.ids)], device=base.device)
    stops, last = sorted(base.stop_ids & limits.stop_ids), base.last_position()
    room = limits.max_new_tokens if last is None else last + 2 - len(question.ids)  # the last token takes no position
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=min(limits.max_new_tokens, room),
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,
        cache_implementation=cache,
    )
    clock = Clock()
    # `generate` fills gaps of a config from the model's own, such as a repetition penalty, which changes the text.
    own, base.model.generation_config = base.model.generation_config, GenerationConfig()
    try:
        with clocked(clock, base.device):
            out = base.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    finally:
        base.model.generation_config = own
    return out[0, len(question.ids) :].tolist(), clock
