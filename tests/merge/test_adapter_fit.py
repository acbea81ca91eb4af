"""Targets of an adapter's changes: towers with equal module names, orientation of matrices, biases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import GPT2, TEXT, adapt, agrees, build, logits, merged, reopen, transformers
from safetensors.torch import load_file, save_file
from tiny_checkpoints import load, plan_of

from bot.errors import Refused
from bot.merge.checkpoints import lora

ALONE = "merge_method: passthrough\nmodels: [{model: base+adapter}]\n"
SEE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 14,
    "image_size": 28,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]}
# vision-language models whose towers have equal widths and depths: only the path tells them apart
VISION: dict[str, tuple[str, Callable[[], Any]]] = {
    "paligemma": ("PaliGemmaForConditionalGeneration", lambda: transformers.PaliGemmaConfig(
        text_config={**TEXT, "head_dim": 8, "model_type": "gemma"}, image_token_index=60, projection_dim=16,
        vision_config={**SEE, "model_type": "siglip_vision_model"})),
    "gemma3": ("Gemma3ForConditionalGeneration", lambda: transformers.Gemma3Config(
        text_config={**TEXT, "head_dim": 8, "model_type": "gemma3_text"}, mm_tokens_per_image=4, image_token_index=60,
        vision_config={**SEE, "model_type": "siglip_vision_model"})),
    "llava": ("LlavaForConditionalGeneration", lambda: transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SEE), text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=60)),
    "mistral3": ("Mistral3ForConditionalGeneration", lambda: transformers.Mistral3Config(
        vision_config=transformers.PixtralVisionConfig(**SEE, head_dim=4), image_token_index=60,
        text_config=transformers.MistralConfig(**TEXT, head_dim=4))),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", lambda: transformers.Qwen2VLConfig(
        text_config={**TEXT, "model_type": "qwen2_vl_text", "rope_parameters": MROPE},
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 4, "patch_size": 14,
                       "mlp_ratio": 2})),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", lambda: transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "model_type": "qwen2_5_vl_text", "rope_parameters": MROPE},
        vision_config={"depth": 2, "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 24, "num_heads": 4,
                       "patch_size": 14})),
}  # fmt: skip
TARGETS: dict[str, Any] = {
    "both": ["q_proj", "v_proj", "fc1", "up_proj", "qkv"],
    "text": r".*language_model.*\.(q_proj|v_proj)",
    "vision": r".*(vision_tower|visual).*(q_proj|v_proj|qkv)",
    "head and embedding": ["embed_tokens", "lm_head", "q_proj"],
}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", VISION)
def test_each_tower_gets_its_own_changes(family: str, targets: str, tmp_path: Path) -> None:
    model_class, config = VISION[family]
    model = build(tmp_path / "base", model_class, config())
    adapted: dict[str, Any] = {}

    def keep(tuned: Any) -> None:
        adapted["weights"] = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}

    truth = adapt(tmp_path / "adapter", model, {"target_modules": TARGETS[targets]}, after=keep)
    found = reopen(merged(tmp_path), model_class)
    agrees(logits(found), truth)
    for name, tensor in changed(adapted["weights"]).items():
        agrees(found.get_parameter(name), tensor)


def changed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Base plus scale times B A of every adapted linear module, alpha 6 over rank 2."""
    out = {}
    for name, b in weights.items():
        if name.endswith(".lora_B.default.weight"):
            module = name.removesuffix(".lora_B.default.weight")
            base = weights[f"{module}.base_layer.weight"]
            product = 3 * b @ weights[f"{module}.lora_A.default.weight"]
            out[f"{module}.weight".removeprefix("base_model.model.")] = base + product
    return out


