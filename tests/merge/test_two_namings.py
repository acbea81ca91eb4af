"""One architecture under two namings: sources merge whichever they have, and the output has the published names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from test_families import DECODER, SEEING, loaded
from test_lora import adapter, factors
from test_modules import qwen2_vl, seeing
from tiny_checkpoints import load, merge, plan_of

from bot.errors import Failed, Refused
from bot.merge.checkpoints.header import Limits
from bot.merge.planning.byte_ranges import needed

INNER = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
DEEP = {**DECODER, "num_key_value_heads": 4, "n_routed_experts": 4, "first_k_dense_replace": 1, **INNER, **LATENT}
MAMBA = {"use_mamba_kernels": False, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
MIXED = {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}
EXPERTS: dict[str, Callable[[], Any]] = {
    "Mixtral": lambda: hf.MixtralConfig(**DECODER, num_local_experts=4),
    "Qwen2Moe": lambda: hf.Qwen2MoeConfig(**DECODER, num_experts=4, shared_expert_intermediate_size=16, **INNER),
    "Qwen3Moe": lambda: hf.Qwen3MoeConfig(**DECODER, num_experts=4, head_dim=8, **INNER),
    "Olmoe": lambda: hf.OlmoeConfig(**DECODER, num_experts=4, num_experts_per_tok=2),
    "DeepseekV2": lambda: hf.DeepseekV2Config(**DEEP, topk_method="greedy"),
    "DeepseekV3": lambda: hf.DeepseekV3Config(**DEEP, n_group=2, topk_group=1),
    "Glm4Moe": lambda: hf.Glm4MoeConfig(**DECODER, n_routed_experts=4, first_k_dense_replace=1, head_dim=8, **INNER),
    "Phimoe": lambda: hf.PhimoeConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2),
    "MiniMax": lambda: hf.MiniMaxConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2),
    "Jamba": lambda: hf.JambaConfig(**DECODER, num_experts=4, num_experts_per_tok=2, **MAMBA),
    "Lfm2Moe": lambda: hf.Lfm2MoeConfig(**DECODER, num_experts=4, **INNER, **MIXED),
    "Ernie4_5_Moe": lambda: hf.Ernie4_5_MoeConfig(**DECODER, moe_num_experts=4, moe_k=2, moe_intermediate_size=16),
    "GraniteMoe": lambda: hf.GraniteMoeConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2),
    "GPTNeoX": lambda: hf.GPTNeoXConfig(**{k: v for k, v in DECODER.items() if k != "num_key_value_heads"}),
}
TOWERS: dict[str, Callable[[], Any]] = {
    "Llava": lambda: seeing("LlavaConfig", image_token_id=63),
    "Gemma3": lambda: seeing("Gemma3Config", "SiglipVisionConfig", mm_tokens_per_image=4, image_token_index=63),
    "Mistral3": lambda: hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**SEEING, image_size=28),
        text_config=hf.MistralConfig(**DECODER, head_dim=8), image_token_index=63,
    ),
    "Qwen2VL": qwen2_vl,
}  # fmt: skip
AVERAGE = "merge_method: linear\nmodels: [{{model: {}}}, {{model: {}}}]\nparameters: {{weight: 1}}\ndtype: float32\n"
ALONE = "merge_method: passthrough\nmodels: [{{model: {}}}]\n"


def stored(config: Any, kind: Any, folder: Path, seed: int, *, in_memory: bool) -> Any:
    """A model in `folder`, under published names or under those of transformers' modules."""
    torch.manual_seed(seed)
    model = kind(config).float()
    model.save_pretrained(folder)
    if in_memory:
        tied = {name for name in model.all_tied_weights_keys if name.startswith("lm_head")}
        tensors = {name: one.clone().contiguous() for name, one in model.state_dict().items() if name not in tied}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def two(name: str, table: dict[str, Callable[[], Any]], folder: Path) -> tuple[Any, Any, Any]:
    """Two models of one family: `published` as save_pretrained writes it, `fused` as its state_dict is."""
    kind = getattr(hf, name + ("ForConditionalGeneration" if table is TOWERS else "ForCausalLM"))
    first = stored(table[name](), kind, folder / "published", 0, in_memory=False)
    return kind, first, stored(table[name](), kind, folder / "fused", 1, in_memory=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERTS)
def test_fused_and_published_experts_merge_into_published_ones(name: str, tmp_path: Path) -> None:
    kind, first, second = two(name, EXPERTS, tmp_path)
    for i, order in enumerate((("published", "fused"), ("fused", "published"))):
        merge(AVERAGE.format(*order), tmp_path, tmp_path / f"out{i}")
        assert load(tmp_path / f"out{i}").keys() == load(tmp_path / "published").keys()
        other = second.state_dict()
        model = loaded(kind, tmp_path / f"out{i}").state_dict()
        for key, tensor in first.state_dict().items():
            torch.testing.assert_close(model[key], (tensor + other[key]) / 2, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERTS)
def test_a_fused_model_alone_is_written_byte_for_byte_as_published(name: str, tmp_path: Path) -> None:
    _, _, fused = two(name, EXPERTS, tmp_path)
    done = merge(ALONE.format("fused"), tmp_path, tmp_path / "out")
    fused.save_pretrained(tmp_path / "right")
    ours, right = load(tmp_path / "out"), load(tmp_path / "right")
    assert ours.keys() == right.keys()
    assert all(torch.equal(ours[key], right[key]) for key in right)
    assert any("as transformers 5 names it" in notice.text for notice in done.notices)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOWERS)
