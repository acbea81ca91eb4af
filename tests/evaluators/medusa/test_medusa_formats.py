"""Heads on disk in the layouts of others: what goes out comes back, and what does not fit is refused by reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_causal_lms as tiny
import torch
from safetensors.torch import load_file, save_file
from tiny_heads import CUT, DEEP, KEEP, OWN, SHARED, refusal

from evaluators.medusa import formats
from evaluators.medusa.drafting.heads import HeadSpec
from evaluators.medusa.formats import Format
from evaluators.medusa.model.causal_lm import Base

OWN_CUT = HeadSpec("own", 2, keep=KEEP)
CONDITIONED = HeadSpec("shared", 2, conditioned=True)
logits = tiny.draft_logits


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny.base("gqa")


@pytest.mark.parametrize(
    ("fmt", "spec"),
    [
        ("ours", SHARED), ("ours", CUT), ("ours", CONDITIONED), ("ours", OWN_CUT), ("v1", OWN), ("v1", SHARED),
        ("v1", DEEP), ("v2", SHARED), ("v2", DEEP), ("tgi", SHARED), ("tgi", DEEP), ("tgi", OWN), ("vllm", SHARED),
        ("vllm", CUT), ("vllm", OWN), ("vllm", OWN_CUT), ("vllm", DEEP),
    ],
)  # fmt: skip
def test_what_is_exported_comes_back_with_the_same_logits(
    base: Base, tmp_path: Path, fmt: Format, spec: HeadSpec
) -> None:
    heads = tiny.random_heads(base, spec)
    formats.save(heads, tmp_path / "out", fmt, base_model="somebody/model")
    again, _ = formats.load(tmp_path / "out", base)
    assert again.spec == spec
    assert torch.equal(logits(again, base), logits(heads, base))


@pytest.mark.parametrize("fmt", ["v1", "v2", "tgi"])
def test_a_cut_that_a_format_does_not_know_is_dropped_and_said(base: Base, tmp_path: Path, fmt: Format) -> None:
    heads = tiny.random_heads(base, CUT)
    notes = formats.save(heads, tmp_path / "out", fmt)
    again, _ = formats.load(tmp_path / "out", base)
    assert any("vocabulary of 5 tokens was dropped" in note for note in notes)
    torch.testing.assert_close(logits(again, base)[..., list(KEEP)], logits(heads, base))


@pytest.mark.parametrize(
    ("fmt", "spec"),
    [("v1", CONDITIONED), ("v2", CONDITIONED), ("tgi", CONDITIONED), ("vllm", CONDITIONED), ("v1", OWN_CUT),
     ("tgi", OWN_CUT), ("v2", OWN)],
)  # fmt: skip
def test_a_variant_that_a_format_cannot_carry_is_refused_before_a_file_is_written(
    base: Base, tmp_path: Path, fmt: Format, spec: HeadSpec
) -> None:
    error = refusal(lambda: formats.save(tiny.random_heads(base, spec), tmp_path / "out", fmt))
    assert error.code == "HEADS_UNSUPPORTED"
    assert not (tmp_path / "out").exists()


def test_the_config_for_tgi_names_no_architecture_and_vllm_gets_every_key_it_reads(base: Base, tmp_path: Path) -> None:
    formats.save(tiny.random_heads(base, SHARED), tmp_path / "tgi", "tgi", base_model="somebody/model")
    told = json.loads((tmp_path / "tgi" / "config.json").read_text())
    assert "architectures" not in told and told["base_model_name_or_path"] == "somebody/model"
    assert [path.name for path in (tmp_path / "tgi").glob("*.safetensors")] == ["medusa_lm_head.safetensors"]
    shallow = load_file(tmp_path / "tgi" / formats.WEIGHTS)
    assert told["version"] == "2" and all(".linear." in name for name in shallow)
    formats.save(tiny.random_heads(base, DEEP), tmp_path / "deep", "tgi")  # its V2 reader takes one block a head
    deep = load_file(tmp_path / "deep" / formats.WEIGHTS)
    assert {name for name in deep if ".linear." not in name} == {"0.2.weight", "1.2.weight"}
    formats.save(tiny.random_heads(base, CUT), tmp_path / "vllm", "vllm")
    told = json.loads((tmp_path / "vllm" / "config.json").read_text())
    assert (told["model_type"], told["num_heads"], told["truncated_vocab_size"]) == ("medusa", 2, len(KEEP))
    assert (told["medusa_fc_bias"], told["original_lm_head"]) == (True, True)
    tensors = load_file(tmp_path / "vllm" / "model.safetensors")
    assert tensors["token_map"].tolist() == list(KEEP)
    assert {name for name in tensors if name.startswith("lm_heads")} == {"lm_heads.0.weight"}


@pytest.mark.parametrize(("kind", "scale"), [("hyperclovax", 0.3), ("nanochat", 1.0), ("gqa", 1.0)])
def test_the_config_for_vllm_says_what_the_model_multiplies_its_logits_by(
    kind: str, scale: float, tmp_path: Path
) -> None:
    formats.save(tiny.random_heads(tiny.base(kind), SHARED), tmp_path, "vllm")
    assert json.loads((tmp_path / "config.json").read_text())["logit_scale"] == pytest.approx(scale)


def test_the_heads_of_a_whole_model_are_taken_out_of_it(base: Base, tmp_path: Path) -> None:
    heads = tiny.random_heads(base, OWN)
    formats.save(heads, tmp_path, "v1")
    inside = {f"medusa_head.{name}": tensor for name, tensor in load_file(tmp_path / formats.WEIGHTS).items()}
    (tmp_path / formats.WEIGHTS).unlink()
    save_file({**inside, "model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    again, warnings = formats.load(tmp_path, base)
    assert torch.equal(logits(again, base), logits(heads, base))
    assert any("full model" in warning for warning in warnings)


def test_five_stored_heads_count_though_the_config_says_two(base: Base, tmp_path: Path) -> None:
    formats.save(tiny.random_heads(base, HeadSpec("shared", 5)), tmp_path, "v2")
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**told, "medusa_num_heads": 2}))
    heads, warnings = formats.load(tmp_path, base)
    assert heads.spec.heads == 5 and any("2" in warning and "5" in warning for warning in warnings)


def test_blocks_that_are_one_become_blocks_of_their_own_with_a_warning(base: Base, tmp_path: Path) -> None:
    formats.save(tiny.random_heads(base, DEEP), tmp_path, "v2")
    tensors = load_file(tmp_path / formats.WEIGHTS)
    for part in ("weight", "bias"):
        tensors[f"1.1.linear.{part}"] = tensors[f"1.0.linear.{part}"].clone()
    save_file(tensors, tmp_path / formats.WEIGHTS)
    heads, warnings = formats.load(tmp_path, base)
    assert any("head 1 are equal" in warning for warning in warnings)
    heads.first.data[1].zero_()
    assert heads.more.data[1].any()


def test_sixteen_bit_and_mixed_heads_are_read_in_float32(base: Base, tmp_path: Path) -> None:
    heads = tiny.random_heads(base, SHARED)
    formats.save(heads, tmp_path, "v2", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / formats.WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    tensors["0.0.linear.weight"] = tensors["0.0.linear.weight"].to(torch.float16)
    save_file(tensors, tmp_path / formats.WEIGHTS)
    again, _ = formats.load(tmp_path, base)
    torch.testing.assert_close(logits(again, base), logits(heads, base), rtol=0.05, atol=0.1)


def test_the_heads_of_a_sharded_model_are_found_by_its_index(base: Base, tmp_path: Path) -> None:
    heads = tiny.random_heads(base, OWN)
    formats.save(heads, tmp_path, "v1")
    tensors = {f"medusa_head.{name}": tensor for name, tensor in load_file(tmp_path / formats.WEIGHTS).items()}
    (tmp_path / formats.WEIGHTS).unlink()
    halves = [dict(list(tensors.items())[:3]), dict(list(tensors.items())[3:])]
    index = {"model.embed_tokens.weight": "model-absent.safetensors"}
    for number, half in enumerate(halves):
        save_file({**half, f"model.layers.{number}.x": torch.ones(2)}, tmp_path / f"model-{number}.safetensors")
        index |= dict.fromkeys(half, f"model-{number}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    again, _ = formats.load(tmp_path, base)
    assert torch.equal(logits(again, base), logits(heads, base))
    for wrong, says in (
        ({"medusa_head.x": "../up.safetensors"}, "not a shard in the same"),
        ({"a": "b"}, "without heads"),
    ):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": wrong}))
        assert says in refusal(lambda: formats.load(tmp_path, base)).message


def test_vllm_heads_may_have_all_rows_beside_a_token_map_a_prefix_or_no_output_embedding(
    base: Base, tmp_path: Path
) -> None:
    heads = tiny.random_heads(base, CUT)
    formats.save(heads, tmp_path, "vllm")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_heads.0.weight"] = base.output.weight.detach().clone()
    save_file({f"medusa_heads.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    again, warnings = formats.load(tmp_path, base)
    assert again.spec == CUT and warnings == [] and torch.equal(logits(again, base), logits(heads, base))
    tensors["lm_heads.0.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    assert "is not that of this model" in formats.load(tmp_path, base)[1][0]
    del tensors["lm_heads.0.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    again, warnings = formats.load(tmp_path, base)
    assert "no `lm_heads.0.weight`" in warnings[0] and torch.equal(logits(again, base), logits(heads, base))


def test_each_doubt_about_a_file_is_a_warning_of_its_own(base: Base, tmp_path: Path) -> None:
    formats.save(tiny.random_heads(base, SHARED), tmp_path)
    tensors = load_file(tmp_path / formats.WEIGHTS)
    tensors["0.0.linear.weight"] = tensors["0.0.linear.weight"].half()
    tensors["7.5.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / formats.WEIGHTS)
    _, warnings = formats.load(tmp_path, base)
    for says in ("mixes float16 and float32", "no head, such as 7.5"):
        assert any(says in warning for warning in warnings)
    assert len(warnings) == 2


def test_an_output_embedding_with_a_bias_is_not_copied_without_it(tmp_path: Path) -> None:
    model = tiny.model("gqa")
    model.lm_head.bias = torch.nn.Parameter(torch.randn(tiny.VOCAB))
    heads = tiny.random_heads(Base(model, tiny.tokenizer()), SHARED)
    for fmt in ("v1", "vllm"):
        assert "has a bias" in refusal(lambda fmt=fmt: formats.save(heads, tmp_path / fmt, fmt)).message
    formats.save(heads, tmp_path / "v2", "v2")
