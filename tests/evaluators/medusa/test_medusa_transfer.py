"""Heads on a merged model, and a benchmark that cannot flatter itself: what moves, what is caught, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_causal_lms as tiny
import torch
from test_medusa_bench import block, trace
from test_medusa_report import assert_whole

from bot.errors import EvaluationError
from bot.merge.recipe import reading
from bot.merge.recipe.spec import ModelRef
from bot.stages import merged_heads
from evaluators import medusa
from evaluators.medusa import formats
from evaluators.medusa.decoding.decode import Clock, Limits
from evaluators.medusa.decoding.decode import baseline as plain_run
from evaluators.medusa.decoding.runners import EagerRunner
from evaluators.medusa.drafting.drafters import HeadDrafter
from evaluators.medusa.drafting.heads import HeadSpec, identity_heads
from evaluators.medusa.model import causal_lm
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.speed import bench, calibrate, rows, timing, transfer
from evaluators.medusa.speed.report import Report
from evaluators.medusa.speed.run import Given, Run, SpeedOptions
from evaluators.medusa.training import distillation, prompt_sets, simulation, train
from evaluators.medusa.training.prompt_sets import Prompt
from evaluators.medusa.trees.tree import ROOT_ONLY, Tree, chain

SPEC = HeadSpec("shared", 3, conditioned=True)


def asked(count: int) -> list[bench.Question]:
    return [bench.Question(Prompt(str(n), "x", ("?",)), (n, 5, 9, 40 + n)) for n in range(count)]


class Slowed(EagerRunner):
    """Plain steps that do other things as well; tree steps that do not."""

    def forward(self, tokens: torch.Tensor, tree: Tree) -> tuple[torch.Tensor, torch.Tensor]:
        if tree.nodes == 1:
            for _ in range(12):
                torch.ones(300, 300) @ torch.ones(300, 300)
        return super().forward(tokens, tree)


def test_a_plain_loop_that_was_slowed_is_caught_by_transformers_own_generate() -> None:
    base = tiny.base("gqa")
    limits = Limits(24, base.stop_ids)
    for runner, slow in ((EagerRunner(base), False), (Slowed(base), True)):
        bench.against_native(base, asked(1), limits, runner=runner)  # warm
        versus = bench.against_native(base, asked(2), limits, runner=runner)
        assert [each.tokens == each.plain_tokens for each in versus] == [True, True]
        assert bench.baseline_is_slow(versus, "cpu") is slow
    assert not bench.baseline_is_slow([], "cpu")


class Unasked:
    """Heads that must not be asked: where nothing is speculated, nothing may be drafted."""

    def propose(self, h: torch.Tensor, root: int, seen: Sequence[int], tree: Tree) -> torch.Tensor:
        raise AssertionError("something was drafted")


def test_where_no_tree_can_win_nothing_is_speculated_and_nothing_is_lost() -> None:
    base = tiny.base("gqa")
    text = distillation.stack_features(base, distillation.self_distil(base, [[1, 2, 3], [4, 5, 6]], max_new_tokens=30))
    dear = calibrate.CostCurve(10, "cpu", ((1, 10.0), (2, 40.0), (4, 41.0), (8, 42.0)), 1.0)
    choice = calibrate.choose_tree(identity_heads(SPEC, base), text, dear)
    assert not choice.speculate and choice.gain < 1
    nothing = bench.Candidate("nothing", Unasked(), ROOT_ONLY)
    least: dict[tuple[str, int], float] = {}
    ratio = 0.0
    for _ in range(16):  # others use this machine, too; the least of many runs is what the work itself takes
        blocks = bench.run_blocks(EagerRunner(base), [nothing], asked(2), Limits(50))
        for number, each in enumerate(blocks):
            assert all(trace.steps == len(trace.tokens) - 1 for trace in each.runs["nothing"])
            for name, traces in (("plain", each.plain), ("nothing", each.runs["nothing"])):
                seconds = min(trace.decode.cpu_s for trace in traces)
                least[name, number] = min(seconds, least.get((name, number), seconds))
        plainly, nothing_s = (sum(least[name, number] for number in (0, 1)) for name in ("plain", "nothing"))
        ratio = plainly / nothing_s
        if abs(ratio - 1) <= 0.02:
            break
    assert ratio == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("fast_s", "chosen"), [(3.0, "none"), (1.0, "fresh")])
def test_what_was_measured_overrules_what_calibration_promised(fast_s: float, chosen: str) -> None:
    base = tiny.base("gqa")
    heads = identity_heads(SPEC, base)
    text = distillation.stack_features(base, distillation.self_distil(base, [[1, 2, 3], [4, 5, 6]], max_new_tokens=20))
    cheap = calibrate.CostCurve(10, "cpu", ((1, 10.0), (2, 10.1), (4, 10.2)), 0.1)
    promised = calibrate.Choice(chain(2), 1.9, 1.1, 1.7, True)
    fresh = transfer.HeadSet("fresh", "fresh", heads, choice=promised)
    questions = [bench.Question(Prompt(name, "x", ("?",)), (1, 2)) for name in "abcdefgh"]
    plain = (tiny_trace(base, 2.0), tiny_trace(base, 2.0))
    fast = (tiny_trace(base, fast_s), tiny_trace(base, fast_s))
    blocks = [bench.Block(question, plain, {"fresh": fast}) for question in questions]
    compared = rows.Compared([fresh], heads, chain(2), text, text, cheap)
    made = rows.completed(Report(), rows.Measured(base, blocks, (), 20, 0), compared)
    assert made.chosen == chosen
    assert made.verdict == ("faster" if chosen == "fresh" else "slower")
    assert (made.recommendation == "do not speculate") is (chosen == "none")


def test_a_short_budget_gives_short_answers_and_fewer_questions(tmp_path: Path) -> None:
    base = tiny.base("gqa")
    heads = identity_heads(SPEC, base)
    choice = calibrate.Choice(chain(2), 1.0, 1.1, 0.9, False)
    sets = [transfer.HeadSet("fresh", "fresh", heads, choice=choice)]
    run = Run(tmp_path, tmp_path, SpeedOptions(budget_s=0.05), lambda stage, done, total: None)
    run.note(seconds={"load": 0.0, "calibrate": 0.0})
    limits, blocks = timing.time_candidates(run, base, asked(8), sets, EagerRunner(base))
    assert limits.max_new_tokens == timing.LEAST_TIMED_TOKENS == 16 and 1 <= len(blocks) < 8
    assert list(blocks[0].runs) == ["fresh"], "no time for prompt lookup"


def tiny_trace(base: Base, seconds: float) -> Any:
    """A generation whose text is the base's own and whose clocks say `seconds`."""
    made = plain_run(EagerRunner(base), (1, 2), Limits(21))
    made.decode = Clock(seconds, seconds)
    made.forward_s, made.draft_s, made.accept_s = seconds, 0.0, 0.0
    return made


