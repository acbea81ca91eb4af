"""Training from prompts to files: killed runs end with the same bytes, leaks are named, joint training says so."""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny_causal_lms as tiny
import torch
from transformers import AutoModelForCausalLM

from bot.errors import EvaluationError
from evaluators.content import content_digest
from evaluators.medusa import formats
from evaluators.medusa.drafting.heads import HeadSpec, identity_heads
from evaluators.medusa.model import causal_lm
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.speed import transfer
from evaluators.medusa.speed.evaluation import measure
from evaluators.medusa.speed.run import Given, SpeedOptions
from evaluators.medusa.training import distillation, joint, prompt_sets, store, train, training_file
from evaluators.medusa.training.head_loss import Targets, draft_loss
from evaluators.medusa.training.head_training import HeadTrainingConfig, train_heads
from evaluators.medusa.training.prompt_sets import Prompt
from evaluators.medusa.trees.tree import greedy_tree
from tests import forked

FIXED = HeadTrainingConfig(heads=2, vocab=64, steps=12, answers=8, answer_tokens=10, batch=4, checkpoint_s=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("model"), tiny.model("gqa", initializer_range=0.15))


def weights(folder: Path) -> bytes:
    return (folder / formats.WEIGHTS).read_bytes()


def die(at: tuple[str, int], stage: str, done: int, _total: int) -> None:
    """A progress that kills its own process, as kill -9 does, at a point of the training."""
    if (stage, done) == at:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("at", [("generate", 36), ("fit", 3), ("fit", 12), ("joint", 5)], ids=str)
def test_a_killed_training_ends_with_the_bytes_of_an_undisturbed_one(
    model: Path, tmp_path: Path, at: tuple[str, int]
) -> None:
    wanted = replace(FIXED, joint=at[0] == "joint")
    want = train_heads(model, tmp_path / "whole", tmp_path / "cache of the whole", wanted)
    out, cache = tmp_path / "out", tmp_path / "cache"
    assert forked.status(partial(train_heads, model, out, cache, wanted, progress=partial(die, at))) == -signal.SIGKILL
    assert not (out / formats.WEIGHTS).exists()
    again: list[tuple[str, int]] = []
    facts = train_heads(model, out, cache, wanted, progress=lambda stage, done, total: again.append((stage, done)))
    assert weights(out) == weights(tmp_path / "whole")
    assert facts["resumed"] == 1 and not (out / "unfinished").exists()
    assert facts["held_out"] == want["held_out"]
    if at[0] == "fit":
        assert min((done for stage, done in again if stage == "fit"), default=12) > at[1] - 2
    if wanted.joint:
        name = "adapter/adapter_model.safetensors"
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_questions_that_given_heads_were_trained_on_are_not_timed(model: Path, tmp_path: Path) -> None:
    asked = [f"How does a {thing} work?" for thing in ("lock", "loom", "lens", "lever")]
    lines = [json.dumps({"turns": [each]}) for each in asked]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines))
    train_heads(model, tmp_path / "heads", tmp_path / "cache", replace(FIXED, prompts=tmp_path / "asked.jsonl"))
    given = [Given("heads", "fresh", tmp_path / "heads")]
    learnt = transfer.learnt_prompts(given)
    seen, unseen = Prompt("seen", "", ("Else.", " how does A  lens work?")), Prompt("unseen", "", ("Else.",))
    assert prompt_sets.unlearnt([seen, unseen], learnt) == ([unseen], ["seen"])
    (tmp_path / "asked.jsonl").write_text(lines[2])
    with pytest.raises(EvaluationError, match="trained on every one of these questions"):
        measure(model, tmp_path / "out", SpeedOptions(prompts=tmp_path / "asked.jsonl", given=given))


