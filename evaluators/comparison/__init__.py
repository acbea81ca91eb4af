"""Comparison of a merge with its parents, question by question, and early stopping."""

from evaluators.comparison.comparing import compare, differences, most_telling

__all__ = ["compare", "differences", "most_telling"]
