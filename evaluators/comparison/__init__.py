"""A merge beside its parents, question by question: what can be said, and when asking more would not change it."""

from evaluators.comparison.comparing import compare, differences, most_telling

__all__ = ["compare", "differences", "most_telling"]
