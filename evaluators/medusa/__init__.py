"""Medusa: draft heads for any causal LM, exact tree decoding, and a speed figure one can trust.

`measure` is the whole evaluation of a checkpoint directory; the parts are importable on their own. Paper: Medusa,
arXiv 2401.10774. Knows directories, never jobs; no network, no subprocess, no environment.

    trees       which guesses are tried together          decoding    from a prompt to tokens, eager, packed, graphs
    model       the base, in what it computes             training    heads from prompts, within a budget
    drafting    heads, prompt lookup                      speed       what a tree costs, paired timing, the report
    formats     head checkpoints of all programs          generation  text as it is decoded

Each imports only those before it in the order trees, model, drafting, formats, decoding, training, speed, generation.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluators.medusa.speed.evaluation import measure
    from evaluators.medusa.speed.run import SpeedOptions
    from evaluators.medusa.speed.transfer import Given

__all__ = ["Given", "SpeedOptions", "measure"]

_HOMES = {
    "Given": "speed.transfer",
    "SpeedOptions": "speed.run",
    "measure": "speed.evaluation",
}


def __getattr__(name: str) -> Any:
    """What is asked for and no more: torch takes seconds, and files of prompts and trees are read without it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