def test_towers_under_two_namings_merge_into_the_published_one(name: str, tmp_path: Path) -> None:
    kind, first, second = two(name, TOWERS, tmp_path)
    merge(AVERAGE.format("fused", "published"), tmp_path, tmp_path / "out")
    names = {key.replace(".vision_model.", ".") for key in load(tmp_path / "out")}
    assert names == load(tmp_path / "published").keys()
    other, model = second.state_dict(), loaded(kind, tmp_path / "out").state_dict()
    for key, tensor in first.state_dict().items():
        torch.testing.assert_close(model[key], (tensor + other[key]) / 2, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_towers_of_sources_that_agree_keep_their_names(tmp_path: Path) -> None:
    two("Mistral3", TOWERS, tmp_path)
    for name in ("published", "fused"):
        merge(ALONE.format(name), tmp_path, tmp_path / "out" / name)
        assert load(tmp_path / "out" / name).keys() == load(tmp_path / name).keys()


@pytest.mark.slow
def test_a_vision_tower_gets_the_level_of_names_that_transformers_4_reads(tmp_path: Path) -> None:
    kind, first, _ = two("Gemma3", TOWERS, tmp_path)
    merge(ALONE.format("published"), tmp_path, tmp_path / "out")
    names = load(tmp_path / "out")
    assert "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight" in names
    assert not [name for name in names if name.startswith("vision_tower.encoder")]
    again = loaded(kind, tmp_path / "out").state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in first.state_dict().items())


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    two("Mixtral", EXPERTS, tmp_path)
    return tmp_path


def test_layers_of_both_namings_are_stacked(mixtral: Path) -> None:
    text = "merge_method: passthrough\nslices:\n" + "".join(
        f"- sources: [{{model: {name}, layer_range: [0, 2]}}]\n" for name in ("fused", "published")
    )
    merge(text, mixtral, mixtral / "out")
    assert loaded(hf.MixtralForCausalLM, mixtral / "out").config.num_hidden_layers == 4


def test_only_the_fused_tensors_are_read_once_and_in_order(mixtral: Path) -> None:
    planned, _ = plan_of(ALONE.format("fused"), mixtral)
    ((_, files),) = needed(planned).items()
    size = (mixtral / "fused" / "model.safetensors").stat().st_size
    assert files["model.safetensors"] == ((0, size),)
    assert planned.bytes_in == sum(one.nbytes for one in load(mixtral / "fused").values())


def test_a_nan_inside_a_fused_tensor_is_named_by_its_expert(mixtral: Path) -> None:
    tensors = load(mixtral / "fused")
    tensors["model.layers.1.mlp.experts.gate_up_proj"][2, -1, 0] = float("nan")  # the up half of expert 2
    save_file(tensors, mixtral / "fused" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Failed, match=r"layers\.1\.block_sparse_moe\.experts\.2\.w3\.weight"):
        merge(AVERAGE.format("published", "fused"), mixtral, mixtral / "out", on_nonfinite="fail")


def test_an_adapter_on_published_experts_fits_a_fused_model(mixtral: Path) -> None:
    module = "model.layers.0.block_sparse_moe.experts.3.w2"
    adapter(mixtral / "lora", factors(module, 32, 48))
    merge(ALONE.format("fused"), mixtral, mixtral / "plain")
    merge(ALONE.format("fused+lora"), mixtral, mixtral / "adapted")
    plain, adapted = load(mixtral / "plain"), load(mixtral / "adapted")
    assert [name for name in plain if not torch.equal(plain[name], adapted[name])] == [f"{module}.weight"]


def test_a_tensor_under_both_namings_is_refused(mixtral: Path) -> None:
    both = {**load(mixtral / "published"), **load(mixtral / "fused")}
    save_file(both, mixtral / "fused" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refused, match="under two namings") as caught:
        plan_of(ALONE.format("fused"), mixtral)
    assert caught.value.code == "BAD_CHECKPOINT"


def test_a_fused_tensor_of_very_many_experts_is_refused(mixtral: Path) -> None:
    many = {"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(3000, 2, 1)}
    save_file(many, mixtral / "fused" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refused, match="more than 5,000 tensors"):
        plan_of(ALONE.format("fused"), mixtral, limits=Limits(header_bytes=10_000, tensors=5_000, strict=True))


def test_transposed_experts_are_refused_beside_published_ones(tmp_path: Path) -> None:
    text = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8, **DECODER}
    config = {"model_type": "qwen3_vl_moe", "num_hidden_layers": 1, "text_config": {**text, "num_hidden_layers": 1}}
    for name, shape in (("published", (4, 32, 24)), ("fused", (4, 24, 32))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        tensors = {"model.language_model.layers.0.mlp.experts.gate_up_proj": torch.zeros(shape)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    with pytest.raises(Refused, match=r"gate_up_proj \[4, 24, 32\], .* \[4, 32, 24\]") as caught:
        plan_of(AVERAGE.format("published", "fused"), tmp_path)
    assert "from_config" in caught.value.next_step


def test_a_layout_that_is_not_read_is_refused_beside_the_published_one_by_name(tmp_path: Path) -> None:
    config = {"model_type": "ernie4_5_vl_moe", "num_hidden_layers": 1, "hidden_size": 8}
    for name, tensor, shape in (
        ("published", "model.layers.0.mlp.experts.0.gate_proj.weight", (4, 8)),
        ("fused", "model.language_model.layers.0.mlp.text_moe.experts.gate_up_proj", (2, 12, 8)),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        save_file({tensor: torch.zeros(shape)}, tmp_path / name / "model.safetensors")
    with pytest.raises(Refused, match=r"text_moe\.experts\.gate_up_proj") as caught:
        plan_of(AVERAGE.format("published", "fused"), tmp_path)
    assert caught.value.code == "NOT_SUPPORTED"