def test_heads_merged_with_themselves_by_the_recipe_of_the_models_keep_all_they_gained(tmp_path: Path) -> None:
    base = Base(tiny.model("gqa", initializer_range=0.15), tiny.tokenizer())
    text = distillation.stack_features(
        base, distillation.self_distil(base, [[n, 2 * n, 7] for n in range(1, 14)], max_new_tokens=30)
    )
    fresh, _ = train.fit(SPEC, base, text, train.TrainingOptions(train.Recipe(2e-3, 64, 8), 60))
    parents = {ModelRef(name): tmp_path / name for name in ("left", "right")}
    for folder in parents.values():
        formats.save(fresh, folder)
    recipe = "{merge_method: slerp, base_model: left, models: [{model: right}], parameters: {t: 0.3}}"
    merged, warnings = formats.load(merged_heads.merge(reading.parse(recipe), parents, tmp_path / "out"), base)
    assert warnings == [] and merged.spec == fresh.spec
    for mine, theirs in zip(merged.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    of_merged, of_fresh, floor = (
        [shares[0] for shares in simulation.accuracy(heads, text, 1).shares]
        for heads in (merged, fresh, identity_heads(SPEC, base))
    )
    assert of_merged == of_fresh and of_fresh[0] > floor[0]


def test_a_model_without_memory_left_on_its_device_is_refused(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "model", tiny.model("gqa"))
    with pytest.raises(EvaluationError) as refused:
        causal_lm.load(folder, "mps")
    assert refused.value.code == "MODEL_UNLOADABLE"


def test_training_goes_on_from_where_heads_were() -> None:
    base = Base(tiny.model("gqa", initializer_range=0.15), tiny.tokenizer())
    text = distillation.stack_features(
        base, distillation.self_distil(base, [[n, 2 * n, 7] for n in range(1, 14)], max_new_tokens=30)
    )
    start, _ = train.fit(SPEC, base, text, train.TrainingOptions(train.Recipe(1e-3, 64, 2), 60))
    kept = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    still, _ = train.fit(SPEC, base, text, train.TrainingOptions(train.Recipe(0.0, 64, 1), 60), initial=start)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in still.state_dict().items())
    further, training = train.fit(SPEC, base, text, train.TrainingOptions(train.Recipe(1e-3, 64, 2), 60), initial=start)
    first, _ = train.fit(SPEC, base, text, train.TrainingOptions(train.Recipe(1e-3, 64, 1), 60))
    assert not torch.equal(further.first, start.first)
    assert training.first_loss is not None and training.first_loss < 12
    assert simulation.accuracy(further, text).shares[0][0] >= simulation.accuracy(first, text).shares[0][0]
    assert all(torch.equal(tensor, kept[name]) for name, tensor in start.state_dict().items())


