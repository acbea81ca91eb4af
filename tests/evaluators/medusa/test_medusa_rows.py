"""The rows of the speed report: each figure is what it is called, and what breaks one refuses the whole."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import tiny_causal_lms as tiny

from evaluators.medusa.decoding.decode import Clock, Limits, Trace, baseline
from evaluators.medusa.decoding.runners import EagerRunner
from evaluators.medusa.drafting.heads import HeadSpec, identity_heads
from evaluators.medusa.speed import bench, calibrate, rows, transfer
from evaluators.medusa.speed.report import Report
from evaluators.medusa.training import distillation
from evaluators.medusa.training.prompt_sets import Prompt
from evaluators.medusa.trees.tree import chain

IDS = (1, 2)
READING_S = 1.0


@cache
def text() -> tuple[int, ...]:
    return tuple(baseline(EagerRunner(tiny.base("gqa")), IDS, Limits(41)).tokens)


@cache
def answers() -> distillation.Features:
    base = tiny.base("gqa")
    return distillation.stack_features(base, distillation.self_distil(base, [[1, 2, 3]], max_new_tokens=8))


def generation(tokens: Sequence[int], steps: int, seconds: float, inside_s: float | None = None) -> Trace:
    """A generation of so many steps in so many seconds on both clocks, `inside_s` of them by the clocks of steps."""
    made = Trace(tokens=list(tokens), emitted=[1] * steps)
    made.prefill, made.decode = Clock(READING_S, READING_S), Clock(seconds, seconds)
    made.forward_s = seconds if inside_s is None else inside_s
    return made


def block(name: str, category: str, count: int, plain_s: tuple[float, float], fast: Trace) -> bench.Block:
    said = text()[: count + 1]
    question = bench.Question(Prompt(name, category, ("?",)), IDS)
    return bench.Block(
        question, (generation(said, count, plain_s[0]), generation(said, count, plain_s[1])), {"fresh": (fast, fast)}
    )


def eight(fast: Trace, plain_s: tuple[float, float] = (2.0, 2.0)) -> list[bench.Block]:
    return [block(name, "x", 20, plain_s, fast) for name in "abcdefgh"]


def reported(
    blocks: Sequence[bench.Block], training: dict[str, Any] | None = None, versus: Sequence[bench.Versus] = ()
) -> dict[str, Any]:
    base = tiny.base("gqa")
    heads = identity_heads(HeadSpec("shared", 2), base)
    features = answers()
    cost = calibrate.CostCurve(10, "wall", ((1, 10.0), (2, 10.1), (4, 10.2)), 0.1)
    promised = calibrate.Choice(chain(2), 1.9, 1.1, 1.7, True)
    fresh = transfer.HeadSet("fresh", "fresh", heads, training=training, choice=promised)
    compared = rows.Compared([fresh], heads, chain(2), features, features, cost)
    return rows.completed(Report(), rows.Measured(base, blocks, versus, 40, 0), compared).as_dict()


def test_figures_over_tokens_and_over_categories_are_each_their_own() -> None:
    made = reported(
        [
            block("1", "writing", 20, (2.0, 2.0), generation(text()[:21], 10, 1.0)),
            block("2", "math", 40, (4.0, 4.0), generation(text(), 40, 8.0)),
        ]
    )
    row = made["candidates"][-1]
    assert row["speedup"]["wall"] == row["speedup"]["cpu"] == pytest.approx((60 / 9) / (60 / 6), abs=1e-3)
    assert row["tokens_per_step"]["measured"] == pytest.approx(60 / 50)
    assert row["overhead"] == pytest.approx((9 / 50) / (6 / 60))
    assert [(each["name"], each["prompts"], each["speedup"]) for each in row["categories"]] == [
        ("writing", 1, 2.0), ("math", 1, 0.5),
    ]  # fmt: skip
    assert row["tokens_per_s"] == pytest.approx(60 / 9, abs=1e-3)
    assert made["plain"]["tokens_per_s"] == 10.0
    assert row["exact"] == {"prompts": 2, "equal": 2, "divergences": []}
    # These generations were made up, so they are not what the arithmetic on the base's own text says.
    assert made["warnings"] == ["fresh: decoding brought 1.200 tokens per step where the simulation says 1.000"]


def test_training_is_won_back_after_as_many_tokens_as_save_its_seconds() -> None:
    spent = {"generate_s": 30.0, "features_s": 2.0, "fit_s": 8.0, "steps": 5, "tokens": 100}
    twice = reported(eight(generation(text()[:21], 10, 1.0)), spent)["candidates"][-1]["training"]
    assert twice["break_even_tokens"] == 40 / (0.1 / 2)  # plain takes a tenth of a second a token
    assert twice["steps"] == 5
    slower = reported(eight(generation(text()[:21], 10, 3.0)), spent)["candidates"][-1]["training"]
    assert slower["break_even_tokens"] is None
    unknown = reported(eight(generation(text()[:21], 10, 1.0)), {**spent, "fit_s": None})["candidates"][-1]["training"]
    assert unknown["break_even_tokens"] is None


def test_a_speedup_that_its_own_steps_do_not_explain_refuses_the_report() -> None:
    assert reported(eight(generation(text()[:21], 10, 1.5)))["refusal"] is None
    made = reported(eight(generation(text()[:21], 10, 1.5, inside_s=1.0)))
    assert "the clocks disagree by 33.3%" in made["refusal"]
    assert (made["chosen"], made["recommendation"], made["verdict"]) == ("none", None, None)


def test_another_text_that_no_rounding_explains_refuses_the_report() -> None:
    said = list(text()[:21])
    said[7] = (said[7] + 1) % 290
    blocks = [*eight(generation(text()[:21], 10, 1.0))[1:], block("a", "x", 20, (2.0, 2.0), generation(said, 10, 1.0))]
    made = reported(blocks)
    assert made["refusal"].startswith("speculating changed the greedy text of 1 of 8 questions, and rounding")
    exact = made["candidates"][-1]["exact"]
    assert (exact["equal"], exact["divergences"][0]["prompt"], exact["divergences"][0]["index"]) == (7, "a", 7)
    assert exact["divergences"][0]["gap"] > 1e-3 and made["chosen"] == "none"


def test_plain_decoding_slower_than_generate_refuses_the_report_and_as_fast_does_not() -> None:
    question = bench.Question(Prompt("a", "x", ("?",)), IDS)
    for ours_s, refused in ((1.0, False), (1.5, True)):
        versus = bench.Versus(question, [1, 2], Clock(1.0, 1.0), [1, 2], Clock(ours_s, ours_s))
        made = reported(eight(generation(text()[:21], 10, 1.0)), versus=[versus, versus])
        assert ("transformers' own `generate`" in (made["refusal"] or "")) is refused
        native = next(row for row in made["candidates"] if row["id"] == "native")
        assert native["speedup"]["wall"] == ours_s and native["exact"]["equal"] == 2


def test_a_plain_text_that_is_never_that_of_generate_is_said() -> None:
    question = bench.Question(Prompt("a", "x", ("?",)), IDS)
    same, other = (bench.Versus(question, [1, end], Clock(1, 1), [1, 2], Clock(1, 1)) for end in (2, 3))
    assert "another text than transformers' own `generate`" in (bench.never_equal([other, other]) or "")
    assert bench.never_equal([other, same]) is None and bench.never_equal([]) is None


def test_where_two_equal_plain_runs_differ_nothing_is_called_faster() -> None:
    fast = generation(text()[:21], 10, 1.0)
    steady = reported(eight(fast))
    assert steady["aa"] == {"ratio": 1.0, "ci95": [1.0, 1.0], "ok": True} and steady["verdict"] == "faster"
    assert steady["candidates"][0]["speedup"]["wall"] == 1.0 and steady["candidates"][0]["id"] == "none"
    drifting = reported(eight(fast, (2.0, 2.6)))
    assert drifting["aa"]["ok"] is False and drifting["aa"]["ratio"] == 1.3
    assert drifting["verdict"] == drifting["candidates"][-1]["speedup"]["verdict"] == "inconclusive"
