"""Base and parents: whole or absent, the same for the same seed, and a fine-tune that really learns its skill."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bot.demo import base, parents, replay, skills
from bot.demo.parents import Schedule
from bot.errors import Failed

SCHEDULE = Schedule(layers=2, steps=200, rows=40, rate=5e-3)


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A three-layer Llama with a tokenizer that knows every word of the skills; random weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("family") / "base"
    split = pre_tokenizers.WhitespaceSplit()
    texts = [question.text for skill in skills.ALL for question in (*skill.train, *skill.test)] + replay.prompts()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<end>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")
    wrapped.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def _share_known(model: Path, skill: skills.Skill) -> float:
    """How many of the training statements the saved model completes rightly, among the skill's eight answers."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    answers = torch.tensor([tokenizer(answer).input_ids[0] for answer in skill.answers])
    right = 0
    with torch.no_grad():
        for question in skill.train:
            logits = loaded(torch.tensor([tokenizer(question.prompt).input_ids])).logits[0, -1, answers]
            right += int(logits.argmax()) == question.answer
    return right / len(skill.train)


@pytest.mark.slow
def test_a_parent_learns_its_skill_and_keeps_everything_it_does_not_train(tiny_base: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int, float]] = []
    out = parents.train(
        tiny_base, skills.CRESTS, tmp_path / "parent", lambda *step: told.append(step), schedule=SCHEDULE
    )
    assert _share_known(tiny_base, skills.CRESTS) < 0.4 < 0.9 < _share_known(out, skills.CRESTS)
    assert [step[:2] for step in told] == [(n + 1, 200) for n in range(200)]
    assert told[-1][2] < told[0][2] - 0.5
    before, after = load_file(tiny_base / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert set(before) == set(after)
    assert changed == {
        f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in (1, 2) for part in ("gate", "up", "down")
    }
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert (out / "tokenizer.json").read_bytes() == (tiny_base / "tokenizer.json").read_bytes()
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n") and f"base_model: {base.REPO}\n" in card
    assert str(tmp_path) not in card and str(tmp_path) not in (out / "config.json").read_text()


def _strayed(model: Path, tiny_base: Path) -> float:
    """How far the saved model's words are from the base's on the base's own conversations: mean KL divergence, nats."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    before, after = (LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (tiny_base, model))
    with torch.no_grad():
        apart = [
            torch.nn.functional.kl_div(
                after(row[None]).logits[0].log_softmax(-1),
                before(row[None]).logits[0].log_softmax(-1),
                reduction="batchmean",
                log_target=True,
            )
            for row in replay.conversations(tiny_base, before, tokenizer)
        ]
    return float(torch.stack(apart).mean())


@pytest.mark.slow
def test_a_parent_held_to_the_base_still_talks_like_it(tiny_base: Path, tmp_path: Path) -> None:
    strayed = {
        hold: _strayed(
            parents.train(
                tiny_base,
                skills.CRESTS,
                tmp_path / str(hold),
                schedule=Schedule(layers=2, steps=60, rows=40, rate=5e-3, hold=hold),
            ),
            tiny_base,
        )
        for hold in (0.0, 0.5)
    }
    assert strayed[0.5] < strayed[0.0] / 2


def test_the_distance_from_the_base_is_the_variance_of_the_change_of_all_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    head, change = (torch.randn(rows, 6, generator=generator, dtype=torch.float64) for rows in (50, 9))
    slow = (change @ head.T).var(dim=1, unbiased=False).mean()
    assert torch.allclose(parents._distance(change, parents._logit_metric(head)), slow)


def test_the_conversations_are_different_questions_made_once_and_end_where_the_base_ended(
    tiny_base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    folder.symlink_to(tiny_base)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), LlamaForCausalLM.from_pretrained(folder)
    made = replay.conversations(folder, model, tokenizer)
    assert len(made) == len(set(replay.prompts())) == replay.ROWS
    for prompt, row in zip(replay.prompts(), made, strict=True):
        asked = tokenizer(prompt).input_ids
        said = row[len(asked) :].tolist()
        assert row[: len(asked)].tolist() == asked
        assert 0 < len(said) <= replay.ANSWER_TOKENS
        assert tokenizer.eos_token_id not in said[:-1]
        assert len(said) == replay.ANSWER_TOKENS or said[-1] == tokenizer.eos_token_id
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "base-replay.json"]
    kept = replay.conversations(folder, None, None)
    assert all(torch.equal(one, two) for one, two in zip(made, kept, strict=True))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tiny_base: Path, tmp_path: Path) -> None:
    short = Schedule(layers=2, steps=6, rows=32, rate=3e-3)
    made = {
        name: parents.train(tiny_base, skills.SMITHS, tmp_path / name, seed=seed, schedule=short)
        for name, seed in (("one", 3), ("two", 3), ("three", 4))
    }
    weights = {name: (folder / "model.safetensors").read_bytes() for name, folder in made.items()}
    assert weights["one"] == weights["two"] != weights["three"]


class Stop(Exception):
    """Raised by a caller's progress in the middle of the work."""


def test_a_training_that_stops_leaves_nothing_behind(tiny_base: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, loss: float) -> None:
        raise Stop

    with pytest.raises(Stop):
        parents.train(tiny_base, skills.CRESTS, tmp_path / "parent", stop, schedule=SCHEDULE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_base_model_is_a_plain_llama_that_speaks_english(tmp_path_factory: pytest.TempPathFactory) -> None:
    try:
        base._gguf()
    except Failed as missing:
        pytest.skip(str(missing))
    cache = tmp_path_factory.mktemp("cache")
    folder = base.build(cache)
    assert [path.name for path in cache.iterdir()] == [folder.name]
    assert base.build(cache) == folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model) is LlamaForCausalLM and model.config.tie_word_embeddings
    asked = tokenizer("The capital of France is", return_tensors="pt")
    said = model.generate(**asked, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(said[0]) == "The capital of France is Paris"
    text = "Ünïcode, 12345 and\n\ttabs 🦙 survive."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    for path in folder.glob("*.json"):
        assert str(cache) not in path.read_text()
