"""Adapters on one of a tied pair: the output computes what PEFT's unmerged model computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft_models import BART, GPT2, T5, TEXT, adapt, agrees, build, logits, merged, reopen, transformers
from tiny_checkpoints import load, plan_of

GEMMA3_VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4, "patch_size": 14,
    "image_size": 28, "model_type": "siglip_vision_model",
}  # fmt: skip
# family -> class, config, the last part of the embedding's name, a linear layer
FAMILIES: dict[str, tuple[str, Any, str, str]] = {
    "qwen2": (
        "Qwen2ForCausalLM", transformers.Qwen2Config(**TEXT, tie_word_embeddings=True), "embed_tokens", "q_proj"
    ),
    "gemma3": (
        "Gemma3ForCausalLM", transformers.Gemma3TextConfig(**TEXT, head_dim=8), "embed_tokens", "q_proj"
    ),
    "gemma3 with vision": (
        "Gemma3ForConditionalGeneration",
        transformers.Gemma3Config(
            text_config={**TEXT, "head_dim": 8, "model_type": "gemma3_text"}, vision_config=GEMMA3_VISION,
            mm_tokens_per_image=4, image_token_index=60,
        ),
        "embed_tokens", "q_proj",
    ),
    "gpt2": ("GPT2LMHeadModel", transformers.GPT2Config(**GPT2), "wte", "c_attn"),
    "t5": ("T5ForConditionalGeneration", transformers.T5Config(**T5), "shared", "q"),
    "bart": ("BartForConditionalGeneration", transformers.BartConfig(**BART), "shared", "q_proj"),
}  # fmt: skip


def kinds(embedding: str, linear: str) -> dict[str, dict[str, Any]]:
    return {
        "saved embedding": {"modules_to_save": [embedding]},
        "saved head": {"modules_to_save": ["lm_head"]},
        "saved both": {"modules_to_save": [embedding, "lm_head"]},
        "embedding": {"target_modules": [linear, embedding]},
        "head": {"target_modules": [linear, "lm_head"]},
        "both": {"target_modules": [linear, embedding, "lm_head"]},
        "tokens": {"trainable_token_indices": [5, 9]},
        "tokens of both": {"trainable_token_indices": {embedding: [5, 9], "lm_head": [9, 5, 7]}},
        "tokens of the head": {"trainable_token_indices": {"lm_head": [5, 9]}},
    }


@pytest.mark.parametrize("kind", kinds("", ""))
@pytest.mark.parametrize("family", FAMILIES)
def test_one_of_a_tied_pair_changes_alone_as_in_the_unmerged_model(family: str, kind: str, tmp_path: Path) -> None:
    model_class, config, embedding, linear = FAMILIES[family]
    model = build(tmp_path / "base", model_class, config)
    before = logits(model)
    truth = adapt(tmp_path / "adapter", model, {"target_modules": [linear], **kinds(embedding, linear)[kind]})
    assert float((truth - before).abs().max()) > 0.05
    agrees(logits(reopen(merged(tmp_path), model_class)), truth)


ENCODERS = {
    "bert": ("BertForMaskedLM", transformers.BertConfig, {}, "query"),
    "roberta": ("RobertaForMaskedLM", transformers.RobertaConfig, {}, "query"),
    "distilbert": (
        "DistilBertForMaskedLM", transformers.DistilBertConfig, {"dim": 32, "n_heads": 4, "n_layers": 2}, "q_lin"
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", ["modules_to_save", "target_modules"])
@pytest.mark.parametrize("family", ENCODERS)
def test_an_adapter_on_the_embedding_of_an_encoder_leaves_its_head(family: str, way: str, tmp_path: Path) -> None:
    model_class, config, more, linear = ENCODERS[family]
    text = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    model = build(tmp_path / "base", model_class, config(**{**text, **more}))
    options = {"target_modules": [linear]}
    options[way] = [*options.get(way, []), "word_embeddings"]
    truth = adapt(tmp_path / "adapter", model, options)
    agrees(logits(reopen(merged(tmp_path), model_class)), truth)


@pytest.mark.parametrize("module", ["embedding", "head"])
@pytest.mark.parametrize("way", ["modules_to_save", "target_modules"])
@pytest.mark.parametrize("family", ["qwen2", "gemma3 with vision"])
def test_ensured_ties_give_embedding_and_head_the_same_change(
    family: str, way: str, module: str, tmp_path: Path
) -> None:
    model_class, config, embedding, linear = FAMILIES[family]
    model = build(tmp_path / "base", model_class, config)
    options: dict[str, Any] = {"target_modules": [linear], "ensure_weight_tying": True}
    options[way] = [*options.get(way, []), embedding if module == "embedding" else "lm_head"]
    truth = adapt(tmp_path / "adapter", model, options)
    agrees(logits(reopen(merged(tmp_path), model_class)), truth)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_adapter_of_one_side_of_a_shared_embedding_leaves_the_other(family: str, tmp_path: Path) -> None:
    model_class, config, _, linear = FAMILIES[family]
    model = build(tmp_path / "base", model_class, config)
    truth = adapt(tmp_path / "adapter", model, {"target_modules": [linear, "encoder.embed_tokens"]})
    agrees(logits(reopen(merged(tmp_path), model_class)), truth)


@pytest.mark.parametrize("family", ["qwen2", "gemma3 with vision", "gpt2"])
def test_an_untied_output_says_so_in_every_part_of_its_config(family: str, tmp_path: Path) -> None:
    model_class, config, embedding, linear = FAMILIES[family]
    model = build(tmp_path / "base", model_class, config)
    adapt(tmp_path / "adapter", model, {"target_modules": [linear, embedding]})
    planned, _ = plan_of("merge_method: passthrough\nmodels: [{model: base+adapter}]\n", tmp_path)
    written = json.loads(planned.config)
    assert written["tie_word_embeddings"] is False
    assert written.get("text_config", {}).get("tie_word_embeddings", False) is False
    assert any("unties" in notice.text for notice in planned.notices)


def test_embeddings_saved_beside_an_adapter_leave_a_tied_pair_tied(tmp_path: Path) -> None:
    model_class, config, _, linear = FAMILIES["qwen2"]
    model = build(tmp_path / "base", model_class, config)
    truth = adapt(tmp_path / "adapter", model, {"target_modules": [linear]}, save_embedding_layers=True)
    out = merged(tmp_path)
    agrees(logits(reopen(out, model_class)), truth)
    assert "lm_head.weight" not in load(out)
