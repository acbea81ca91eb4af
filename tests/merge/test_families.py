"""No family has a description of its own: layers, loose tensors and ties are inferred; the result loads and runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_checkpoints import load, merge, plan_of

DECODER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
SHORT = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}
ROUTED: dict[str, Any] = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
SEEING = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 14,
}
GPT2 = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llava() -> Any:
    vision = hf.CLIPVisionConfig(**SEEING, image_size=28)
    return hf.LlavaConfig(vision_config=vision, text_config=hf.LlamaConfig(**DECODER), image_token_id=63)


FAMILIES: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("LlamaForCausalLM", lambda: hf.LlamaConfig(**DECODER)),
    "mistral": ("MistralForCausalLM", lambda: hf.MistralConfig(**DECODER)),
    "qwen2": ("Qwen2ForCausalLM", lambda: hf.Qwen2Config(**DECODER)),
    "qwen3": ("Qwen3ForCausalLM", lambda: hf.Qwen3Config(**DECODER, head_dim=8)),
    "gemma2": ("Gemma2ForCausalLM", lambda: hf.Gemma2Config(**DECODER, head_dim=8)),
    "gemma3": ("Gemma3ForCausalLM", lambda: hf.Gemma3TextConfig(**DECODER, head_dim=8)),
    "phi3": ("Phi3ForCausalLM", lambda: hf.Phi3Config(**DECODER)),
    "gpt2": ("GPT2LMHeadModel", lambda: hf.GPT2Config(**GPT2)),
    "gpt_neox": ("GPTNeoXForCausalLM", lambda: hf.GPTNeoXConfig(**SHORT)),
    "mixtral": ("MixtralForCausalLM", lambda: hf.MixtralConfig(**DECODER, num_local_experts=4)),
    "qwen2_moe": ("Qwen2MoeForCausalLM", lambda: hf.Qwen2MoeConfig(**DECODER, num_experts=4, **ROUTED)),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        lambda: hf.Qwen3MoeConfig(**DECODER, head_dim=8, num_experts=4, num_experts_per_tok=2, **ROUTED),
    ),
    "bert": ("BertForMaskedLM", lambda: hf.BertConfig(**SHORT)),
    "t5": (
        "T5ForConditionalGeneration",
        lambda: hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    ),
    "mamba": (
        "MambaForCausalLM",
        lambda: hf.MambaConfig(vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=2),
    ),
    "llava": ("LlavaForConditionalGeneration", llava),
}


def loaded(kind: Any, folder: Path) -> Any:
    """The model, with every tensor of the files used and none made up."""
    model, about = kind.from_pretrained(folder, output_loading_info=True)
    assert not about["missing_keys"]
    assert not about["unexpected_keys"]
    assert not about["mismatched_keys"]
    return model


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_any_family_merges_loads_and_runs(family: str, tmp_path: Path) -> None:
    name, config = FAMILIES[family]
    kind = getattr(hf, name)
    for seed, folder in enumerate("ab"):
        torch.manual_seed(seed)
        kind(config()).save_pretrained(tmp_path / folder)
    text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\ndtype: float32"
    merge(text, tmp_path, tmp_path / "out")
    first, second = (kind.from_pretrained(tmp_path / part) for part in "ab")
    model = loaded(kind, tmp_path / "out")
    merged = model.state_dict()
    for key, tensor in first.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(merged[key], (tensor + second.state_dict()[key]) / 2, rtol=0, atol=1e-6)
    tokens = torch.tensor([[3, 5, 7, 11]])
    extra = {"decoder_input_ids": tokens} if family == "t5" else {}
    assert model(input_ids=tokens, **extra).logits.isfinite().all()


ONE_STACK = [family for family in FAMILIES if family not in ("t5", "llava")]


@pytest.mark.slow
@pytest.mark.parametrize("family", ONE_STACK)
def test_layers_of_any_family_are_stacked_anew_and_the_result_runs(family: str, tmp_path: Path) -> None:
    name, config = FAMILIES[family]
    kind = getattr(hf, name)
    for seed, folder in enumerate("ab"):
        torch.manual_seed(seed)
        kind(config()).save_pretrained(tmp_path / folder)
    text = """
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [0, 2]}]
- sources: [{model: b, layer_range: [0, 1]}]
- sources: [{model: b, layer_range: [0, 2]}]
"""
    merge(text, tmp_path, tmp_path / "out")
    model = loaded(kind, tmp_path / "out")
    assert model.config.num_hidden_layers == 5
    assert model(input_ids=torch.tensor([[3, 5, 7, 11]])).logits.isfinite().all()


def hybrid(kind: str) -> Any:
    """Four layers of two kinds each, so that a stack in another order shows."""
    four = {**DECODER, "num_hidden_layers": 4, "head_dim": 8}
    sliding = {"sliding_window": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
    if kind == "gemma3":
        return hf.Gemma3TextConfig(**four, **sliding)
    if kind == "gemma2":
        return hf.Gemma2Config(**four, **sliding)
    if kind == "qwen3":
        return hf.Qwen3Config(**four, **sliding, use_sliding_window=True, max_window_layers=4)
    types = ["linear_attention", "full_attention"] * 2
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    mixture = {"num_experts": 4, "num_experts_per_tok": 2, **ROUTED}
    return hf.Qwen3NextConfig(**four, **linear, linear_num_value_heads=4, layer_types=types, **mixture)


HYBRIDS = {
    "gemma2": "Gemma2ForCausalLM", "gemma3": "Gemma3ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", HYBRIDS)
def test_a_hybrid_keeps_the_kind_of_every_layer_when_it_is_stacked_anew(kind: str, tmp_path: Path) -> None:
    model = getattr(hf, HYBRIDS[kind])
    for seed, folder in enumerate("ab"):
        torch.manual_seed(seed)
        model(hybrid(kind)).save_pretrained(tmp_path / folder)
    types = hybrid(kind).layer_types
    text = """
