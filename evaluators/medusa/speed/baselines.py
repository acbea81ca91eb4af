"""Comparison of the baseline loop with transformers' own greedy `generate`, so that a slow baseline is detected."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from evaluators.comparison.report import joined
from evaluators.generation_settings import steering
from evaluators.medusa.decoding.decode import Clock, Limits, baseline, clocked
from evaluators.medusa.decoding.runners import EagerRunner, Runner
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.speed.bench import Question, end_to_end_s, seconds
from evaluators.medusa.speed.document import ClockName

NATIVE_SLACK = 1.1


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
        if deadline is not None and time.monotonic() + longest_s > deadline:
            break
        began = time.monotonic()
        if number % 2:
            trace = baseline(runner, question.ids, limits)
        tokens, clock = native(base, question, limits)
        if not number % 2:
            trace = baseline(runner, question.ids, limits)
        ours = Clock(end_to_end_s(trace, "wall"), end_to_end_s(trace, "cpu"))
        found.append(Versus(question, tokens, clock, trace.tokens, ours))
        longest_s = max(longest_s, time.monotonic() - began)
    return found


def plain_is_slow(found: Sequence[Versus], clock: ClockName) -> bool:
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
    set_by_model = steering(base.model.generation_config, limits=False)
    asked = [f"{name} {value}" if isinstance(value, int | float) else name for name, value in set_by_model.items()]
    if not asked:
        return None
    return f"the model's own settings ask for {joined(asked)}, which the decoding here does not apply"


@torch.no_grad()
def native(base: Base, question: Question, limits: Limits, cache: str | None = None) -> tuple[list[int], Clock]:
    """Run transformers' own greedy `generate`; return its tokens and its end-to-end time.

    Nothing but the stop ids is taken from the model's generation config, and it ends where the context is full, as in
    the plain loop. With the cache "static" it compiles the model on a GPU, in the first call.
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
    # What a config leaves open `generate` takes from the model's own, such as a repetition penalty: another text.
    own, base.model.generation_config = base.model.generation_config, GenerationConfig()
    try:
        with clocked(clock, base.device):
            out = base.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    finally:
        base.model.generation_config = own
    return out[0, len(question.ids) :].tolist(), clock
