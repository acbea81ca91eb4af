"""Models with different vocabularies meet by token, never by row number."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_checkpoints import HIDDEN, llama_tensors, load, merge, plan_of, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from bot.errors import Refused

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHARED = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(13))]


def tokenizer(words: Sequence[str], added: Sequence[str] = ()) -> dict[str, Any]:
    """A whole-word tokenizer; `added` come behind the words as special tokens."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    entries = [{"id": len(words) + i, "content": token, **flags} for i, token in enumerate(added)]
    vocabulary = {word: i for i, word in enumerate(words)}
    return {
        "version": "1.0", "added_tokens": entries, "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None, "decoder": None, "truncation": None, "padding": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }  # fmt: skip


def model(
    folder: Path,
    seed: int,
    words: Sequence[str],
    added: Sequence[str] = (),
    *,
    rows: int | None = None,
    tied: bool = False,
    **config: Any,
) -> dict[str, torch.Tensor]:
    """A tiny llama with a tokenizer of its own; `rows` may pad or cut its matrices."""  # fmt: skip
    count = rows or len(words) + len(added)
    tensors = llama_tensors(seed, tied=tied)
    draw = torch.Generator().manual_seed(100 + seed)
    for name in [EMBEDDING] if tied else [EMBEDDING, HEAD]:
        tensors[name] = torch.randn(count, HIDDEN, generator=draw)
    save(folder, tensors, vocab_size=count, **config)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(words, added)))
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    own = {"tokenizer_class": "PreTrainedTokenizerFast", **specials}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    return tensors


def ids_of(folder: Path) -> Mapping[str, int]:
    document = json.loads((folder / "tokenizer.json").read_text())
    return {**document["model"]["vocab"], **{e["content"]: e["id"] for e in document["added_tokens"]}}


LINEAR = """
merge_method: linear
base_model: a
models:
- {model: a, parameters: {weight: 0.25}}
- {model: x, parameters: {weight: 0.75}}
parameters: {normalize: false}
"""


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """`a` with 16 words, padded to 20 rows; `x` with the words permuted, one missing, three tokens more."""
    a = model(tmp_path / "a", 1, SHARED, rows=20, bos_token_id=1, eos_token_id=2)
    x = model(tmp_path / "x", 2, [*SHARED[:3], *reversed(SHARED[3:15]), "new"], ["<|a|>", "<|b|>"])
    return tmp_path, a, x


def test_the_union_keeps_every_token_and_merges_rows_by_token(pair: tuple[Path, Any, Any]) -> None:
    folder, a, x = pair
    merge(LINEAR + "tokenizer_source: union", folder, folder / "out")
    ids, ids_a, ids_x = ids_of(folder / "out"), ids_of(folder / "a"), ids_of(folder / "x")
    assert set(ids) == set(ids_a) | set(ids_x)
    assert {token: ids[token] for token in ids_a} == dict(ids_a), "the base's ids stay"
    out = load(folder / "out")
    for name in (EMBEDDING, HEAD):
        assert out[name].shape == (20, HIDDEN), "padding rows of the base survive or are used"
        for token, k in ids.items():
            row_a = a[name][ids_a[token]] if token in ids_a else x[name][ids_x[token]]
            row_x = x[name][ids_x[token]] if token in ids_x else a[name][ids_a[token]]
            torch.testing.assert_close(out[name][k], 0.25 * row_a + 0.75 * row_x)
    free = sorted(set(range(20)) - set(ids.values()))
    mean = out[EMBEDDING][sorted(ids.values())].mean(0)
    torch.testing.assert_close(out[EMBEDDING][free], mean.expand(len(free), HIDDEN))
    assert json.loads((folder / "out" / "config.json").read_text())["vocab_size"] == 20


@pytest.mark.slow
def test_a_model_with_a_united_vocabulary_loads_and_generates(pair: tuple[Path, Any, Any]) -> None:
    folder, _, _ = pair
    merge(LINEAR + "tokenizer: {source: union, pad_to_multiple_of: 32}", folder, folder / "out")
    words = AutoTokenizer.from_pretrained(folder / "out")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32)
    assert loaded.get_input_embeddings().weight.shape[0] == 32
    batch = words("w3 new <|b|>", return_tensors="pt")
    assert words.unk_token_id not in batch["input_ids"][0].tolist()
    assert words.decode(batch["input_ids"][0]).split() == ["w3", "new", "<|b|>"]
    assert loaded.generate(**batch, max_new_tokens=3, do_sample=False).shape[1] == batch["input_ids"].shape[1] + 3