def test_the_second_turn_continues_the_plain_answer_and_counts_with_its_first() -> None:
    base = tiny.base("gqa")
    prompt = Prompt("p", "x", ("Say something.", "Say more."))
    first = bench.Question(prompt, tuple(prompt_sets.encode(base, prompt.turns[0])))

    def following(question: bench.Question, answer: Any) -> bench.Question | None:
        if question.answers:
            return None
        said = base.tokenizer.decode(list(answer))
        return bench.Question(
            prompt, tuple(prompt_sets.encode(base, prompt.turns[1], [(prompt.turns[0], said)])), (said,)
        )

    candidates = [bench.Candidate("c", tiny.Always(3), chain(2))]
    blocks = bench.run_blocks(EagerRunner(base), candidates, [first], Limits(8), bench.Schedule(2, following))
    assert len(blocks) == 2 and [len(b.plain) for b in blocks] == [4, 4] and len(blocks[1].runs["c"]) == 4
    text = base.tokenizer.decode(list(blocks[1].question.ids))
    assert text.endswith("[user] Say more.\n[assistant] ")
    assert f"[assistant] {base.tokenizer.decode(blocks[0].plain[0].tokens)}\n" in text
    both = [block("a", (2.0, 2.0), 1.0), block("a", (2.0, 2.0), 3.0)]
    ratio = bench.speedup(both, "fresh", "wall")
    assert ratio is not None and ratio.interval is None, "two turns of one prompt are one question"


def test_what_is_spoken_while_timing_is_text_to_judge_any_heads_on() -> None:
    base = tiny.base("gqa")
    heads = tiny.random_heads(base, HeadSpec("shared", 2))
    tree = Tree(((0,), (1,), (0, 0)))
    blocks = bench.run_blocks(EagerRunner(base), [bench.Candidate("h", HeadDrafter(heads), tree)], asked(3), Limits(30))
    said = distillation.stack_features(base, bench.baseline_answers(base, blocks))
    assert said.lengths == tuple(len(b.plain[0].tokens) for b in blocks)
    measured = bench.rate(blocks, "h")
    assert measured is not None and simulation.simulate(heads, said, tree) == pytest.approx(measured.value)
    assert trace(5, 5, 1.0).hidden == []


