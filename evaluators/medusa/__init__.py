"""Medusa: draft heads for any causal LM, exact tree decoding, and a speed figure one can trust.

`measure` is the whole evaluation of a checkpoint directory; the parts are importable on their own. Paper: Medusa,
arXiv 2401.10774. Knows directories, never jobs; no network, no subprocess, no environment.
"""

from evaluators.medusa.evaluation import measure
from evaluators.medusa.report import sentence
from evaluators.medusa.transfer import Given

__all__ = ["Given", "measure", "sentence"]
