"""Evaluation with lm-eval: task suites, conditions, isolated runs and stored results."""

from evaluators.content import content_digest
from evaluators.harness.eval_config import EvalConfig, Question, key_of
from evaluators.harness.evaluation import Estimate, RunOptions, evaluate
from evaluators.harness.results import folder_of
from evaluators.harness.suites import SUITES, Suite, SuiteTask

__all__ = [
    "SUITES",
    "Estimate",
    "EvalConfig",
    "Question",
    "RunOptions",
    "Suite",
    "SuiteTask",
    "content_digest",
    "evaluate",
    "folder_of",
    "key_of",
]