merge_method: linear
slices:
- sources: [{model: a, layer_range: [1, 3]}, {model: b, layer_range: [1, 3]}]
- sources: [{model: b, layer_range: [0, 4]}]
parameters: {weight: 1}
"""
    merge(text, tmp_path, tmp_path / "out")
    out = loaded(model, tmp_path / "out")
    assert out.config.layer_types == [*types[1:3], *types]
    assert out(input_ids=torch.tensor([[3, 5, 7, 11]])).logits.isfinite().all()


@pytest.mark.slow
def test_numbers_of_dense_layers_in_a_mixture_follow_the_stack(tmp_path: Path) -> None:
    for seed, dense in enumerate("ab"):
        torch.manual_seed(seed)
        config = hf.Qwen2MoeConfig(
            **{**DECODER, "num_hidden_layers": 3},
            num_experts=4,
            num_experts_per_tok=2,
            **ROUTED,
            mlp_only_layers=[seed],
        )
        hf.Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / dense)
    text = """
merge_method: passthrough
slices: [{sources: [{model: a, layer_range: [0, 3]}]}, {sources: [{model: b, layer_range: [1, 3]}]}]
"""
    merge(text, tmp_path, tmp_path / "out")
    model = loaded(hf.Qwen2MoeForCausalLM, tmp_path / "out")
    assert model.config.mlp_only_layers == [0, 3]
    assert model(input_ids=torch.tensor([[3, 5, 7, 11]])).logits.isfinite().all()


@pytest.mark.slow
def test_a_gpt2_without_its_prefix_is_mapped_onto_one_with_it(tmp_path: Path) -> None:
    for seed, (folder, kind) in enumerate((("a", "GPT2LMHeadModel"), ("b", "GPT2Model"))):
        torch.manual_seed(seed)
        getattr(hf, kind)(hf.GPT2Config(**GPT2)).save_pretrained(tmp_path / folder)
    text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\ndtype: float32"
    planned, _ = plan_of(text, tmp_path)
    assert all(len(step.work.operands) == 2 for step in planned.steps)
    assert "RENAMED" in {notice.code for notice in planned.notices}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "della", "karcher", "sce", "model_stock"])
def test_a_gpu_merges_as_the_cpu_does_up_to_rounding(method: str, tmp_path: Path) -> None:
    from tiny_checkpoints import llama_tensors, load, save

    for seed, name in enumerate(("base", "a", "b")):
        save(tmp_path / name, llama_tensors(seed))
    base = "" if method in ("linear", "karcher") else "base_model: base\n"
    text = (
        f"merge_method: {method}\n{base}models: [{{model: a}}, {{model: b}}]\nparameters: {{weight: 0.7, density: 0.5}}"
    )
    for device in ("cpu", "cuda"):
        merge(text, tmp_path, tmp_path / device, device=device)
    on_gpu = load(tmp_path / "cuda")
    for name, tensor in load(tmp_path / "cpu").items():
        torch.testing.assert_close(on_gpu[name], tensor, rtol=0, atol=1e-6 * float(tensor.abs().max()))


def test_layers_are_counted_by_the_key_of_the_family(tmp_path: Path) -> None:
    """ALBERT repeats one group of layers, xLSTM counts blocks and may state another number of layers."""
    torch.manual_seed(0)
    albert = hf.AlbertConfig(**SHORT, embedding_size=16, num_hidden_groups=1)
    hf.AlbertForMaskedLM(albert).save_pretrained(tmp_path / "albert")
    merge("merge_method: passthrough\nmodels: [{model: albert}]", tmp_path, tmp_path / "copy")
    assert set(load(tmp_path / "copy")) == set(load(tmp_path / "albert"))
    xlstm = hf.xLSTMConfig(vocab_size=64, hidden_size=32, num_heads=4, num_blocks=3)
    hf.xLSTMForCausalLM(xlstm).save_pretrained(tmp_path / "xlstm")
    recipe = "merge_method: passthrough\nslices: [{sources: [{model: xlstm, layer_range: [1, 3]}]}]"
    merge(recipe, tmp_path, tmp_path / "cut")
    model, report = hf.xLSTMForCausalLM.from_pretrained(tmp_path / "cut", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.num_hidden_layers == 2
