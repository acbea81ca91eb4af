"""Choice of the weight files of a folder. The oracle is `from_pretrained` of transformers on the same folder."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tiny_checkpoints import llama_tensors, load, merge, save

from bot.errors import Refused
from bot.merge.checkpoints.checkpoint import TRUSTED, UNTRUSTED, LocalFiles, open_checkpoint
from bot.merge.checkpoints.weight_files import INDEX, SINGLE

FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


def index_of(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    """Rewrite the index of a folder."""
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    index["metadata"] = {}
    (folder / INDEX).write_text(json.dumps(index))


def single_beside_an_index(folder: Path) -> None:
    save(folder, llama_tensors(0), shards=2)
    save_file(llama_tensors(1), folder / SINGLE, metadata={"format": "pt"})


def stale_index(folder: Path) -> None:
    single_beside_an_index(folder)
    for shard in (FIRST, SECOND):
        (folder / shard).unlink()


def a_tensor_beyond_the_index(folder: Path) -> None:
    save(folder, llama_tensors(0), shards=2)
    index_of(folder, lambda mapped: mapped.pop("model.norm.weight"))


def the_wrong_shard(folder: Path) -> None:
    save(folder, llama_tensors(0), shards=2)
    index_of(folder, lambda mapped: mapped.update({"model.norm.weight": FIRST, "model.embed_tokens.weight": SECOND}))


def a_tensor_in_two_shards(folder: Path) -> None:
    save(folder, llama_tensors(0), shards=2)
    held = load_file(folder / FIRST)
    more = {name: torch.randn_like(tensor) for name, tensor in [*held.items()][:2]}
    save_file({**load_file(folder / SECOND), **more}, folder / SECOND, metadata={"format": "pt"})


def a_tied_head_in_the_index_only(folder: Path) -> None:
    save(folder, llama_tensors(0, tied=True), shards=2)
    index_of(folder, lambda mapped: mapped.update({"lm_head.weight": SECOND}))


def null_metadata(folder: Path) -> None:
    save(folder, llama_tensors(0))
    raw = (folder / SINGLE).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.dumps({**json.loads(raw[8 : 8 + length]), "__metadata__": None}).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])


def a_key_twice(folder: Path) -> None:
    save(folder, llama_tensors(0))
    text = (folder / "config.json").read_text().rstrip("}")
    (folder / "config.json").write_text(
        text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1') + ', "rms_norm_eps": 0.1}'
    )


def another_variant_beside(folder: Path) -> None:
    save(folder, llama_tensors(0))
    save_file(llama_tensors(1), folder / "model.fp16.safetensors", metadata={"format": "pt"})


ODD = (
    single_beside_an_index, stale_index, a_tensor_beyond_the_index, the_wrong_shard, a_tensor_in_two_shards,
    a_tied_head_in_the_index_only, null_metadata, a_key_twice, another_variant_beside,
)  # fmt: skip
SAFE_FOR_STRANGERS = (single_beside_an_index, stale_index, null_metadata, another_variant_beside)


@pytest.mark.slow
@pytest.mark.parametrize("make", ODD)
def test_what_transformers_loads_is_what_is_merged(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "a")
    made = merge("merge_method: passthrough\nmodels: [{model: a}]", tmp_path, tmp_path / "out")
    models = []
    for part in ("a", "out"):
        model, report = hf.LlamaForCausalLM.from_pretrained(tmp_path / part, output_loading_info=True)
        assert not report["missing_keys"]
        models.append(model)
    ids = torch.tensor([[3, 5, 7, 11]])
    torch.testing.assert_close(models[1](ids).logits, models[0](ids).logits, rtol=0, atol=0)
    assert make is null_metadata or "SOURCE_ODD" in {notice.code for notice in made.notices}


@pytest.mark.parametrize("make", ODD)
def test_an_index_or_config_at_odds_with_itself_is_refused_for_a_stranger(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / "a")
    if make in SAFE_FOR_STRANGERS:
        open_checkpoint(LocalFiles(tmp_path / "a"), limits=UNTRUSTED)
        return
    with pytest.raises(Refused) as caught:
        open_checkpoint(LocalFiles(tmp_path / "a"), limits=UNTRUSTED)
    assert caught.value.code == "BAD_CHECKPOINT"


@pytest.mark.parametrize("limits", [TRUSTED, UNTRUSTED], ids=["operator", "stranger"])
def test_a_config_that_names_other_weights_is_refused(limits: Any, tmp_path: Path) -> None:
    save(tmp_path / "a", llama_tensors(0), transformers_weights="other.safetensors")
    with pytest.raises(Refused) as caught:
        open_checkpoint(LocalFiles(tmp_path / "a"), limits=limits)
    assert "other.safetensors" in caught.value.message
    save(tmp_path / "a", llama_tensors(0), transformers_weights=SINGLE)
    open_checkpoint(LocalFiles(tmp_path / "a"), limits=limits)


def test_weights_that_transformers_does_not_find_are_taken_with_a_notice(tmp_path: Path) -> None:
    save(tmp_path / "a", llama_tensors(0))
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / "model.fp16.safetensors")
    merged = merge("merge_method: passthrough\nmodels: [{model: a}]", tmp_path, tmp_path / "out")
    assert any("transformers only opens model.safetensors" in notice.text for notice in merged.notices)
    assert set(load(tmp_path / "out")) == set(llama_tensors(0))
