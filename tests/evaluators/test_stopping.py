"""Stopping a merge that cannot win: the stated error rate holds however often one looks, and hopeless ones do stop."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluators.comparison import stopping
from evaluators.comparison.stopping import Rule, decide, log_capital, upper_bound


def population(rng: np.random.Generator, won: int, lost: int, questions: int) -> np.ndarray:
    """Differences of a whole suite in random order, with a known mean of (won - lost) / questions."""
    found = np.array([1.0] * won + [-1.0] * lost + [0.0] * (questions - won - lost))
    return rng.permutation(found)


def capital_step_by_step(differences: list[float], questions: int, margin: float) -> list[float]:
    """The same bets with plain loops, as the paper writes them."""
    wanted, found = (margin + 1) / 2, [(each + 1) / 2 for each in differences]
    capital, path = 1.0, []
    for at, value in enumerate(found):
        needed = (questions * wanted - sum(found[:at])) / (questions - at)
        mean = (0.5 + sum(found[:at])) / (at + 1)
        spread = 0.25 + sum((found[i] - (0.5 + sum(found[: i + 1])) / (i + 2)) ** 2 for i in range(at))
        spread /= at + 1
        edge = min(needed, 1.0) - mean
        bet = min(max(edge / (spread + edge**2), 0.0), 0.5 / max(1 - min(needed, 1.0), 1e-12)) if needed > 0 else 0.0
        capital *= 1 - bet * (value - min(needed, 1.0))
        if questions * wanted - sum(found[: at + 1]) > questions - at - 1 + 1e-9 * questions:
            capital = math.inf  # even a win in every question left is too little
        path.append(math.log(capital) if capital < math.inf else math.inf)
    return path


@given(
    st.lists(st.sampled_from([-1.0, 0.0, 1.0, 0.5]), min_size=1, max_size=25), st.floats(-0.9, 0.9), st.integers(0, 9)
)
def test_the_capital_is_that_of_betting_step_by_step(differences: list[float], margin: float, left: int) -> None:
    questions = len(differences) + left
    expected = capital_step_by_step(differences, questions, margin)
    assert log_capital(np.array(differences), questions, margin) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("won", "lost", "questions"), [(40, 40, 400), (120, 120, 400), (8, 8, 40), (3, 3, 1000)])
def test_a_merge_just_as_good_as_the_rule_asks_is_stopped_in_at_most_one_of_twenty_suites(
    won: int, lost: int, questions: int
) -> None:
    """The hardest case: its mean over the whole suite is the margin exactly, and one looks after every question."""
    rng = np.random.default_rng(won)
    wrong = [
        log_capital(population(rng, won, lost, questions), questions, 0.0).max() >= math.log(20) for _ in range(1500)
    ]
    assert np.mean(wrong) <= 0.05 + 3 * (0.05 * 0.95 / 1500) ** 0.5


def test_the_rate_holds_over_parents_margins_and_tasks_together() -> None:
    rng, rule, wrong = np.random.default_rng(7), Rule(margin=0.05), 0
    for _ in range(300):
        found = {
            name: stopping.rounds([population(rng, 21, 9, 120), population(rng, 30, 30, 120)]) for name in ("a", "b")
        }
        assert np.mean(found["a"]) == pytest.approx(0.05)
        looks = (decide({name: each[:seen] for name, each in found.items()}, 120, rule) for seen in (30, 60, 120))
        wrong += any(look.stop for look in looks)
    assert wrong / 300 <= 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5


def test_the_rate_is_shared_by_the_parents() -> None:
    """Two parents have two chances to stop a merge: each gets half of the error."""
    found, stops = population(np.random.default_rng(5), 60, 140, 1000), []
    for seen in range(25, 601, 25):
        one, two = {"a": found[:seen]}, {"a": found[:seen], "b": found[:seen]}
        assert decide(two, 1000, Rule(error=0.1)).stop == decide(one, 1000, Rule(error=0.05)).stop
        stops.append((decide(one, 1000, Rule()).stop, decide(two, 1000, Rule()).stop))
    assert (True, False) in stops and (False, True) not in stops


def test_the_rate_holds_for_rounds_over_tasks_of_different_sizes() -> None:
    rng, wrong = np.random.default_rng(11), 0
    for _ in range(600):
        tasks = [population(rng, 12, 12, 60), population(rng, 30, 40, 200), population(rng, 20, 0, 400)]
        assert np.mean([each.mean() for each in tasks]) == pytest.approx(0.0)
        wrong += decide({"p": stopping.rounds(tasks)}, 400, Rule()).stop
    assert wrong / 600 <= 0.05 + 3 * (0.05 * 0.95 / 600) ** 0.5
    assert len(stopping.rounds([])) == 0


def test_a_hopeless_merge_is_stopped_before_half_of_the_suite() -> None:
    rng, rule = np.random.default_rng(3), Rule()
    seen = []
    for _ in range(40):
        found = {"good": population(rng, 50, 250, 1000), "poor": population(rng, 200, 60, 1000)}
        looks = (decide({name: each[:n] for name, each in found.items()}, 1000, rule) for n in range(50, 1001, 50))
        stopped = next(look for look in looks if look.stop)
        assert stopped.beaten_by == "good" and stopped.bound <= 0
        seen.append(stopped.seen)
    assert np.mean(seen) < 300


def test_what_can_no_longer_be_reached_is_certain() -> None:
    lost = -np.ones(6)
    assert np.isinf(log_capital(lost, 10, 0.0)).tolist() == [False] * 5 + [
        True
    ]  # four wins left cannot make up for six losses
    assert decide({"p": lost}, 10, Rule(error=1e-9)).stop


def test_at_the_end_the_bound_is_the_mean_and_before_it_lies_above() -> None:
    rng = np.random.default_rng(1)
    found = population(rng, 30, 60, 300)
    bounds = [upper_bound(found[:seen], 300, 0.05) for seen in (30, 100, 200, 300)]
    assert all(bound >= -0.1 for bound in bounds) and bounds == sorted(bounds, reverse=True)
    assert bounds[-1] == pytest.approx(-0.1, abs=0.011)
    assert decide({}, 10, Rule()).stop is False and decide({"p": found[:0]}, 10, Rule()).stop is False


def test_tasks_that_tell_much_in_little_time_come_first() -> None:
    disagree, agree = np.array([1.0, -1.0, 0.0, 1.0] * 10), np.zeros(40)
    quick, slow, idle = (
        stopping.information([disagree], 4.0),
        stopping.information([disagree], 400.0),
        stopping.information([agree, agree], 4.0),
    )
    assert quick > idle > slow
    assert quick == pytest.approx(32 / 42 / 0.1)
