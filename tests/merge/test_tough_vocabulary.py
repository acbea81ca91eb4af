"""A mess of vocabularies with real tokenizers (tough case 7 of merging.md 6), as in practice, scaled down.

`base` is padded, `more` has seven tokens more and its ids permuted, `tied` has no head and an id beyond its matrix.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import load, merge
from tokenizers import AddedToken, Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bot.errors import Refused
from tests.family import byte_tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHTS = {"base": 0.5, "more": 0.3, "tied": 0.2}
NEW = [f"<|new{i}|>" for i in range(7)]
TEXT = """
merge_method: linear
base_model: base
models:
- {model: base, parameters: {weight: 0.5}}
- {model: more, parameters: {weight: 0.3}}
- {model: tied, parameters: {weight: 0.2}}
parameters: {normalize: false}
dtype: float32
"""


def permuted(plain: PreTrainedTokenizerFast, added: list[str]) -> PreTrainedTokenizerFast:
    """The same byte tokens under other ids, and further special tokens."""
    document = json.loads(plain.backend_tokenizer.to_str())
    vocabulary: dict[str, int] = document["model"]["vocab"]
    count = len(vocabulary)
    document["model"]["vocab"] = {token: (i * 7 + 3) % count for token, i in vocabulary.items()}
    core = Tokenizer.from_str(json.dumps(document))
    core.add_special_tokens([AddedToken(token, special=True) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def model(folder: Path, seed: int, words: PreTrainedTokenizerFast, rows: int, *, tied: bool) -> dict[str, Tensor]:
    """A real tiny llama beside its tokenizer."""
    torch.manual_seed(seed)
    ids = {f"{kind}_token_id": getattr(words, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    if tied:
        ids = {}
    config = LlamaConfig(
        vocab_size=rows, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, **ids,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    stored = load(folder)
    return {EMBEDDING: stored[EMBEDDING], HEAD: stored.get(HEAD, stored[EMBEDDING])}


@pytest.fixture(scope="module")
def mess(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("mess")
    plain = byte_tokenizer()
    count = len(plain)
    beyond = permuted(plain, ["<|beyond|>"])
    assert len(beyond) == count + 1
    return folder, {
        "base": model(folder / "base", 0, plain, count + 29, tied=False),  # 259 tokens in 288 rows
        "more": model(folder / "more", 1, permuted(plain, NEW), count + 7, tied=False),
        "tied": model(folder / "tied", 2, beyond, count, tied=True),  # its last token has no row
    }


@functools.cache
def ids_of(folder: Path) -> Mapping[str, int]:
    return AutoTokenizer.from_pretrained(folder).get_vocab()


def expected(token: str, name: str, folder: Path, stored: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """Own row where there is one, else the base's, else the mean of those that have it."""
    have = {}
    for source in WEIGHTS:
        k = ids_of(folder / source).get(token)
        if k is not None and k < len(stored[source][name]):
            have[source] = stored[source][name][k]
    fill = have.get("base", torch.stack(list(have.values())).mean(0)) if have else torch.zeros(16)
    return sum((weight * have.get(source, fill) for source, weight in WEIGHTS.items()), start=torch.zeros(16))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "rows"),
    [
        ("tokenizer_source: union", 288), ("tokenizer_source: base", 288),
        ("tokenizer: {source: union, pad_to_multiple_of: 64}", 320),
        ("tokenizer: {source: base, pad_to_multiple_of: 16}", 272),
        ("tokenizer: {source: more}", 266),
    ],
)  # fmt: skip
def test_a_mess_of_vocabularies_merges_by_token_loads_and_generates(
    rule: str, rows: int, mess: tuple[Path, dict[str, dict[str, Tensor]]], tmp_path: Path
) -> None:
    folder, stored = mess
    merge(TEXT + rule, folder, tmp_path / "out")
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids, out = words.get_vocab(), load(tmp_path / "out")
    known = [set(ids_of(folder / source)) for source in WEIGHTS]
    assert known[0] <= set(ids)
    if "union" in rule:
        assert set(ids) >= known[0] | known[1]
    for name in (EMBEDDING, HEAD):
        assert out[name].shape[0] == rows
        for token, k in ids.items():
            torch.testing.assert_close(out[name][k], expected(token, name, folder, stored), msg=f"{token!r} in {name}")
    config: dict[str, Any] = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == rows
    assert config["tie_word_embeddings"] is False
    assert config["bos_token_id"] == ids["<s>"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(loaded.get_output_embeddings().weight, out[HEAD])
    batch = words("Hello there" + (NEW[3] if NEW[3] in ids else ""), return_tensors="pt", return_token_type_ids=False)
    assert words.decode(batch["input_ids"][0]).startswith("Hello there")
    grown = loaded.generate(**batch, max_new_tokens=4, do_sample=False)
    assert grown.shape[1] > batch["input_ids"].shape[1]
    assert int(grown.max()) < rows


@pytest.mark.slow
def test_without_a_rule_unequal_vocabularies_are_refused_with_the_way_out(
    mess: tuple[Path, dict[str, dict[str, Tensor]]], tmp_path: Path
) -> None:
    folder, _ = mess
    with pytest.raises(Refused) as caught:
        merge(TEXT, folder, tmp_path / "out")
    assert caught.value.code == "SHAPE_MISMATCH"
    assert "tokenizer" in caught.value.next_step
    assert all(source in caught.value.message for source in WEIGHTS)


@pytest.mark.slow
def test_a_nan_in_one_row_does_not_reach_padding_rows(
    mess: tuple[Path, dict[str, dict[str, Tensor]]], tmp_path: Path
) -> None:
    folder, _ = mess
    for source in WEIGHTS:
        (tmp_path / source).symlink_to(folder / source)
    (tmp_path / "more").unlink()
    (tmp_path / "more").mkdir()
    for file in (folder / "more").iterdir():
        (tmp_path / "more" / file.name).write_bytes(file.read_bytes())
    tensors = load(folder / "more")
    tensors[EMBEDDING][5, 3] = float("nan")
    save_file(tensors, tmp_path / "more" / "model.safetensors", metadata={"format": "pt"})
    merge(TEXT + "tokenizer: {source: union, pad_to_multiple_of: 64}", tmp_path, tmp_path / "out")
    assert int((~load(tmp_path / "out")[EMBEDDING].isfinite()).sum()) == 1
