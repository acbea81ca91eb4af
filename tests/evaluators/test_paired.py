"""The maths of paired comparison against slow, independent references, and its error rates by simulation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from evaluators import paired

counts = st.integers(0, 60)
chances = st.lists(st.floats(0, 1), min_size=1, max_size=8)


@given(counts, counts)
def test_mcnemar_is_the_binomial_test_of_the_disagreements(won: int, lost: int) -> None:
    both = won + lost
    expected = stats.binomtest(won, both, 0.5).pvalue if both else 1.0
    assert paired.mcnemar(won, lost, mid=False) == pytest.approx(expected, abs=1e-12)
    below, here = stats.binom.cdf(min(won, lost) - 1, both, 0.5), stats.binom.pmf(min(won, lost), both, 0.5)
    middle = 2 * below + here if both else 1.0
    assert paired.mcnemar(won, lost) == pytest.approx(middle, abs=1e-12) == paired.mcnemar(lost, won)


def test_mcnemar_takes_disagreements_by_the_hundred_thousand() -> None:
    expected = stats.binomtest(49_500, 100_000, 0.5).pvalue
    assert paired.mcnemar(49_500, 50_500, mid=False) == pytest.approx(expected, rel=1e-6)


@given(st.integers(1, 500).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_a_shares_interval_is_wilsons(found: tuple[int, int]) -> None:
    expected = stats.binomtest(*found, 0.5).proportion_ci(0.95, method="wilson")
    low, high = paired.proportion_interval(*found)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert low <= found[0] / found[1] <= high


@given(counts, counts, counts)
def test_the_difference_lies_in_its_interval_whichever_way_it_is_taken(won: int, lost: int, same: int) -> None:
    total = won + lost + same
    if total:
        low, high = paired.difference_interval(won, lost, total)
        assert -1 <= low <= (won - lost) / total <= high <= 1
        assert paired.difference_interval(lost, won, total) == pytest.approx((-high, -low))


@given(chances)
def test_holm_rejects_what_the_step_by_step_procedure_rejects(found: list[float]) -> None:
    adjusted = paired.holm(found)
    for level in (0.01, 0.05, 0.3, *(each for each in found if each < 1)):
        rejected, going = set(), True
        for place, at in enumerate(sorted(range(len(found)), key=lambda each: found[each])):
            going = going and found[at] * (len(found) - place) <= level
            if going:
                rejected.add(at)
        assert {at for at, chance in enumerate(adjusted) if chance <= level} == rejected
    assert all(one >= other for one, other in zip(adjusted, found, strict=True))


def enumerated(strata: Sequence[Sequence[float]]) -> float:
    """The permutation test with every one of the 2^n signs."""
    weights = [1 / len(each) for each in strata for _ in each]
    terms = np.array([value for each in strata for value in each]) * weights
    signs = np.array(list(itertools.product((-1, 1), repeat=len(terms))))
    return float(np.mean(np.abs(signs @ terms) >= abs(terms.sum()) - 1e-12))


values = st.sampled_from([-1.0, 0.0, 1.0, 0.5, -0.25, 0.3])


@settings(max_examples=25)
@given(st.lists(st.lists(values, min_size=1, max_size=4), min_size=1, max_size=3))
def test_flipping_signs_by_chance_finds_what_flipping_all_of_them_finds(strata: list[list[float]]) -> None:
    found = paired.sign_flip([np.array(each) for each in strata])
    exact = enumerated(strata)
    assert found == pytest.approx(exact, abs=4.5 * (exact * (1 - exact) / paired.RESAMPLES) ** 0.5 + 2e-4)


@settings(max_examples=25)
@given(st.lists(values, min_size=2, max_size=12), st.randoms(use_true_random=False))
def test_neither_the_order_of_questions_nor_the_side_changes_a_p_value(found: list[float], order: Any) -> None:
    shuffled = list(found)
    order.shuffle(shuffled)
    first = paired.sign_flip([np.array(found)])
    assert paired.sign_flip([np.array(shuffled)]) == first == paired.sign_flip([-np.array(found)])


def test_no_draw_makes_anything_impossible() -> None:
    """Of ten thousand orders with the observed one among them, the least that can be said is one."""
    assert paired.sign_flip([np.ones(40)]) == 1 / (1 + paired.RESAMPLES)


@pytest.mark.parametrize("decimals", [0, 9])
def test_the_bootstrap_is_that_of_scipy(decimals: int) -> None:
    found = np.round(np.random.default_rng(3).normal(0.4, 1.5, 120), decimals)
    expected = stats.bootstrap((found,), np.mean, method="percentile", n_resamples=9999, rng=4).confidence_interval
    low, high = paired.mean_interval(found)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.02)
    assert paired.mean_interval(np.random.default_rng(5).permutation(found)) == (low, high)
    assert paired.mean_interval(np.full(5, 0.25)) == (0.25, 0.25)


def test_the_interval_of_a_mean_over_tasks_is_that_of_a_stratified_paired_bootstrap() -> None:
    rng = np.random.default_rng(5)
    strata = [rng.choice([-1.0, 0.0, 1.0], size=n, p=p) for n, p in ((300, [0.1, 0.7, 0.2]), (900, [0.05, 0.9, 0.05]))]
    drawn = np.mean([each[rng.integers(0, len(each), (4000, len(each)))].mean(axis=1) for each in strata], axis=0)
    intervals = [paired.difference_interval(int((x > 0).sum()), int((x < 0).sum()), len(x)) for x in strata]
    found = paired.average_interval([float(each.mean()) for each in strata], intervals)
    assert found == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.002)


# -- error rates: two models of equal skill disagree on a fifth of the questions -------------------------------------


@pytest.mark.parametrize(("questions", "disagree"), [(60, 0.2), (400, 0.1), (400, 0.3)])
def test_equal_models_are_told_apart_in_at_most_one_of_twenty_measurements(questions: int, disagree: float) -> None:
    rng = np.random.default_rng(questions)
    drawn = rng.multinomial(questions, [disagree / 2, disagree / 2, 1 - disagree], size=4000)
    alarms = covered = 0
    for won, lost, _ in drawn.tolist():
        low, high = paired.difference_interval(won, lost, questions)
        covered += low <= 0 <= high
        alarms += paired.mcnemar(won, lost) <= 0.05
    assert 0.025 <= alarms / len(drawn) <= 0.055
    assert covered / len(drawn) >= 0.945


def test_equal_models_are_told_apart_by_flipped_signs_in_one_of_twenty_measurements() -> None:
    rng = np.random.default_rng(8)
    alarms = [paired.sign_flip([rng.standard_t(4, 40)], resamples=999) <= 0.05 for _ in range(600)]
    assert 0.03 <= np.mean(alarms) <= 0.07


@pytest.mark.parametrize(("questions", "disagree"), [(200, 0.3), (1000, 0.15)])
def test_the_detectable_difference_is_shown_in_four_of_five_measurements(questions: int, disagree: float) -> None:
    least = paired.detectable_share(disagree, questions)
    won, lost = (disagree + least) / 2, (disagree - least) / 2
    drawn = np.random.default_rng(1).multinomial(questions, [won, lost, 1 - disagree], size=1500)
    shown = np.mean([paired.mcnemar(won, lost) <= 0.05 for won, lost, _ in drawn.tolist()])
    assert shown == pytest.approx(0.8, abs=0.04)


def test_with_few_questions_or_little_disagreement_less_can_be_seen() -> None:
    assert paired.detectable_share(0.2, 3) == 1.0
    assert paired.detectable_share(0.2, 4000) < paired.detectable_share(0.2, 400) < paired.detectable_share(0.2, 40)
    assert paired.detectable_share(0.0, 400) == pytest.approx(paired.detectable_share(0.01, 400), abs=1e-6)
    assert paired.detectable_share(0.2, 400, alpha=0.05 / 12) > paired.detectable_share(0.2, 400)
    assert paired.detectable_mean(0.01) == pytest.approx(0.028, abs=2e-4)