def test_the_base_vocabulary_leaves_its_tokenizer_alone(pair: tuple[Path, Any, Any]) -> None:
    folder, a, _ = pair
    merge(LINEAR + "tokenizer: {source: base}", folder, folder / "out")
    assert (folder / "out" / "tokenizer.json").read_bytes() == (folder / "a" / "tokenizer.json").read_bytes()
    ids_x = ids_of(folder / "x")
    row = load(folder / "out")[EMBEDDING][SHARED.index("w12")]
    assert "w12" not in ids_x
    torch.testing.assert_close(row, a[EMBEDDING][SHARED.index("w12")])


def test_another_models_vocabulary_brings_its_tokenizer_and_remaps_special_ids(tmp_path: Path) -> None:
    model(tmp_path / "a", 1, SHARED, bos_token_id=1, eos_token_id=[2, 3])
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "do_sample": True}))
    model(tmp_path / "x", 2, SHARED[::-1], bos_token_id=14, eos_token_id=13)
    merge(LINEAR + "tokenizer: {source: x}", tmp_path, tmp_path / "out")
    ids = ids_of(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["bos_token_id"] == ids["<s>"]
    assert config["eos_token_id"] == [ids["</s>"], ids["w0"]]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": ids["</s>"], "do_sample": True}


def test_single_tokens_can_be_given_forced_zeroed_or_invented(pair: tuple[Path, Any, Any]) -> None:
    folder, a, x = pair
    rules = (
        "tokenizer: {source: union, tokens: {w1: {source: x, force: true}, w2: {source: {kind: zero}, force: true},"
        " new: {source: {kind: model_token, model: a, token: w5}}, fresh: {source: {kind: model_token, model: x,"
        " token_id: 4}}, empty: {}}}"
    )
    merge(LINEAR + rules, folder, folder / "out")
    out, ids, ids_a, ids_x = (
        load(folder / "out")[HEAD],
        ids_of(folder / "out"),
        ids_of(folder / "a"),
        ids_of(folder / "x"),
    )
    torch.testing.assert_close(out[ids["w1"]], x[HEAD][ids_x["w1"]])
    torch.testing.assert_close(out[ids["w2"]], torch.zeros(HIDDEN))
    torch.testing.assert_close(out[ids["new"]], 0.25 * a[HEAD][ids_a["w5"]] + 0.75 * x[HEAD][ids_x["new"]])
    torch.testing.assert_close(out[ids["fresh"]], x[HEAD][4])
    torch.testing.assert_close(out[ids["empty"]], torch.zeros(HIDDEN))
    with pytest.raises(Refused, match="no token 'nowhere'"):
        plan_of(LINEAR + "tokenizer: {tokens: {nowhere: {source: x}}}", folder)


def test_tokens_beyond_the_matrix_do_not_exist_and_a_tied_source_lends_its_embedding(tmp_path: Path) -> None:
    a = model(tmp_path / "a", 1, SHARED, ["<|a|>"], rows=16)  # its last token has no row
    x = model(tmp_path / "x", 2, SHARED[::-1], ["<|a|>"], tied=True)
    merge(LINEAR + "tokenizer: {source: base}", tmp_path, tmp_path / "out")
    out = load(tmp_path / "out")
    assert out[HEAD].shape[0] == 17
    torch.testing.assert_close(out[HEAD][16], x[EMBEDDING][16])
    torch.testing.assert_close(out[HEAD][3], 0.25 * a[HEAD][3] + 0.75 * x[EMBEDDING][12])


def test_equal_vocabularies_pass_untouched(tmp_path: Path) -> None:
    for seed, name in enumerate("ax"):
        model(tmp_path / name, seed, SHARED, rows=24)
    planned, _ = plan_of(LINEAR + "tokenizer: {source: union}", tmp_path)
    assert all(step.work.aligned is None for step in planned.steps)
    assert planned.texts == {}


def test_a_source_without_a_tokenizer_is_taken_to_use_the_donors(tmp_path: Path) -> None:
    model(tmp_path / "a", 1, SHARED)
    model(tmp_path / "x", 2, SHARED)
    (tmp_path / "x" / "tokenizer.json").unlink()
    planned, _ = plan_of(LINEAR + "tokenizer: {source: union}", tmp_path)
    assert "TOKENIZER_ASSUMED" in {notice.code for notice in planned.notices}
    (tmp_path / "a" / "tokenizer.json").unlink()
    with pytest.raises(Refused) as caught:
        plan_of(LINEAR + "tokenizer: {source: base}", tmp_path)
    assert caught.value.code == "NOT_SUPPORTED"


def test_the_most_common_chat_template_wins_and_a_raw_one_is_written_as_it_is(tmp_path: Path) -> None:
    for seed, name in enumerate("axb"):
        model(tmp_path / name, seed, SHARED)
        config = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        config["chat_template"] = (
            "{{ 'rare' }} " if name == "a" else [{"name": "default", "template": "{{ 'common' }}"}]
        )
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))
    text = LINEAR.replace("parameters: {norm", "- {model: b, parameters: {weight: 1}}\nparameters: {norm")
    merge(text + "chat_template: auto", tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ 'common' }}"
    assert "chat_template" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    raw = "{% for m in messages %}{{ m.content }}{% endfor %}"
    merge(text + f'chat_template: "{raw}"', tmp_path, tmp_path / "raw")
    assert (tmp_path / "raw" / "chat_template.jinja").read_text() == raw
    with pytest.raises(Refused):
        plan_of(text + "chat_template: chatmol", tmp_path)


