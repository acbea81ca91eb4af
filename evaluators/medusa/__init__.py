"""Medusa: draft heads for any causal LM, exact tree decoding, and a speed test (arXiv 2401.10774).

`measure` evaluates a checkpoint directory; the parts can be imported separately. Nothing here uses jobs, the network,
subprocesses or environment variables.

    trees       trees of draft tokens                     decoding    baseline and Medusa decoding, CUDA graphs
    model       base model, caches, kernels               training    head training within a budget
    drafting    heads, prompt lookup                      speed       cost of a tree, paired timing, report
    formats     file formats of heads                     generation  streaming text generation

Each part imports only earlier ones in the order trees, model, drafting, formats, decoding, training, speed, generation.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluators.medusa.speed.evaluation import measure
    from evaluators.medusa.speed.run import Given, SpeedOptions

__all__ = ["Given", "SpeedOptions", "measure"]

_HOMES = {
    "Given": "speed.run",
    "SpeedOptions": "speed.run",
    "measure": "speed.evaluation",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, because the import of torch takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
