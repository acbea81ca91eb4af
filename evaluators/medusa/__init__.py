"""Medusa: draft heads for any causal LM, exact tree decoding, and a speed figure one can trust.

`measure` is the whole evaluation of a checkpoint directory; the parts are importable on their own. Paper: Medusa,
arXiv 2401.10774. Knows directories, never jobs; no network, no subprocess, no environment.

    trees       which guesses are tried together          decoding    from a prompt to tokens, eager, packed, graphs
    model       the base, in what it computes             training    heads from prompts, within a budget
    drafting    heads, prompt lookup                      speed       what a tree costs, paired timing, the report
    formats     head checkpoints of all programs          generation  text as it is decoded

Each imports only those before it in the order trees, model, drafting, formats, decoding, training, speed, generation.
"""

from evaluators.medusa.speed.evaluation import measure
from evaluators.medusa.speed.report import sentence
from evaluators.medusa.speed.transfer import Given

__all__ = ["Given", "measure", "sentence"]
