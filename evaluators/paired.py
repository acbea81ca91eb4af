"""Paired statistics for two models on the same questions: tests, intervals, detectable differences. On numpy arrays.

A question gives each model a value: 0 or 1 for wrong or right, any number elsewhere. The statistics use the difference
of the two values per question, so that the difficulty of a question cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Interval = tuple[float, float]

ALPHA = 0.05
POWER = 0.8
RESAMPLES = 9999  # p values are multiples of 1 / 10,000
_CELLS = 2_000_000  # random numbers drawn at a time
_FEW = 64  # distinct values up to which counting them is cheaper than drawing questions


def quantile(probability: float) -> float:
    """Quantile of the standard normal distribution."""
    return NormalDist().inv_cdf(probability)


def mcnemar(won: int, lost: int, *, mid: bool = True) -> float:
    """Two-sided p of McNemar's exact test: `won` questions only the first model has right, `lost` only the second.

    With `mid`, half the probability of the observation is left out: the exact test is conservative, often far below its
    level, the mid-p test stays near it (Fagerland, Lydersen and Laake 2013, BMC Med Res Methodol 13:91).
    """
    few, both = min(won, lost), won + lost
    if both == 0:
        return 1.0
    steps = np.arange(1, few + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log((both - steps + 1) / steps))]) - both * math.log(2)
    chances = np.exp(logs)
    return float(min(1.0, 2 * chances.sum() - (chances[-1] if mid else 0.0)))


def proportion_interval(right: int, questions: int, alpha: float = ALPHA) -> Interval:
    """Wilson's score interval of a share (Wilson 1927, JASA 22:209): also of 0 and 100 % it is an interval."""
    z = quantile(1 - alpha / 2)
    share = right / questions
    centre = (share + z**2 / (2 * questions)) / (1 + z**2 / questions)
    half = z / (1 + z**2 / questions) * math.sqrt(share * (1 - share) / questions + z**2 / (4 * questions**2))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def difference_interval(won: int, lost: int, questions: int, alpha: float = ALPHA) -> Interval:
    """Bonett and Price's interval of the difference of two paired shares (2012, J Educ Behav Stat 37:479).

    One of the two that Fagerland, Lydersen and Laake recommend of ten (2014, Stat Med 33:2850).
    One question is added to each kind of disagreement, so that models which never disagreed get an interval too.
    """
    first, second = (won + 1) / (questions + 2), (lost + 1) / (questions + 2)
    spread = math.sqrt((first + second - (first - second) ** 2) / (questions + 2))
    half = quantile(1 - alpha / 2) * spread
    return max(-1.0, first - second - half), min(1.0, first - second + half)


def mean_interval(values: Values, alpha: float = ALPHA, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Percentile bootstrap interval of a mean (Efron and Tibshirani 1993, chapter 13); of paired values [n], paired."""
    rng = np.random.default_rng(seed)
    values = np.sort(values)  # so that the order of questions changes nothing
    distinct, counts = np.unique(values, return_counts=True)
    total = len(values)
    if len(distinct) <= _FEW:
        means = rng.multinomial(total, counts / total, size=resamples) @ distinct / total
    else:
        rows = max(1, _CELLS // total)
        sizes = [min(rows, resamples - at) for at in range(0, resamples, rows)]
        means = np.concatenate([values[rng.integers(0, total, (size, total))].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [alpha / 2, 1 - alpha / 2])
    return float(low), float(high)


def average_interval(values: Sequence[float], intervals: Sequence[Interval]) -> Interval:
    """The interval of the mean of independent estimates from their own intervals.

    The method of variance estimates recovery (Zou and Donner 2008, Stat Med 27:1693): it keeps the asymmetry of each
    and needs no resampling, so equal facts give equal bytes. The tests hold it against a stratified paired bootstrap.
    """
    centre, tasks = sum(values) / len(values), len(values)
    below = math.sqrt(sum((value - low) ** 2 for value, (low, _) in zip(values, intervals, strict=True))) / tasks
    above = math.sqrt(sum((high - value) ** 2 for value, (_, high) in zip(values, intervals, strict=True))) / tasks
    return centre - below, centre + above


def sign_flip(strata: Sequence[Values], *, seed: int = 0, resamples: int = RESAMPLES) -> float:
    """Two-sided p of a paired permutation test with random signs of the differences.

    `strata`: differences [n] of each task; the statistic is the mean over tasks of their means. Equal sizes of
    difference within a task are flipped together, by one binomial draw. p counts the observed order among those drawn
    and is never 0 (Phipson and Smyth 2010, Stat Appl Genet Mol Biol 9:39).
    """
    rng = np.random.default_rng(seed)
    observed, drawn = 0.0, np.zeros(resamples)
    for differences in strata:
        share = 1 / (len(differences) * len(strata))
        observed += float(differences.sum()) * share
        for size, count in zip(*np.unique(np.abs(differences), return_counts=True), strict=True):
            if size > 0:
                drawn += (2.0 * rng.binomial(count, 0.5, size=resamples) - count) * size * share
    as_far = np.count_nonzero(np.abs(drawn) >= abs(observed) - 1e-12)
    return float((1 + as_far) / (1 + resamples))


def holm(chances: Sequence[float]) -> list[float]:
    """p values adjusted for their number, in their order (Holm 1979, Scand J Stat 6:65)."""
    adjusted, highest = [0.0] * len(chances), 0.0
    for place, at in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        highest = max(highest, min(1.0, chances[at] * (len(chances) - place)))
        adjusted[at] = highest
    return adjusted


def detectable_share(discordant: float, questions: int, alpha: float = ALPHA, power: float = POWER) -> float:
    """Smallest true difference of two paired shares that McNemar's test shows with `power`, at most 1.

    It solves n = (z_(1-alpha/2) sqrt(D) + z_power sqrt(D - d^2))^2 / d^2 for d, where D is the share of questions the
    models disagree on (Connor 1987, Biometrics 43:207); a difference needs at least as much disagreement.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        disagreed = max(discordant, middle)
        needed = quantile(1 - alpha / 2) * math.sqrt(disagreed)
        needed += quantile(power) * math.sqrt(max(0.0, disagreed - middle**2))
        low, high = (low, middle) if needed <= middle * math.sqrt(questions) else (middle, high)
    return high


def detectable_mean(stderr: float, alpha: float = ALPHA, power: float = POWER) -> float:
    """The same for a mean difference with this standard error: (z_(1-alpha/2) + z_power) times it (Cohen 1988)."""
    return (quantile(1 - alpha / 2) + quantile(power)) * stderr
