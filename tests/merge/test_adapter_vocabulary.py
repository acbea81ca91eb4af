"""Adapters whose training resized the vocabulary: applied with the new size, or refused with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from peft_models import GPT2, TEXT, adapt, agrees, build, logits, merged, reopen, transformers
from tiny_checkpoints import load, plan_of

from bot.errors import Refused
from bot.merge.planning.byte_ranges import needed
from bot.merge.recipe.spec import ModelRef

ALONE = "merge_method: passthrough\nmodels: [{model: base+adapter}]\n"
LLAMA, QWEN2 = "LlamaForCausalLM", "Qwen2ForCausalLM"
VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4, "patch_size": 14,
    "image_size": 28, "model_type": "siglip_vision_model",
}  # fmt: skip
MODELS: dict[str, tuple[str, Any]] = {
    "llama": (LLAMA, transformers.LlamaConfig(**TEXT)),
    "tied qwen2": (QWEN2, transformers.Qwen2Config(**TEXT, tie_word_embeddings=True)),
    "gpt2": ("GPT2LMHeadModel", transformers.GPT2Config(**GPT2)),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        transformers.Gemma3Config(
            text_config={**TEXT, "head_dim": 8, "model_type": "gemma3_text"}, vision_config=VISION,
            mm_tokens_per_image=4, image_token_index=60,
        ),
    ),
}  # fmt: skip


def resized(folder: Path, name: str, rows: int) -> Any:
    model_class, config = MODELS[name]
    model = build(folder / "base", model_class, config)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model.eval()


@pytest.mark.parametrize("rows", [60, 70])
@pytest.mark.parametrize("way", ["save_embedding_layers", "modules_to_save", "factors"])
@pytest.mark.parametrize("name", MODELS)
def test_a_resized_vocabulary_is_applied_with_its_own_size(name: str, way: str, rows: int, tmp_path: Path) -> None:
    model = resized(tmp_path, name, rows)
    embedding, linear = ("wte", "c_attn") if name == "gpt2" else ("embed_tokens", "q_proj")
    options: dict[str, Any] = {"target_modules": [linear]}
    if way == "modules_to_save":
        options["modules_to_save"] = [embedding, "lm_head"]
    elif way == "factors":
        options["target_modules"] += [embedding, "lm_head"]
    truth = adapt(tmp_path / "adapter", model, options, save_embedding_layers=way != "modules_to_save")
    out = merged(tmp_path)
    told = json.loads((out / "config.json").read_text())
    assert told.get("text_config", told)["vocab_size"] == rows
    agrees(logits(reopen(out, MODELS[name][0])), truth)


def test_a_resized_vocabulary_comes_with_the_adapters_tokenizer(tmp_path: Path) -> None:
    model = resized(tmp_path, "llama", 66)
    words(tmp_path / "base", 64)
    adapt(tmp_path / "adapter", model, {"target_modules": ["q_proj"]}, save_embedding_layers=True)
    notices = [notice.text for notice in plan_of(ALONE, tmp_path)[0].notices]
    assert any("has no tokenizer" in text for text in notices)
    words(tmp_path / "adapter", 66)
    planned, _ = plan_of(ALONE, tmp_path)
    assert "tokenizer.json" in needed(planned)[ModelRef("adapter")]
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged(tmp_path))
    assert tokenizer.convert_tokens_to_ids("w65") == 65


def words(folder: Path, count: int) -> None:
    """A tokenizer of whole words."""
    model = tokenizers.models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0")
    made = tokenizers.Tokenizer(model)
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0").save_pretrained(folder)


def refused(folder: Path) -> Refused:
    with pytest.raises(Refused) as caught:
        plan_of(ALONE, folder)
    return caught.value


def test_a_resized_embedding_without_its_head_is_refused_with_what_to_do(tmp_path: Path) -> None:
    model = resized(tmp_path, "llama", 70)
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    adapt(tmp_path / "adapter", model, options, save_embedding_layers=False)
    error = refused(tmp_path)
    assert error.code == "SHAPE_MISMATCH"
    assert "model.embed_tokens.weight has 70 rows" in error.message
    assert "save_embedding_layers=True" in error.next_step


def test_factors_of_a_resized_embedding_alone_are_refused_with_what_to_do(tmp_path: Path) -> None:
    model = resized(tmp_path, "llama", 70)
    adapt(tmp_path / "adapter", model, {"target_modules": ["embed_tokens"]}, save_embedding_layers=False)
    error = refused(tmp_path)
    assert error.code == "SHAPE_MISMATCH"
    assert "save_embedding_layers=True" in error.next_step


def test_trained_tokens_beyond_the_models_vocabulary_are_refused(tmp_path: Path) -> None:
    model = resized(tmp_path, "llama", 70)
    options = {"target_modules": ["q_proj"], "trainable_token_indices": [66]}
    adapt(tmp_path / "adapter", model, options, save_embedding_layers=False)
    assert "tokens up to 66" in refused(tmp_path).message


def test_an_adapter_that_saves_an_embedding_of_the_models_size_keeps_the_size(tmp_path: Path) -> None:
    model = build(tmp_path / "base", *MODELS["llama"])
    truth = adapt(tmp_path / "adapter", model, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]})
    out = merged(tmp_path)
    assert load(out)["model.embed_tokens.weight"].shape == (64, 16)
    agrees(logits(reopen(out, LLAMA)), truth)
