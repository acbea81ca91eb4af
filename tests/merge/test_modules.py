"""Models of several stacks: each module is merged or sliced by itself, and transformers loads and runs the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from test_families import DECODER, SEEING
from tiny_checkpoints import load, merge, plan_of

from bot.errors import Refused

SEEING3 = {**SEEING, "num_hidden_layers": 3}
TINY = {"vocab_size": 64, "d_model": 32}
MROPE = {"rope_type": "default", "type": "mrope", "mrope_section": [1, 1, 2]}


def qwen2_vl() -> Any:
    vision = {"depth": 3, "embed_dim": 32, "num_heads": 4, "hidden_size": 32, "patch_size": 14, "mlp_ratio": 2}
    ids = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    return hf.Qwen2VLConfig(text_config={**DECODER, "rope_scaling": MROPE}, vision_config=vision, **ids)


def bart() -> Any:
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    return hf.BartConfig(
        **TINY, encoder_layers=3, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48, **heads
    )  # fmt: skip


def seeing(kind: str, vision: str = "CLIPVisionConfig", **more: Any) -> Any:
    seen = getattr(hf, vision)(**SEEING3, image_size=28)
    text = hf.LlamaConfig(**DECODER) if kind != "Gemma3Config" else hf.Gemma3TextConfig(**DECODER, head_dim=8)
    return getattr(hf, kind)(vision_config=seen, text_config=text, **more)


# class, config, modules in the recipe -> (slices of the module, what counts its layers in the config)
Case = tuple[str, Callable[[], Any], dict[str, tuple[list[tuple[int, int]] | None, str | None]]]
CASES: dict[str, Case] = {
    "t5": (
        "T5ForConditionalGeneration",
        lambda: hf.T5Config(**TINY, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=2, num_heads=4),
        {"encoder": ([(1, 3), (0, 3)], "num_layers"), "decoder": (None, "num_decoder_layers"), "shared": (None, None)},
    ),
    "bart": (
        "BartForConditionalGeneration", bart,
        {"encoder": ([(0, 1), (2, 3)], "encoder_layers"), "decoder": ([(0, 2), (1, 2)], "decoder_layers")},
    ),
    "llava": (
        "LlavaForConditionalGeneration", lambda: seeing("LlavaConfig", image_token_id=63),
        {
            "text_decoder": ([(0, 2), (1, 2)], "text_config.num_hidden_layers"),
            "vision_tower": (None, "vision_config.num_hidden_layers"),
            "multi_modal_projector": (None, None),
        },
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration", qwen2_vl,
        {
            "language_model": ([(0, 1), (0, 2)], "text_config.num_hidden_layers"),
            "visual": ([(0, 2)], "vision_config.depth"),
        },
    ),
    "smolvlm": (
        "SmolVLMForConditionalGeneration",
        lambda: seeing("SmolVLMConfig", "SmolVLMVisionConfig", image_token_id=63, scale_factor=2),
        {
            "text_model": ([(0, 2), (0, 1)], "text_config.num_hidden_layers"),
            "vision_model": ([(0, 3), (1, 3)], "vision_config.num_hidden_layers"),
            "connector": (None, None),
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        lambda: seeing("Gemma3Config", "SiglipVisionConfig", mm_tokens_per_image=4, image_token_index=63),
        {
            "text_decoder": ([(1, 2), (0, 1)], "text_config.num_hidden_layers"),
            "vision_tower": (None, "vision_config.num_hidden_layers"),
        },
    ),
}  # fmt: skip


def parents(name: str, folder: Path) -> Any:
    kind, config, _ = CASES[name]
    for seed, part in enumerate("ab"):
        torch.manual_seed(seed)
        getattr(hf, kind)(config()).save_pretrained(folder / part)
    return getattr(hf, kind)


def text_of(name: str) -> str:
    modules = {}
    for module, (slices, _) in CASES[name][2].items():
        if slices is None:
            modules[module] = {"models": [{"model": "a"}, {"model": "b"}]}
        else:
            modules[module] = {
                "slices": [
                    {"sources": [{"model": ref, "layer_range": list(span)} for ref in "ab"]} for span in slices
                ]
            }  # fmt: skip
    return json.dumps({"merge_method": "linear", "modules": modules, "parameters": {"weight": 1}, "dtype": "float32"})


def at(config: dict[str, Any], path: str) -> Any:
    for key in path.split("."):
        config = config[key]
    return config


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_each_module_is_stacked_by_itself_and_the_whole_loads_and_runs(name: str, tmp_path: Path) -> None:
    kind = parents(name, tmp_path)
    merge(text_of(name), tmp_path, tmp_path / "out")
    before, after = (json.loads((tmp_path / part / "config.json").read_text()) for part in ("a", "out"))
    for slices, path in CASES[name][2].values():
        if path is not None:
            depth = at(before, path) if slices is None else sum(end - start for start, end in slices)
            assert at(after, path) == depth, path
    model, loaded = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    assert not loaded["mismatched_keys"]
    a, b, out = (load(tmp_path / part) for part in ("a", "b", "out"))
    out = {key.replace("tower.vision_model.", "tower."): tensor for key, tensor in out.items()}  # as transformers 4
    kept = [key for key in out if key in a and not any(word.isdigit() for word in key.split("."))]
    assert kept
    for key in kept:
        torch.testing.assert_close(out[key], (a[key] + b[key]) / 2, rtol=0, atol=1e-6)
    loose = {key for key in a if not any(word.isdigit() for word in key.split("."))}
    assert loose <= out.keys(), "loose tensors of every module are there"
    tokens = torch.tensor([[3, 5, 7, 11]])
    extra = {"decoder_input_ids": tokens} if name in ("t5", "bart") else {}
    with torch.no_grad():
        assert model(input_ids=tokens, **extra).logits.isfinite().all()


@pytest.mark.slow
def test_plain_models_cover_every_module_each_with_its_own_layer_positions(tmp_path: Path) -> None:
    parents("t5", tmp_path)
    text = (
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: [0, 1]}}, {model: b, parameters: {weight: 1}}]"
    )
    made, _ = plan_of(text, tmp_path)
    weights = {step.name: step.work.per_input["weight"][0] for step in made.steps}
    assert [weights[f"encoder.block.{i}.layer.0.layer_norm.weight"] for i in range(3)] == [0.0, 0.5, 1.0]
    assert [weights[f"decoder.block.{i}.layer.0.layer_norm.weight"] for i in range(2)] == [0.0, 1.0]
    assert weights["shared.weight"] == 0.0
    everything, _ = plan_of(
        "merge_method: linear\nmodules: {default: {models: [{model: a}, {model: b}]}}\nparameters: {weight: 1}",
        tmp_path,
    )
    assert {step.name for step in everything.steps} == weights.keys()


@pytest.mark.slow
def test_modules_that_are_not_there_or_not_named_are_refused_with_the_names_there_are(tmp_path: Path) -> None:
    parents("llava", tmp_path)
    one = "{models: [{model: a}]}"
    slices = "{slices: [{sources: [{model: a, layer_range: [0, 1]}]}]}"
    for modules, said in {
        f"{{vision_towre: {one}, text_decoder: {one}}}": "`multi_modal_projector`",
        f"{{vision_tower: {one}}}": "language_model",
        f"{{text_decoder: {one}, language_model: {one}, vision_tower: {one}}}": "Keep one",
        f"{{text_decoder: {one}, vision_tower: {one}, multi_modal_projector: {slices}}}": "models",
    }.items():
        with pytest.raises(Refused) as caught:
            plan_of(f"merge_method: passthrough\nmodules: {modules}", tmp_path)
        assert said in caught.value.message + caught.value.next_step
    with pytest.raises(Refused) as caught:
        plan_of(f"merge_method: passthrough\nslices: {slices[9:-1]}", tmp_path)
    assert "modules" in caught.value.next_step
