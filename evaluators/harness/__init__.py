"""lm-eval on one model: which questions (suites), how they are asked (conditions), and what came of it (results)."""

from evaluators.content import content_digest
from evaluators.harness.conditions import Conditions, Question, key_of
from evaluators.harness.evaluation import Estimate, evaluate
from evaluators.harness.results import folder_of
from evaluators.harness.suites import SUITES, Suite, SuiteTask

__all__ = [
    "SUITES",
    "Conditions",
    "Estimate",
    "Question",
    "Suite",
    "SuiteTask",
    "content_digest",
    "evaluate",
    "folder_of",
    "key_of",
]
