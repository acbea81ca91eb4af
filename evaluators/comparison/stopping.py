"""Early stopping of merges that cannot win, and the order of tasks. Pure functions; off by default.

The questions of a suite are a finite population in random order. After any number of them a test asks whether the merge
can still end better than every parent by a margin over the whole suite. Repeated testing is valid, since the test is a
bet: a capital of 1 is staked against it, question by question, and by Ville's inequality the capital reaches 1/error
with a probability of at most `error`, at any time, for a merge that ends so.

Betting while sampling without replacement, and bets of this size (aGRAPA), are from Waudby-Smith and Ramdas, Estimating
means of bounded random variables by betting (JRSS B 86:1, 2024; arXiv 2010.09686).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluators.paired import Values

_STAKE = 0.5  # of what a single question could lose
_GRID = 201


@dataclass(frozen=True, slots=True)
class Rule:
    """A merge that would end at least `margin` better than every parent is stopped with probability `error` at most.

    `margin` is a fraction of the score; `error` holds over all tests and parents together.
    """

    margin: float = 0.0
    error: float = 0.05


@dataclass(frozen=True, slots=True)
class Decision:
    """Decision after `seen` of `questions`: `beaten_by` is the parent that the merge can no longer beat; None
    continues.

    `bound` is the largest possible lead over the parent with the lowest bound, at the rule's error.
    """

    beaten_by: str | None
    seen: int
    questions: int
    bound: float

    @property
    def stop(self) -> bool:
        return self.beaten_by is not None


def decide(differences: Mapping[str, Values], questions: int, rule: Rule) -> Decision:
    """Decide after the same `seen` questions of `questions` against each parent.

    `differences`: merge minus parent [seen], each from -1 to 1, in the order of the questions, which must be random.
    Over several tasks they are `rounds`, so that their mean is the overall one.
    """
    error = rule.error / max(1, len(differences))
    seen = max(map(len, differences.values()), default=0)
    lowest, beaten_by = 1.0, None
    for name, values in differences.items():
        bound = upper_bound(values, questions, error)
        if log_capital(values, questions, rule.margin).max(initial=0.0) >= math.log(1 / error):
            bound = min(bound, rule.margin)
            beaten_by = name if beaten_by is None or bound < lowest else beaten_by
        lowest = min(lowest, bound)
    return Decision(beaten_by, seen, questions, lowest)


def log_capital(differences: Values, questions: int, margin: float) -> Values:
    """Logarithm of the capital staked against "the mean over all `questions` is at least `margin`" [seen].

    Infinite once the remaining questions cannot bring the mean to the margin, whatever their answers.
    """
    path: Values = _log_capitals(differences, questions, np.array([margin]))[0]
    return path


def upper_bound(differences: Values, questions: int, error: float) -> float:
    """Largest mean over all `questions` that was never rejected, at most a hundredth too large."""
    margins = np.linspace(-1.0, 1.0, _GRID)
    reached = _log_capitals(differences, questions, margins).max(axis=1, initial=0.0)
    left = np.flatnonzero(reached < math.log(1 / error))
    if not len(left):
        return -1.0
    return float(margins[min(_GRID - 1, int(left[-1]) + 1)])


def _log_capitals(differences: Values, questions: int, margins: Values) -> Values:
    """[margins, seen]. Everything is moved to 0..1 first; each bet rests on the questions before it only."""
    values = (differences + 1) / 2
    goals = questions * ((margins + 1) / 2)[:, None]
    places = np.arange(len(values))
    counts = np.arange(1, len(values) + 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    means = (0.5 + sums) / counts
    spreads = (0.25 + np.concatenate([[0.0], np.cumsum((values - means[1:]) ** 2)])) / counts
    # Mean of the remaining questions at which the whole reaches the margin.
    needed = (goals - sums[:-1]) / (questions - places)
    possible = np.minimum(needed, 1.0)
    edge = possible - means[:-1]
    most = _STAKE / np.maximum(1 - possible, 1e-12)
    bets = np.where(needed > 0, np.clip(edge / (spreads[:-1] + edge**2), 0.0, most), 0.0)
    grown = np.cumsum(np.log1p(-bets * (values - possible)), axis=1)
    lacking = goals - sums[1:] > questions - places - 1 + 1e-9 * questions
    return np.where(np.maximum.accumulate(lacking, axis=1), np.inf, grown)


def rounds(tasks: Sequence[Values]) -> Values:
    """One question of each task per round: the mean of their differences [rounds], as long as all tasks have some.

    If every task is in random order, and `questions` of `decide` is the number of the largest task's, the error rate
    holds for the mean over tasks: exactly for tasks of one size. Smaller tasks end sooner, which brings a merge back to
    its mean sooner, too; for them the rate is supported by simulations in the tests, not by a theorem.
    """
    if not tasks:
        return np.zeros(0)
    means: Values = np.mean([task[: min(map(len, tasks))] for task in tasks], axis=0)
    return means


def information(differences: Sequence[Values], seconds: float) -> float:
    """Information per second of a task from its paired differences, one array per pair of models, and its seconds.

    A question on which models never differ carries no information. Sampling from each task in proportion to its spread
    over the root of its cost is Neyman's allocation (1934, JRSS 97:558); as an order it is the mean square of the
    differences over the seconds per question. Two questions of disagreement are added, so that a task without any so
    far keeps its place.
    """
    count = max((len(each) for each in differences), default=0)
    squares = [(float((each**2).sum()) + 2) / (len(each) + 2) for each in differences]
    return sum(squares) / max(1, len(squares)) / max(seconds / max(1, count), 1e-12)