@pytest.mark.slow
def test_parents_heads_merged_heads_and_fresh_ones_stand_in_one_report(tmp_path: Path) -> None:
    model = tiny.model("gqa", initializer_range=0.15, max_position_embeddings=512)
    folder = tiny.write(tmp_path / "model", model)
    base = causal_lm.load(folder)
    for name, spec in (("left", SPEC), ("right", HeadSpec("shared", 2)), ("merged", SPEC)):
        formats.save(tiny.random_heads(base, spec), tmp_path / name)
    wide = Base(tiny.model("gqa", hidden_size=48), tiny.tokenizer())
    formats.save(identity_heads(SPEC, wide), tmp_path / "wide")
    given = [
        Given("parent:left", "parent", tmp_path / "left"),
        Given("parent:right", "parent", tmp_path / "right", source="org/right"),
        Given("parent:wide", "parent", tmp_path / "wide"),
        Given("parent:none", "parent", None, "it brings no heads."),
        Given("merged", "merged", tmp_path / "merged"),
    ]
    measured = medusa.measure(
        folder, tmp_path / "out", medusa.SpeedOptions(budget_s=20, questions=3, max_new_tokens=24, given=given)
    )
    assert_whole(measured)
    rows = {row["id"]: row for row in measured["candidates"]}
    assert list(rows) == [
        "none", "native", "prompt_lookup", "identity", "parent:left", "parent:right", "parent:wide", "parent:none",
        "merged", "merged_tuned", "fresh",
    ]  # fmt: skip
    assert "48" in rows["parent:wide"]["absent_because"] and rows["parent:wide"]["accuracy"] == []
    assert (
        rows["parent:none"]["absent_because"] == "it brings no heads." and rows["parent:right"]["source"] == "org/right"
    )
    for name in ("parent:left", "parent:right", "merged", "merged_tuned", "fresh"):
        row = rows[name]
        assert len(row["accuracy"]) == (2 if name == "parent:right" else 3)
        assert row["tokens_per_step"]["common_tree"] >= 1 and row["speedup"]["predicted_here"] > 0
    timed = [name for name, row in rows.items() if row["tokens_per_step"]["measured"] is not None]
    assert "fresh" in timed and len({"parent:left", "parent:right", "merged", "merged_tuned"} & set(timed)) == 1
    assert rows["merged_tuned"]["training"]["steps"] > 0 and rows["merged"]["training"]["steps"] is None
    assert any("nothing says how long the heads of parent:left" in warning for warning in measured["warnings"])
    assert "heads made for this model" in measured["transfer"] and measured["transfer"] in measured["sentence"]
    assert (tmp_path / "out" / "merged_tuned" / "training.json").is_file()


@pytest.mark.slow
def test_given_heads_are_timed_untrained_upon_and_such_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "model", tiny.model("llama", max_position_embeddings=512))
    formats.save(tiny.random_heads(causal_lm.load(folder), SPEC), tmp_path / "own")
    given = [Given("heads:own", "fresh", tmp_path / "own")]
    measured = medusa.measure(
        folder,
        tmp_path / "out",
        medusa.SpeedOptions(budget_s=12, questions=2, max_new_tokens=16, given=given, runner=Slowed),
    )
    assert_whole(measured)
    rows = {row["id"]: row for row in measured["candidates"]}
    assert list(rows) == ["none", "native", "prompt_lookup", "identity", "heads:own"]
    assert rows["heads:own"]["training"]["steps"] is None and not (tmp_path / "out" / "heads").exists()
    assert "transformers' own `generate`" in measured["refusal"], "the plain loop was slowed"
    narrow = tiny.write(tmp_path / "narrow", tiny.model("llama", hidden_size=16))
    with pytest.raises(EvaluationError, match="shape"):
        medusa.measure(narrow, tmp_path / "again", medusa.SpeedOptions(budget_s=12, given=given))