UNITED = """
merge_method: linear
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.5}}
tokenizer_source: %s
"""


def test_an_empty_token_of_another_model_shifts_no_ids(tmp_path: Path) -> None:
    model(tmp_path / "a", 1, SHARED)
    other = model(tmp_path / "b", 2, ["<unk>", "<s>", "</s>", "", "rare"])
    merge(UNITED % "union", tmp_path, tmp_path / "out")
    ids, loaded = ids_of(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert ids == loaded
    assert torch.equal(load(tmp_path / "out")[EMBEDDING][ids["rare"]], other[EMBEDDING][4])


def test_token_ids_of_the_language_model_inside_follow_their_tokens(tmp_path: Path) -> None:
    model(tmp_path / "a", 1, SHARED, image_token_index=5, text_config={"eos_token_id": [2, 5], "vocab_size": 16})
    model(tmp_path / "b", 2, SHARED[::-1])
    merge(UNITED % "b", tmp_path, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["image_token_index"] == 10
    assert config["text_config"]["eos_token_id"] == [13, 10]


_SMALL = {"vocab_size": 16, "num_hidden_layers": 2, "tie_word_embeddings": False}
_ENCODER = {
    **_SMALL,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 20,
}
_PER_TOKEN = {
    "BertForMaskedLM": (
        _ENCODER, {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias", "cls.predictions.decoder.weight"}
    ),
    "RobertaForMaskedLM": (
        _ENCODER, {"roberta.embeddings.word_embeddings.weight", "lm_head.bias", "lm_head.decoder.weight"}
    ),
    "DistilBertForMaskedLM": (
        {"vocab_size": 16, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12, "tie_word_embeddings": False},
        {"distilbert.embeddings.word_embeddings.weight", "vocab_projector.bias", "vocab_projector.weight"},
    ),
    "MambaForCausalLM": ({**_SMALL, "hidden_size": 8, "state_size": 4}, {"backbone.embeddings.weight"}),
    "BartForConditionalGeneration": (
        {
            "vocab_size": 16, "d_model": 8, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "tie_word_embeddings": False,
        },
        {"model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", _PER_TOKEN)
def test_whatever_has_a_row_for_every_token_is_aligned_in_any_family(kind: str, tmp_path: Path) -> None:
    config, names = _PER_TOKEN[kind]
    architecture = getattr(transformers, kind)
    for seed, (folder, words) in enumerate([("a", SHARED), ("b", SHARED[::-1])]):
        torch.manual_seed(seed)
        made = architecture(architecture.config_class(**config))
        for weight in made.parameters():
            weight.data.normal_()
        made.save_pretrained(tmp_path / folder)
        (tmp_path / folder / "tokenizer.json").write_text(json.dumps(tokenizer(words)))
    merge(UNITED % "a", tmp_path, tmp_path / "out")
    a, b, out = (load(tmp_path / folder) for folder in ("a", "b", "out"))
    assert names <= set(out)
    for name in names:
        assert torch.allclose(out[name], (a[name] + b[name].flip(0)) / 2, atol=1e-6), name