def test_an_adapter_that_may_mean_either_of_two_towers_is_refused_with_both(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {f"{tower}.layers.{i}.q_proj.weight": torch.randn(8, 8, generator=draw)
               for tower in ("left", "right") for i in range(2)}  # fmt: skip
    (tmp_path / "base").mkdir()
    save_file(tensors | {"embed_tokens.weight": torch.randn(16, 8)}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "own", "num_hidden_layers": 2}))
    (tmp_path / "adapter").mkdir()
    factors = {f"base_model.model.model.layers.0.q_proj.lora_{part}.weight": torch.ones(*shape)
               for part, shape in (("A", (2, 8)), ("B", (8, 2)))}  # fmt: skip
    save_file(factors, tmp_path / "adapter" / lora.WEIGHTS)
    (tmp_path / "adapter" / lora.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    with pytest.raises(Refused) as caught:
        plan_of(ALONE, tmp_path)
    assert "left.layers.0.q_proj.weight or right.layers.0.q_proj.weight" in caught.value.message


CONV1D: dict[str, tuple[str, Any]] = {
    "gpt2": ("GPT2LMHeadModel", transformers.GPT2Config(**GPT2)),
    "openai-gpt": ("OpenAIGPTLMHeadModel", transformers.OpenAIGPTConfig(**GPT2)),
    "imagegpt": ("ImageGPTForCausalImageModeling", transformers.ImageGPTConfig(**{**GPT2, "vocab_size": 65})),
    "gpt2 that crosses": ("GPT2LMHeadModel", transformers.GPT2Config(**GPT2, add_cross_attention=True)),
}


@pytest.mark.parametrize("targets", [["attn.c_proj", "lm_head"], ["attn.c_proj"], ["q_attn"], ["c_fc", "attn.c_proj"]])
@pytest.mark.parametrize("family", CONV1D)
def test_square_matrices_are_changed_in_the_orientation_of_the_base(
    family: str, targets: list[str], tmp_path: Path
) -> None:
    model_class, config = CONV1D[family]
    if "q_attn" in targets and "crosses" not in family:
        pytest.skip("this model has no q_attn")
    model = build(tmp_path / "base", model_class, config)
    weights: dict[str, torch.Tensor] = {}
    adapt(tmp_path / "adapter", model, {"target_modules": targets},
          after=lambda tuned: weights.update(tuned.merge_and_unload().state_dict()))  # fmt: skip
    told = tmp_path / "adapter" / lora.CONFIG
    for flag in (False, True):  # PEFT writes the last module's answer, so either may stand there
        told.write_text(json.dumps({**json.loads(told.read_text()), "fan_in_fan_out": flag}))
        found = reopen(merged(tmp_path), model_class).state_dict()
        names = [name for name in found if ".h." in name and name.endswith("weight")]
        assert names
        for name in names:
            agrees(found[name], weights[name])


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "opt"])
def test_a_bias_of_lora_b_is_added_to_the_models_bias(family: str, announced: bool, tmp_path: Path) -> None:
    model_class, config, targets = {
        "qwen2": ("Qwen2ForCausalLM", transformers.Qwen2Config(**TEXT), ["q_proj", "k_proj"]),
        "gpt2": ("GPT2LMHeadModel", transformers.GPT2Config(**GPT2), ["c_attn", "attn.c_proj"]),
        "opt": ("OPTForCausalLM", transformers.OPTConfig(
            vocab_size=64, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=16, init_std=0.2), ["q_proj", "fc1"]),
    }[family]  # fmt: skip
    model = build(tmp_path / "base", model_class, config)
    truth = adapt(tmp_path / "adapter", model, {"target_modules": targets, "lora_bias": True})
    told = tmp_path / "adapter" / lora.CONFIG
    told.write_text(json.dumps({**json.loads(told.read_text()), "lora_bias": announced}))
    agrees(logits(reopen(merged(tmp_path), model_class)), truth)
    notices = [notice.text for notice in plan_of(ALONE, tmp_path)[0].notices]
    assert any("only with `lora_bias: true`" in text for text in notices) is not announced


def test_a_change_of_a_bias_that_the_model_lacks_is_refused_by_that_reason(tmp_path: Path) -> None:
    model = build(tmp_path / "base", "LlamaForCausalLM", transformers.LlamaConfig(**TEXT))
    adapt(tmp_path / "adapter", model, {"target_modules": ["q_proj"], "lora_bias": True})
    with pytest.raises(Refused) as caught:
        plan_of(ALONE, tmp_path)
    assert "a change of a bias that base lacks" in caught.value.message
    assert "PEFT cannot merge" in caught.value.next_step


def test_an_adapted_bias_is_read_in_any_piece_and_rounded_once(tmp_path: Path) -> None:
    model = build(tmp_path / "base", "Qwen2ForCausalLM", transformers.Qwen2Config(**TEXT))
    adapt(tmp_path / "adapter", model, {"target_modules": ["q_proj"], "lora_bias": True})
    name = "model.layers.0.self_attn.q_proj"
    added = load_file(tmp_path / "adapter" / lora.WEIGHTS)[f"base_model.model.{name}.lora_B.bias"]
    truth = load(tmp_path / "base")[f"{name}.bias"].double() + 3 * added.double()
    torch.testing.assert_close(load(merged(tmp_path))[f"{name}.bias"], truth.float(), rtol=0, atol=1e-6)
