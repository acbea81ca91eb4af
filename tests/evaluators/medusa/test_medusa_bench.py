"""The speed check: paired runs in alternating order, and what makes of their clocks a figure one can trust."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_causal_lms as tiny

from evaluators.medusa.decoding.acceptance import Rule
from evaluators.medusa.decoding.decode import Clock, Limits, Trace
from evaluators.medusa.decoding.runners import EagerRunner
from evaluators.medusa.drafting.drafters import Drafter
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.speed import bench, conclusions, exactness
from evaluators.medusa.training.prompt_sets import Prompt
from evaluators.medusa.trees.tree import Tree, chain, full


def trace(tokens: int, steps: int, seconds: float, step_s: float | None = None) -> Trace:
    made = Trace(tokens=list(range(tokens + 1)), emitted=[1] * steps, decode=Clock(seconds, 2 * seconds))
    made.forward_s = seconds if step_s is None else steps * step_s
    return made


def block(name: str, plain_s: tuple[float, float], fast_s: float, steps: int = 10, step_s: float | None = None) -> Any:
    question = bench.Question(Prompt(name, "x", ("?",)), (1, 2))
    plain = (trace(20, 20, plain_s[0]), trace(20, 20, plain_s[1]))
    fast = (trace(20, steps, fast_s, step_s), trace(20, steps, fast_s, step_s))
    return bench.Block(question, plain, {"fresh": fast})


def test_speedup_is_the_ratio_of_summed_tokens_per_second() -> None:
    blocks = [block("a", (2.0, 2.0), 1.0), block("b", (2.0, 2.0), 3.0)]
    ratio = bench.speedup(blocks, "fresh", "wall")
    assert ratio is not None and ratio.interval is not None
    assert ratio.value == pytest.approx((80 / 8) / (80 / 8))
    assert ratio.interval == (pytest.approx(4 / 6), pytest.approx(2.0))
    rate = bench.rate(blocks, "fresh")
    assert rate is not None and rate.value == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("fast_s", "machine_ok", "says"),
    [(1.0, True, "faster"), (3.0, True, "slower"), (1.0, False, "inconclusive")],
)
def test_a_verdict_needs_the_whole_interval_and_a_steady_machine(fast_s: float, machine_ok: bool, says: str) -> None:
    blocks = [block(name, (2.0, 2.0), fast_s) for name in "abcdefgh"]

    def verdict(asked: list[bench.Block], machine_ok: bool) -> str:
        ratio = bench.speedup(asked, "fresh", "wall")
        assert ratio is not None
        return conclusions.verdict(ratio.interval, ratio.questions, machine_ok)

    assert verdict(blocks, machine_ok) == says
    assert verdict(blocks[:7], machine_ok) == "inconclusive", "too few"
    for seconds in ((1.0, 3.0, 1.5, 2.0), (1.0, 3.0, 2.5, 2.0)):  # better and worse than plain, by no certain margin
        mixed = [block(name, (2.0, 2.0), each) for name, each in zip("abcdefgh", seconds * 2, strict=True)]
        ratio = bench.speedup(mixed, "fresh", "wall")
        assert ratio is not None and ratio.interval is not None and ratio.value != 1
        assert ratio.interval[0] < 1 < ratio.interval[1] and verdict(mixed, True) == "same"
        assert verdict(mixed[:1], True) == "inconclusive"


def test_equal_work_that_takes_unequal_time_makes_the_machine_unfit() -> None:
    steady = [block(name, (2.0, 2.02), 1.0) for name in "abcd"]
    drifting = [block(name, (2.0, 2.6), 1.0) for name in "abcd"]
    assert bench.a_a_ok(bench.a_a(steady, "wall"))
    assert not bench.a_a_ok(bench.a_a(drifting, "wall"))
    assert not bench.a_a_ok(bench.a_a(steady[:1], "wall"))
    unsteady = [block(name, plain_s, 1.0) for name, plain_s in zip("abcd", ((2.0, 2.6), (2.6, 2.0)) * 2, strict=True)]
    assert not bench.a_a_ok(bench.a_a(unsteady, "wall")), "it holds 1.0, but is wider than a tenth"


def test_the_identity_of_speedup_rate_and_overhead_holds_and_a_hidden_cost_breaks_it() -> None:
    honest = [block(name, (2.0, 2.0), 1.5) for name in "ab"]
    assert bench.overhead(honest, "fresh") == pytest.approx(1.5) and bench.clock_error(honest, "fresh") is None
    hiding = [block(name, (2.0, 2.0), 1.5, step_s=0.1) for name in "ab"]  # 1.5 s passed, the steps own up to 1.0
    assert bench.clock_error(hiding, "fresh") == pytest.approx(1 / 3)


class Noting(EagerRunner):
    """Notes what is run, by the nodes of its tree."""

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        self.order: list[int] = []

    def prepare(self, drafter: Drafter | None, tree: Tree, rule: Rule, lengths: range) -> None:
        self.order.append(tree.nodes)


def test_blocks_alternate_run_everything_twice_and_stay_exact() -> None:
    base = tiny.base("gqa")
    runner = Noting(base)
    questions = [bench.Question(Prompt(str(n), "x", ("?",)), (n, 5, 9)) for n in range(3)]
    limits = Limits(20, base.stop_ids)
    candidates = [
        bench.Candidate("fresh", tiny.Always(3), full((1, 2))),
        bench.Candidate("b", tiny.Always(0), chain(2)),
    ]
    blocks = bench.run_blocks(runner, candidates, questions, limits)
    assert [b.question.prompt.id for b in blocks] == ["0", "1", "2"]
    warm_up, outside_in, inside_out = [1, 4, 3], [1, 4, 3, 3, 4, 1], [4, 3, 1, 1, 3, 4]
    assert runner.order == [*warm_up, *outside_in, *inside_out, *outside_in]
    for b in blocks:
        assert b.plain[0].tokens == b.plain[1].tokens == b.runs["fresh"][0].tokens == b.runs["b"][1].tokens
        assert min(t.decode.wall_s for t in (*b.plain, *b.runs["fresh"])) > 0
    assert exactness.divergences(base, blocks, "fresh") == []
    assert len(bench.run_blocks(runner, candidates, questions, limits, bench.Schedule(deadline=0.0))) == 1


def test_transformers_own_greedy_loop_gives_the_same_text() -> None:
    base = tiny.base("gqa")
    question = bench.Question(Prompt("1", "x", ("?",)), (4, 5, 9))
    limits = Limits(25, base.stop_ids)
    tokens, clock = bench.native(base, question, limits)
    assert tokens == bench.run_blocks(EagerRunner(base), [], [question], limits)[0].plain[0].tokens
    assert clock.wall_s > 0 and clock.cpu_s > 0


def test_a_repetition_penalty_in_the_models_own_settings_makes_no_other_baseline() -> None:
    made = tiny.model("gqa")
    made.generation_config.repetition_penalty, made.generation_config.no_repeat_ngram_size = 1.5, 2
    made.generation_config.suppress_tokens, made.generation_config.min_length = list(range(200)), 0
    made.generation_config.eos_token_id = [7, tiny.EOS]
    base, question = Base(made, tiny.tokenizer()), bench.Question(Prompt("1", "x", ("?",)), (4, 5, 9))
    said = bench.unapplied_settings(base)
    assert (
        said is not None
        and "repetition_penalty 1.5, no_repeat_ngram_size 2 and suppress_tokens, which the decoding here" in said
    )
    assert bench.unapplied_settings(tiny.base("gqa")) is None
    for limits in (Limits(25, base.stop_ids), Limits(25)):
        (versus,) = bench.against_native(base, [question], limits)
        assert versus.tokens == versus.plain_tokens
    assert made.generation_config.repetition_penalty == 1.5