def test_one_seed_gives_one_set_of_heads_and_answers_are_computed_once(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = train_heads(model, tmp_path / "a", cache, FIXED)
    files = {file.name: file.stat().st_ino for file in cache.iterdir()}
    second = train_heads(model, tmp_path / "b", cache, FIXED)
    assert {file.name: file.stat().st_ino for file in cache.iterdir()} == files and len(files) == 3
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    train_heads(model, tmp_path / "c", cache, replace(FIXED, seed=1))
    assert weights(tmp_path / "c") != weights(tmp_path / "a")
    assert [point["step"] for point in first["curve"]] == [point["step"] for point in second["curve"]]
    assert greedy_tree(first["accuracy"], 16).paths == greedy_tree(second["accuracy"], 16).paths
    written = json.loads((tmp_path / "a" / "training.json").read_text())
    assert written == json.loads(json.dumps(first)) and written["steps"] == 12 and written["prompts"] == 8
    assert 0 < written["coverage"] <= 1 and {"load", "generate", "fit", "total"} <= set(written["seconds"])


def test_a_budget_ends_a_training_and_a_model_without_a_template_gets_plain_text(tmp_path: Path) -> None:
    plain = tiny.write(tmp_path / "plain", tiny.model("gpt2"), template=None)
    facts = train_heads(
        plain, tmp_path / "out", tmp_path / "cache", HeadTrainingConfig(3.0, heads=2, vocab=None, batch=8)
    )
    assert facts["chat_template"] is False and facts["heads"]["kept_vocab"] is None and facts["coverage"] == 1.0
    assert facts["steps"] > 0 and facts["seconds"]["total"] < 30
    assert 0 < facts["shortened_prompts"] <= facts["prompts"], "64 positions hold few of our prompts and their answers"
    heads, _ = formats.load(tmp_path / "out", causal_lm.load(plain))
    assert heads.spec == HeadSpec("shared", 2, conditioned=True)


def test_a_training_prompt_that_is_a_test_prompt_is_dropped_and_named(model: Path, tmp_path: Path) -> None:
    def lines(*texts: str) -> str:
        return "".join(json.dumps({"question_id": text, "category": "x", "turns": [text]}) + "\n" for text in texts)

    (tmp_path / "train.jsonl").write_text(lines(*(f"Say {n}" for n in range(9)), "say  TEN"))
    (tmp_path / "test.jsonl").write_text(
        '{"question_id": 1, "category": "x", "turns": ["Something else.", "Say ten"]}\n'
    )
    asked = replace(FIXED, prompts=tmp_path / "train.jsonl", test=tmp_path / "test.jsonl", answers=99)
    facts = train_heads(model, tmp_path / "out", tmp_path / "cache", asked)
    assert facts["dropped_prompts"] == ["say  TEN"] and facts["prompts"] == 8
    (tmp_path / "train.jsonl").write_text(lines("Say ten"))
    with pytest.raises(EvaluationError, match="No training prompt is left"):
        train_heads(model, tmp_path / "none", tmp_path / "cache", asked)


def test_a_training_stops_early_once_held_out_answers_gain_nothing() -> None:
    base = tiny.base("gqa")
    dialogues = distillation.self_distil(base, [[n, n + 1, n + 2] for n in range(12)], max_new_tokens=20)
    learn, held_out = distillation.stack_features(base, dialogues[:8]), distillation.stack_features(base, dialogues[8:])
    options = train.TrainingOptions(train.Recipe(1e-2, 16, 40), 600, scores=40, patience=3)
    _, made = train.fit(HeadSpec("shared", 2), base, learn, options, held_out=held_out)
    assert made.best_epoch is not None and made.steps < made.planned_steps
    assert len(made.held_out) == made.best_epoch + 1 + 3
    assert [rate for _, _, rate in made.curve] == list(made.held_out)


def test_joint_training_changes_the_model_by_an_adapter_that_peft_would_load(model: Path, tmp_path: Path) -> None:
    facts = train_heads(model, tmp_path / "out", tmp_path / "cache", replace(FIXED, joint=True))
    assert facts["joint"]["changes_the_model"] is True and facts["joint"]["steps"] == 12
    assert 0 < facts["joint"]["kl"] < 0.5 and 0.5 < facts["joint"]["same_choice"] <= 1.0
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and {"q_proj", "down_proj"} <= set(config["target_modules"])
    assert "lm_head" not in config["target_modules"]
    frozen = train_heads(model, tmp_path / "frozen", tmp_path / "cache", FIXED)
    assert facts["held_out"] == frozen["held_out"], "the heads began the same"
    assert facts["accuracy"] != frozen["accuracy"], "what they guess of the changed model is another thing"


def test_an_adapter_switched_off_is_the_original() -> None:
    base = Base(tiny.model("gqa"), tiny.tokenizer())
    ids = torch.tensor([[5, 6, 7, 8]])
    before = base.run(ids, use_cache=False)[1]
    dialogues = distillation.self_distil(base, [[n, n + 1] for n in range(8)], max_new_tokens=12)
    heads = identity_heads(HeadSpec("shared", 2), base)
    made = joint.fit(base, heads, dialogues, train.TrainingOptions(joint.RECIPE, 600, steps=10))
    assert not torch.equal(base.run(ids, use_cache=False)[1], before)
    made.adapter.enable(False)
    assert torch.equal(base.run(ids, use_cache=False)[1], before)


def test_the_joint_loss_is_the_divergence_from_the_original_and_a_growing_share_of_the_heads_loss() -> None:
    base = Base(tiny.model("gqa"), tiny.tokenizer())
    dialogues = distillation.self_distil(base, [[n, *range(20, 21 + n)] for n in range(5)], max_new_tokens=9)
    features, heads = distillation.stack_features(base, dialogues), identity_heads(HeadSpec("shared", 2), base)
    adapter = joint.Adapter(base, seed=0)
    task, every = joint._JointTask(base, adapter, heads, dialogues), torch.arange(len(dialogues))

    def loss(done: float) -> float:
        return float(task.loss(every, done).detach())

    assert loss(0.0) == pytest.approx(0, abs=1e-4), "nothing is changed, the heads do not count yet"
    guesses = draft_loss(heads, features.hidden[:], features.tokens, Targets.certain(features.labels(2)))
    for done, share in ((0.2, 0.1), (0.4, 0.2), (1.0, 0.2)):
        assert loss(done) == pytest.approx(share * float(guesses.detach()), rel=1e-3)
    draw = torch.Generator().manual_seed(0)
    for layer in adapter.layers.values():
        layer.lora_B["default"].weight.data.normal_(std=0.05, generator=draw)
    apart = []
    for text in dialogues:  # each alone and without padding
        said = []
        for changed in (False, True):
            adapter.enable(changed)
            logits = base.run(torch.tensor([[*text.prompt, *text.output[:-1]]]), use_cache=False)[1]
            said.append(logits[0, len(text.prompt) - 1 :].log_softmax(-1))
        apart.append((said[0].exp() * (said[0] - said[1])).sum(-1))
    divergence = float(torch.cat(apart).mean().detach())
    assert divergence > 0.01 and loss(0.0) == pytest.approx(divergence, rel=1e-3)


def test_the_merge_engine_applies_the_adapter(model: Path, tmp_path: Path) -> None:
    from bot.merge.checkpoints.checkpoint import LocalFiles
    from bot.merge.checkpoints.lora import open_source
    from bot.merge.execution import stages
    from bot.merge.planning import planner
    from bot.merge.recipe import reading

    base = causal_lm.load(model)
    dialogues = distillation.self_distil(base, [[n, n + 1] for n in range(8)], max_new_tokens=12)
    made = joint.fit(
        base, identity_heads(HeadSpec("shared", 2), base), dialogues, train.TrainingOptions(joint.RECIPE, 600, steps=10)
    )
    made.adapter.save(tmp_path / "adapter", base_model="model")
    text = f"{{merge_method: passthrough, models: [{{model: {model}+{tmp_path / 'adapter'}}}], dtype: float32}}"
    recipe = reading.parse(text)
    folders = {ref: Path(ref.path) for ref in recipe.repos}
    planned = planner.make(recipe, {ref: open_source(LocalFiles(folder)) for ref, folder in folders.items()})
    stages.merge(planned, folders, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, base.run(ids, use_cache=False)[1], atol=1e-4, rtol=1e-4)


def test_the_store_is_bounded_and_a_damaged_file_counts_as_absent(tmp_path: Path) -> None:
    kept = store.Store(tmp_path, limit_bytes=3000)
    for number, name in enumerate(("old", "used", "new")):
        kept.put(name, {"x": torch.full((300,), float(number))})
        os.utime(tmp_path / f"{name}.safetensors", (number + 1, number + 1))
        assert kept.get("used") is None or kept.get("used")["x"][0] == 1  # type: ignore[index]
    assert sorted(file.stem for file in tmp_path.iterdir()) == ["new", "used"]
    (tmp_path / "new.safetensors").write_bytes(b"\x10" * 99)
    assert kept.get("new") is None and kept.get("old") is None


def test_what_another_process_makes_room_for_is_there_or_absent_and_never_an_error(tmp_path: Path) -> None:
    kept, greedy = store.Store(tmp_path), store.Store(tmp_path, limit_bytes=0)
    done = threading.Event()

    def make_room() -> None:
        while not done.is_set():
            greedy.put("another", {"x": torch.zeros(1)})

    other = threading.Thread(target=make_room)
    other.start()
    try:
        for number in range(200):
            kept.put("mine", {"x": torch.full((9,), float(number))})
            found = kept.get("mine")
            assert found is None or found["x"][0] == number
    finally:
        done.set()
        other.join()


def test_rows_on_disk_are_those_in_memory() -> None:
    parts = [torch.randn(n, 4) for n in (3, 0, 5, 1)]
    rows, whole = store.Rows(parts, 4), torch.cat(parts)
    assert len(rows) == 9
    for wanted in (slice(2, 7), slice(0, 100), torch.tensor([8, 0, 3, 3, 2])):
        assert torch.equal(rows[wanted], whole[wanted])


def test_features_of_another_model_are_never_taken(model: Path, tmp_path: Path) -> None:
    other = tiny.write(tmp_path / "other", tiny.model("gqa", seed=1, initializer_range=0.15))
    assert content_digest(model) != content_digest(other)
    cache = tmp_path / "cache"
    train_heads(model, tmp_path / "a", cache, FIXED)
    before = len(list(cache.iterdir()))
    train_heads(other, tmp_path / "b", cache, FIXED)
    assert len(list(cache.iterdir())) == 2 * before
    assert json.loads((tmp_path / "b" / "training.json").read_text())["schema"] == training_file.SCHEMA
