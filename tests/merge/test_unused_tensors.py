"""Tensors that transformers does not load: carried along where every source has them, else left out with a notice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from test_families import DECODER, ROUTED
from tiny_checkpoints import llama_tensors, load, merge, plan_of, save

LINEAR = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\ndtype: float32"
ATTENTION = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
FAMILIES: dict[str, tuple[str, Callable[[], Any]]] = {
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        lambda: hf.DeepseekV3Config(
            **{**DECODER, "num_key_value_heads": 4}, **ATTENTION, **EXPERTS, n_shared_experts=1, first_k_dense_replace=1
        ),
    ),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        lambda: hf.Glm4MoeConfig(**DECODER, **EXPERTS, head_dim=8, n_shared_experts=1, first_k_dense_replace=1),
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        lambda: hf.Qwen3NextConfig(
            **DECODER, **ROUTED, head_dim=8, num_experts=4, num_experts_per_tok=2, linear_key_head_dim=8,
            linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
            layer_types=["linear_attention", "full_attention"],
        ),
    ),
}  # fmt: skip


def with_predictions(folder: Path, family: str) -> set[str]:
    """Save a model with weights that predict a second token, as its family stores them -> their names."""
    name, config = FAMILIES[family]
    getattr(hf, name)(config()).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    prefix = "mtp.layers.0." if family == "qwen3_next" else "model.layers.2."
    more = {key.replace("model.layers.1.", prefix): t.clone() for key, t in tensors.items() if ".layers.1." in key}
    more[f"{prefix}eh_proj.weight"] = torch.randn(32, 64)
    more[f"{prefix}embed_tokens.weight"] = torch.randn(64, 32)
    more[f"{prefix}shared_head.head.weight"] = torch.randn(64, 32)
    save_file({**more, **tensors}, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**text, "num_nextn_predict_layers": 1}))
    return set(more)


def logits(family: str, folder: Path) -> torch.Tensor:
    kind = getattr(hf, FAMILIES[family][0])
    model, report = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"]
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[3, 5, 7, 11]]), use_cache=False).logits


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_prediction_layers_that_every_source_has_are_merged(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = with_predictions(tmp_path / "a", family)
    with_predictions(tmp_path / "b", family)
    merge(LINEAR, tmp_path, tmp_path / "out")
    one, other, out = (load(tmp_path / part) for part in ("a", "b", "out"))
    assert names <= set(out)
    for name in names:
        torch.testing.assert_close(out[name], (one[name] + other[name]) / 2)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    merge("merge_method: passthrough\nmodels: [{model: a}]", tmp_path, tmp_path / "copy")
    torch.testing.assert_close(logits(family, tmp_path / "copy"), logits(family, tmp_path / "a"), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_prediction_layers_that_one_source_lacks_are_left_out(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = with_predictions(tmp_path / "a", family)
    name, config = FAMILIES[family]
    getattr(hf, name)(config()).save_pretrained(tmp_path / "b")
    text = (
        "merge_method: task_arithmetic\nbase_model: a\nmodels: [{model: b, parameters: {weight: 0.5}}]\ndtype: float32"
    )
    made = merge(text, tmp_path, tmp_path / "out")
    assert not names & set(load(tmp_path / "out"))
    assert [notice.code for notice in made.notices].count("UNUSED_LEFT_OUT") == 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert logits(family, tmp_path / "out").isfinite().all()


@pytest.mark.slow
def test_prediction_layers_are_left_out_of_a_stack_of_other_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with_predictions(tmp_path / "a", "glm4_moe")
    text = """
merge_method: passthrough
slices: [{sources: [{model: a, layer_range: [0, 2]}]}, {sources: [{model: a, layer_range: [1, 2]}]}]
"""
    made = merge(text, tmp_path, tmp_path / "out")
    out = load(tmp_path / "out")
    assert not [name for name in out if "eh_proj" in name or "shared_head" in name]
    assert "UNUSED_LEFT_OUT" in {notice.code for notice in made.notices}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (3, 0)
    assert logits("glm4_moe", tmp_path / "out").isfinite().all()


def test_a_buffer_of_one_source_is_left_out_and_one_of_all_is_carried_along(tmp_path: Path) -> None:
    ids = {
        "model.embeddings.position_ids": torch.arange(8)[None],
        "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(2),
    }
    save(tmp_path / "a", {**llama_tensors(0), **ids})
    save(tmp_path / "b", llama_tensors(1))
    planned, _ = plan_of(LINEAR, tmp_path)
    assert not set(ids) & {step.name for step in planned.steps}
    assert {"UNUSED_LEFT_OUT", "BUFFER_DROPPED"} <= {notice.code for notice in planned.notices}
    save(tmp_path / "b", {**llama_tensors(1), **ids})
    planned, _ = plan_of(LINEAR, tmp_path)
    assert "model.embeddings.position_ids" in {step.name for step in planned.steps}


def test_layers_behind_the_end_that_the_config_names_are_not_the_models(tmp_path: Path) -> None:
    save(tmp_path / "a", llama_tensors(0, layers=3), num_hidden_layers=2)
    save(tmp_path / "b", llama_tensors(1, layers=2))
    merge(LINEAR, tmp_path, tmp_path / "out")
    assert set(load(tmp_path / "out")) == set(llama_tensors(0, layers=2))
    hf.LlamaForCausalLM.from_pretrained(tmp_path / "out")
