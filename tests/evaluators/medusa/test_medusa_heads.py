"""Heads, their training and their files: zero is identity, one seed is one result, and the wrong file is refused."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_causal_lms as tiny
import torch
from safetensors.torch import load_file, save_file
from tiny_heads import KEEP

from bot.errors import EvaluationError
from evaluators.medusa import formats
from evaluators.medusa.decoding.decode import Limits, baseline, medusa
from evaluators.medusa.decoding.runners import EagerRunner
from evaluators.medusa.drafting.drafters import HeadDrafter
from evaluators.medusa.drafting.heads import Heads, HeadSpec, identity_heads, vocabulary_cut
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.speed import calibrate
from evaluators.medusa.training import distillation, simulation, train
from evaluators.medusa.trees.tree import ROOT_ONLY, chain, full, greedy_tree

TEN, THIRTY = train.Recipe(1e-3, 256, 10), train.Recipe(1e-3, 256, 30)
SPECS = {
    "shared": HeadSpec("shared", 3),
    "two blocks": HeadSpec("shared", 2, 2),
    "reduced": HeadSpec("shared", 2, keep=KEEP),
    "conditioned": HeadSpec("shared", 3, conditioned=True, keep=KEEP),
    "own": HeadSpec("own", 2),
    "own reduced deep conditioned": HeadSpec("own", 2, 3, True, KEEP),
}


def answers(base: Base, count: int = 12, tokens: int = 40) -> list[distillation.Dialogue]:
    prompts = [[(seed * 31 + step * 7) % 290 for step in range(3 + seed % 5)] for seed in range(count)]
    return distillation.self_distil(base, prompts, max_new_tokens=tokens, batch=5)


@cache
def teachable() -> tuple[Base, distillation.Features]:
    """A base whose text varies but can be learnt, and its answers."""
    base = Base(tiny.model("gqa", initializer_range=0.15), tiny.tokenizer())
    return base, distillation.stack_features(base, answers(base, 16))


@pytest.mark.parametrize("name", SPECS)
def test_untrained_heads_repeat_the_base(name: str) -> None:
    base, spec = tiny.base("gqa"), SPECS[name]
    h = torch.randn(6, base.hidden)
    following = torch.arange(6)
    logits = identity_heads(spec, base)(h, following)
    want = base.logits(h) if spec.keep is None else base.logits(h)[:, list(spec.keep)]
    for head in range(spec.heads):
        torch.testing.assert_close(logits[head], want)


@pytest.mark.parametrize("name", SPECS)
def test_every_block_is_its_own_and_follows_the_formula(name: str) -> None:
    base, spec = tiny.base("gqa"), SPECS[name]
    heads = tiny.random_heads(base, spec)
    h, following = torch.randn(4, base.hidden), torch.tensor([1, 2, 3, 4])
    got = heads(h, following)
    for head in range(spec.heads):
        row = h
        for block in range(spec.layers):
            weight, bias = formats.block(heads, head, block)
            entering = torch.cat([row, base.embed(following)], -1) if spec.conditioned and block == 0 else row
            row = row + torch.nn.functional.silu(entering @ weight.T + bias)
        unembed = heads.unembed[head] if spec.kind == "own" else heads.unembed
        torch.testing.assert_close(got[head], row @ unembed.T, rtol=1e-4, atol=1e-4)
    ranks = heads.ranks(h, following, 3)
    assert ranks.shape == (spec.heads, 4, 3)
    assert spec.keep is None or set(ranks.flatten().tolist()) <= set(spec.keep)


@pytest.mark.parametrize("name", SPECS)
def test_heads_come_back_from_disk_with_the_same_logits(name: str, tmp_path: Path) -> None:
    base, spec = tiny.base("gqa"), SPECS[name]
    heads = tiny.random_heads(base, spec)
    formats.save(heads, tmp_path, base_model="somebody/model")
    again, warnings = formats.load(tmp_path, base)
    assert (again.spec, warnings) == (spec, [])
    h, following = torch.randn(5, base.hidden), torch.arange(5)
    assert torch.equal(again(h, following), heads(h, following))
    assert not list(tmp_path.glob("*.part"))


def test_the_file_is_believed_over_its_config(tmp_path: Path) -> None:
    base = tiny.base("gqa")
    formats.save(tiny.random_heads(base, HeadSpec("shared", 5)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"medusa_num_heads": 2}))
    heads, warnings = formats.load(tmp_path, base)
    assert heads.spec.heads == 5
    assert "says 2 for medusa_num_heads, the file holds 5" in warnings[0]


def _without(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def _set(name: str, *shape: int) -> Any:
    return lambda tensors: tensors.__setitem__(name, torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.clear() or _set("x", 1)(tensors), "holds no"),
        (_without("1.0.linear.weight"), "lacks 1.0.linear.weight"),
        (_set("0.0.linear.weight", 7, 7), r"has shape \(7, 7\), but this model needs \(32, 32\)"),
        (_set("1.0.linear.weight", 7, 7), "1.0.linear.weight has shape"),
        (_set("1.0.linear.bias", 9), "1.0.linear.bias has shape"),
        (_set("1.1.weight", 555, 32), r"has shape \(555, 32\), but this model needs \(300, 32\)"),
        (_without("0.1.weight"), "lacks 0.1.weight"),
        (_set("999999999.0.linear.bias", 32), "names head 999999999"),
        (lambda tensors: tensors.update(keep=torch.tensor([1, 1, 4])), "not a list of different tokens"),
        (lambda tensors: tensors.update(keep=torch.tensor([1, 400])), "not a list of different tokens below 300"),
    ],
)
def test_a_head_file_that_does_not_fit_is_refused_with_the_reason(change: Any, says: str, tmp_path: Path) -> None:
    base = tiny.base("gqa")
    formats.save(tiny.random_heads(base, HeadSpec("own", 2)), tmp_path)
    tensors = load_file(tmp_path / formats.WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / formats.WEIGHTS)
    with pytest.raises(EvaluationError, match=says):
        formats.load(tmp_path, base)


def test_a_truncated_or_absent_head_file_is_refused(tmp_path: Path) -> None:
    base = tiny.base("gqa")
    with pytest.raises(EvaluationError, match="There is no medusa_lm_head"):
        formats.load(tmp_path, base)
    formats.save(identity_heads(HeadSpec(), base), tmp_path)
    whole = (tmp_path / formats.WEIGHTS).read_bytes()
    (tmp_path / formats.WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EvaluationError, match="not a whole safetensors file"):
        formats.load(tmp_path, base)


def test_own_heads_refuse_an_output_embedding_with_a_bias() -> None:
    model = tiny.model("gqa")
    model.lm_head.bias = torch.nn.Parameter(torch.randn(tiny.VOCAB))
    base = Base(model, tiny.tokenizer())
    with pytest.raises(EvaluationError, match="has a bias"):
        Heads(HeadSpec("own"), base)
    h = torch.randn(2, base.hidden)
    torch.testing.assert_close(identity_heads(HeadSpec(), base)(h, torch.zeros(2).long())[0], base.logits(h))


def test_batched_answers_and_their_states_are_those_of_plain_decoding() -> None:
    for kind in ("gqa", "gpt2", "opt"):
        base = tiny.base(kind)
        found = answers(base, 7, 25)
        assert len({len(dialogue.prompt) for dialogue in found}) > 2
        for dialogue in found:
            want = baseline(EagerRunner(base), dialogue.prompt, Limits(25, base.stop_ids), keep_hidden=True)
            assert list(dialogue.output) == want.tokens
            torch.testing.assert_close(dialogue.hidden, torch.stack(want.hidden), atol=1e-3, rtol=1e-3)
        assert distillation.check(base, found, sample=len(found)) == 1.0


@pytest.mark.parametrize("kind", ["gqa", "gpt2"])
def test_an_answer_in_a_batch_ends_with_its_first_stop_id_which_is_learnt_and_leaves_the_others_as_they_were(
    kind: str,
) -> None:
    base = Base(tiny.model(kind), tiny.tokenizer())
    endless = answers(base, 6, 25)
    base.stop_ids = frozenset(each.output[3 + 3 * number] for number, each in enumerate(endless[:5]))
    found = answers(base, 6, 25)
    assert len({len(each.output) for each in found}) > 2 and min(len(each.output) for each in found) > 1
    for each, whole in zip(found, endless, strict=True):
        want = baseline(EagerRunner(base), each.prompt, Limits(25, base.stop_ids), keep_hidden=True)
        assert list(each.output) == want.tokens == list(whole.output[: len(want.tokens)])
        assert not base.stop_ids & set(each.output[:-1])
        torch.testing.assert_close(each.hidden, torch.stack(want.hidden), atol=1e-3, rtol=1e-3)
    features = distillation.stack_features(base, found)
    lasts = torch.tensor(features.lengths).cumsum(0) - 1
    assert features.labels(1)[0, lasts - 1].tolist() == [each.output[-1] for each in found]
    assert features.labels(1)[0, lasts].tolist() == [distillation.IGNORED] * len(found)


def test_prompts_with_a_common_beginning_get_the_answers_they_get_alone() -> None:
    base = tiny.base("gqa")
    begin = [9, 8, 7, 6, 5]
    prompts = [[*begin, *range(20, 20 + extra)] for extra in (1, 4, 2)] + [begin]
    together = distillation.self_distil(base, prompts, max_new_tokens=20)
    alone = [distillation.self_distil(base, [prompt], max_new_tokens=20)[0] for prompt in prompts]
    assert [dialogue.output for dialogue in together] == [dialogue.output for dialogue in alone]


def test_answers_that_are_not_the_models_own_are_noticed() -> None:
    base = tiny.base("gqa")
    real = answers(base, 1)[0]
    forged = distillation.Dialogue(real.prompt, tuple((token + 1) % 290 for token in real.output), real.hidden)
    with pytest.raises(EvaluationError, match="are its own choice when replayed"):
        distillation.check(base, [forged])


def test_labels_end_with_their_answer() -> None:
    features = distillation.Features(torch.zeros(7, 2), torch.arange(10, 17), (4, 1, 2))
    assert features.labels(2).tolist() == [
        [11, 12, 13, -100, -100, 16, -100],
        [12, 13, -100, -100, -100, -100, -100],
    ]


def test_training_learns_and_one_seed_gives_one_set_of_heads() -> None:
    base, features = teachable()
    spec = HeadSpec("shared", 3, conditioned=True)
    runs = [train.fit(spec, base, features, train.TrainingOptions(THIRTY, 600, seed)) for seed in (3, 3, 4)]
    (first, training), (second, _), (third, _) = runs
    assert training.steps == training.planned_steps and training.last_loss is not None
    assert training.first_loss is not None and training.last_loss < 0.95 * training.first_loss
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.first, third.first)
    gained = simulation.simulate(first, features, chain(3))
    assert gained > simulation.simulate(identity_heads(spec, base), features, chain(3)) + 0.04


def test_training_keeps_the_epoch_that_was_best_on_held_out_answers() -> None:
    base, _ = teachable()
    dialogues = answers(base, 16)
    learn, held_out = distillation.stack_features(base, dialogues[:8]), distillation.stack_features(base, dialogues[8:])
    spec, too_fast = HeadSpec("shared", 3, conditioned=True), train.Recipe(1e-2, 64, 8)
    heads, training = train.fit(spec, base, learn, train.TrainingOptions(too_fast, 600), held_out=held_out)
    tree = greedy_tree(simulation.accuracy(heads, held_out).shares, train.COMMON_NODES)
    assert training.best_epoch is not None
    assert simulation.simulate(heads, held_out, tree) == pytest.approx(max(training.held_out))
    assert training.held_out[training.best_epoch] == max(training.held_out) > training.held_out[-1] + 0.05


def test_a_model_that_wrote_nothing_to_learn_from_leaves_the_heads_untrained() -> None:
    base = tiny.base("gqa")
    heads, training = train.fit(
        HeadSpec(), base, distillation.stack_features(base, []), train.TrainingOptions(train.QUICK, 1)
    )
    assert training.steps == 0 and not heads.first.any()


@pytest.mark.slow
def test_simulation_without_the_base_predicts_the_real_tokens_per_step() -> None:
    base = tiny.base("gqa")
    dialogues = answers(base, 5, 30)
    features = distillation.stack_features(base, dialogues)
    heads, _ = train.fit(HeadSpec("shared", 3, conditioned=True), base, features, train.TrainingOptions(TEN, 600))
    for tree in (ROOT_ONLY, chain(1), chain(3), full((2, 2))):
        steps = tokens = 0
        for dialogue in dialogues:
            trace = medusa(EagerRunner(base), HeadDrafter(heads), tree, dialogue.prompt, Limits(30, base.stop_ids))
            assert tuple(trace.tokens) == dialogue.output
            steps, tokens = steps + trace.steps, tokens + len(trace.tokens) - 1
        assert simulation.simulate(heads, features, tree) == pytest.approx(tokens / steps, rel=0.01)


def test_a_target_outside_the_draft_vocabulary_is_a_miss_but_not_in_the_loss() -> None:
    base = tiny.base("gqa")
    features = distillation.stack_features(base, answers(base, 3))
    absent = set(features.tokens.tolist())
    keep = tuple(token for token in range(tiny.VOCAB) if token not in absent)
    spec = HeadSpec("shared", 2, keep=keep)
    heads, training = train.fit(spec, base, features, train.TrainingOptions(train.QUICK, 5))
    assert training.positions == 0
    assert set(simulation.accuracy(heads, features).shares[0]) == {0.0}


def test_the_draft_vocabulary_holds_the_stop_ids_then_the_frequent_then_the_low() -> None:
    base = tiny.base("gqa")
    assert vocabulary_cut([7, 7, 7, 9, 9, 50], 6, base) == (299, 7, 9, 50, 0, 1)
    assert len(vocabulary_cut([], 1000, base)) == tiny.VOCAB


def test_no_speculation_where_the_cost_curve_cannot_win() -> None:
    base, features = teachable()
    heads, _ = train.fit(HeadSpec("shared", 3, conditioned=True), base, features, train.TrainingOptions(TEN, 600))
    dear = calibrate.CostCurve(10, "wall", ((1, 1.0), (2, 50.0), (4, 60.0), (8, 70.0)), 0.1)
    cheap = calibrate.CostCurve(10, "wall", ((1, 1.0), (2, 1.0), (4, 1.0), (8, 1.0)), 0.0)
    assert not calibrate.choose_tree(heads, features, dear).speculate
    best = calibrate.choose_tree(heads, features, cheap)
    assert best.speculate and best.tree.nodes == 8 and best.gain == best.expected
    between = calibrate.CostCurve(10, "wall", ((1, 1.0), (2, 1.01), (4, 1.02), (8, 3.0)), 0.0)
    smaller = calibrate.choose_tree(heads, features, between)
    assert smaller.speculate and smaller.tree.nodes == 4 and smaller.expected < best.expected
    assert smaller.gain == pytest.approx(smaller.expected / 1.02)
    for gain, speculate in ((1.03, True), (1.01, False)):  # a hundredth is not worth it
        expected = calibrate.choose_tree(heads, features, cheap, chain(1)).expected
        only = calibrate.CostCurve(10, "wall", ((1, 1.0), (2, expected / gain)), 0.0)
        assert calibrate.choose_tree(heads, features, only, chain(1)).speculate is speculate


def test_the_cost_curve_leaves_the_cache_as_it_was_and_interpolates() -> None:
    base = tiny.base("gqa")
    runner = EagerRunner(base)
    curve = calibrate.cost_curve(runner, identity_heads(HeadSpec(), base), 20, repeats=1)
    assert runner.length == 20 == runner.cache.get_seq_length()
    assert [width for width, _ in curve.points] == sorted(calibrate.WIDTHS) and curve.draft_ms > 0
    straight = calibrate.CostCurve(1, "wall", ((1, 2.0), (3, 4.0), (5, 8.0)), 1.0)
    assert [straight.overhead(n) for n in (1, 2, 4, 10)] == [1.0, 2.0, 3.5, 8.5]
