"""Options of the speed test, from the command line or the job to the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evaluators.medusa.decoding.runners import Runner
    from evaluators.medusa.model.causal_lm import Base
    from evaluators.medusa.speed.transfer import Given


@dataclass(frozen=True, slots=True)
class SpeedOptions:
    """Options of one speed test: its questions, its budget, the heads and the tree to time.

    `prompts` (MT-bench layout) replaces the built-in test questions; training prompts that leak from it are dropped.
    The first `questions` of them are asked for one or two `turns`, each answered with up to `max_new_tokens` tokens.
    `budget_s` bounds everything from loading to writing; checking texts that differ from the baseline's may take a
    twentieth more. A short budget means less training text and fewer or shorter answers, but at least one question of
    16 tokens, twice as the baseline and twice with the heads.
    `given` heads are compared with those trained here; where some have origin "fresh", none are trained.
    `dtype` is auto, float32, bfloat16 or float16. `tree` is a file with the tree to time (tree_files); without one each
    set of heads gets the tree with the highest predicted gain. `runner` defaults to the fastest one of the device.
    """

    prompts: Path | None = None
    budget_s: float = 60
    questions: int = 8
    max_new_tokens: int = 48
    turns: int = 1
    seed: int = 0
    repeats: int = 1
    device: str = "cpu"
    given: Sequence[Given] = ()
    dtype: str = "auto"
    tree: Path | None = None
    runner: Callable[[Base], Runner] | None = None
