"""config.json, tokenizer files and names are as hostile as headers: each is taken, or refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_vocabulary import LINEAR, SHARED, model
from tiny_checkpoints import llama_tensors, plan_of, save

from bot.errors import MergebotError, Refused
from bot.merge.checkpoints.checkpoint import UNTRUSTED, LocalFiles, open_checkpoint
from bot.merge.recipe import reading as recipe

anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda child: st.lists(child, max_size=3) | st.dictionaries(st.text(max_size=5), child, max_size=3),
    max_leaves=6,
)
CONFIG_KEYS = [
    "num_hidden_layers", "model_type", "vocab_size", "tie_word_embeddings", "dtype", "torch_dtype", "layer_types",
    "text_config", "quantization_config", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "architectures",
]  # fmt: skip
TOKENIZER_KEYS = ["added_tokens", "model", "version", "normalizer", "pre_tokenizer"]
PAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def planned_or_refused(text: str, folder: Path) -> None:
    try:
        plan_of(text, folder)
    except MergebotError as error:
        assert "\n" not in error.message
        assert error.next_step
        assert len(str(error)) < 900


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    model(tmp_path / "a", 1, SHARED, bos_token_id=1, eos_token_id=2)
    model(tmp_path / "x", 2, SHARED[::-1], ["<|a|>"], bos_token_id=14)
    return tmp_path


def changed(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("names", [1, True, "LlamaForCausalLM", {"a": 1}, [None, 3]])
def test_a_list_of_classes_that_is_none_is_planned_or_refused_in_a_sentence(pair: Path, names: Any) -> None:
    changed(pair / "a" / "config.json", {"architectures": names})
    planned_or_refused(LINEAR, pair)


@pytest.mark.parametrize(
    "changes",
    [
        {"text_config": True, "num_hidden_layers": None},
        {"text_config": 3, "num_hidden_layers": None, "layer_types": 7},
        {"num_hidden_layers": None, "model_type": "gemma3_text", "layer_types": True},
        {"model_type": ["gemma3"], "mlp_only_layers": True},
        {"model_type": "qwen3_moe", "decoder_sparse_step": "x", "mlp_only_layers": 3},
        {"model_type": "gemma3_text", "sliding_window_pattern": [1], "layer_types": None},
        {"first_k_dense_replace": {}, "moe_layer_freq": "1"},
    ],
)
def test_layer_rules_of_a_wrong_type_are_planned_or_refused_in_a_sentence(pair: Path, changes: dict[str, Any]) -> None:
    changed(pair / "a" / "config.json", changes)
    planned_or_refused("merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]", pair)


@PAST
@given(st.dictionaries(st.sampled_from(CONFIG_KEYS), anything, min_size=1, max_size=2))
def test_any_config_is_planned_or_refused_in_a_sentence(pair: Path, changes: dict[str, Any]) -> None:
    path = pair / "a" / "config.json"
    before = path.read_text()
    changed(path, changes)
    try:
        planned_or_refused(LINEAR + "tokenizer: {source: union}", pair)
        planned_or_refused("merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]", pair)
    finally:
        path.write_text(before)


@PAST
@given(st.sampled_from(["a", "x"]), st.dictionaries(st.sampled_from(TOKENIZER_KEYS), anything, min_size=1, max_size=2))
def test_any_tokenizer_is_planned_or_refused_in_a_sentence(pair: Path, name: str, changes: dict[str, Any]) -> None:
    path = pair / name / "tokenizer.json"
    before = path.read_text()
    changed(path, changes)
    try:
        planned_or_refused(LINEAR + "tokenizer: {source: union}", pair)
    finally:
        path.write_text(before)


@PAST
@given(
    st.sampled_from(["generation_config.json", "tokenizer_config.json", "config.json", "tokenizer.json"]),
    st.one_of(anything.map(json.dumps), st.text(max_size=20), st.just("[" * 100_000), st.just('{"a":' * 50_000)),
)
def test_any_text_in_place_of_a_json_file_is_planned_or_refused_in_a_sentence(pair: Path, file: str, text: str) -> None:
    path = pair / "x" / file
    before = path.read_text() if path.exists() else None
    path.write_text(text, errors="surrogatepass")
    try:
        planned_or_refused(LINEAR.replace("base_model: a", "base_model: x") + "tokenizer: {source: union}", pair)
        planned_or_refused(LINEAR + "tokenizer_source: union\nchat_template: auto", pair)
    finally:
        path.unlink() if before is None else path.write_text(before)


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"\x00", b"", b"null", b"[]", b'"x"', b"{", b"\xef\xbb\xbf{}"])
def test_a_config_that_is_no_json_object_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    folder = save(tmp_path / "m", llama_tensors(0))
    (folder / "config.json").write_bytes(content)
    with pytest.raises(Refused) as caught:
        open_checkpoint(LocalFiles(folder))
    assert "config.json" in caught.value.message


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", llama_tensors(0), shards=2)
    first, second = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    second.write_bytes(first.read_bytes())
    with pytest.raises(Refused) as caught:
        open_checkpoint(LocalFiles(folder), limits=UNTRUSTED)
    assert caught.value.code == "BAD_CHECKPOINT"
    assert "model-0000" in caught.value.message


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", llama_tensors(0))
    (folder / "model.safetensors").unlink()
    with pytest.raises(MergebotError) as caught:
        LocalFiles(folder).read("model.safetensors", 0, 8)
    assert caught.value.message.startswith(f"model.safetensors of {folder} cannot be read")


NAMES = [
    "%2e%2e/x", "o/%2e%2e", "..%2fx/y", "C:\\x", "C:/x", "\\\\server\\share", "o\\a", "o/" + "a" * 300, "~/x",
    "a" * 97 + "/b", "o/\u202emodel", "o/mo\u200bdel", "o/\u0430", "./o/a", "o//a", "/o/a", "o/a/", "o/a?x=1", "o/a#x",
    "file:///etc/passwd", "git@h:o/a", "o/a.git", "$HOME/x", "o/a\\n", "o/a@../x", "o/a@", "@x", "o/a@b@c", "o/a@-x y",
    "o/a@%00",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_that_is_no_repo_reaches_no_disk(name: str) -> None:
    text = json.dumps({"merge_method": "linear", "models": [{"model": name, "parameters": {"weight": 1}}]})
    with pytest.raises(Refused) as caught:
        recipe.parse(text, trust="stranger")
    assert caught.value.code in ("NOT_A_REPO_ID", "RECIPE_INVALID")
