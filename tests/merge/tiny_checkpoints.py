"""Tiny real checkpoints for the tests of the merge engine, written by the safetensors library and not by ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bot.merge.checkpoints import checkpoint, lora
from bot.merge.execution import engine
from bot.merge.execution.options import MergeOptions
from bot.merge.planning import plan, planner
from bot.merge.recipe import reading as recipe
from bot.merge.recipe.spec import ModelRef

HIDDEN, INNER, VOCABULARY = 8, 12, 16


def llama_tensors(seed: int, *, layers: int = 2, hidden: int = HIDDEN, tied: bool = False) -> dict[str, torch.Tensor]:
    """Random tensors with the names and shapes of a llama."""
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    out = {"model.embed_tokens.weight": random(VOCABULARY, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            out[f"{layer}self_attn.{name}.weight"] = random(hidden, hidden)
        out[f"{layer}mlp.gate_proj.weight"] = random(INNER, hidden)
        out[f"{layer}mlp.up_proj.weight"] = random(INNER, hidden)
        out[f"{layer}mlp.down_proj.weight"] = random(hidden, INNER)
        out[f"{layer}input_layernorm.weight"] = random(hidden)
        out[f"{layer}post_attention_layernorm.weight"] = random(hidden)
    out["model.norm.weight"] = random(hidden)
    if not tied:
        out["lm_head.weight"] = random(VOCABULARY, hidden)
    return out


def llama_config(tensors: Mapping[str, torch.Tensor], **changes: Any) -> dict[str, Any]:
    """The config that fits `llama_tensors`."""
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))
    hidden = tensors["model.norm.weight"].shape[0]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers,
        "hidden_size": hidden, "intermediate_size": INNER, "num_attention_heads": 2, "num_key_value_heads": 2,
        "vocab_size": VOCABULARY, "max_position_embeddings": 32, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": "lm_head.weight" not in tensors, "dtype": "float32", "hidden_act": "silu",
    }  # fmt: skip
    return {**config, **changes}


def save(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype | None = None,
    shards: int = 1,
    **config: Any,
) -> Path:
    """Write a checkpoint; with several shards also their index. Config keys can be changed by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    stored = {name: tensor.to(dtype) if dtype is not None else tensor for name, tensor in tensors.items()}
    (folder / "config.json").write_text(json.dumps(llama_config(stored, **config)))
    if shards == 1:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(stored)
    weight_map = {}
    for i in range(shards):
        part = names[i::shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: stored[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, read by the safetensors library."""
    out: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        out.update(load_file(file))
    return out


def plan_of(text: str, folder: Path, **options: Any) -> tuple[plan.Plan, dict[ModelRef, Path]]:
    """The plan of a recipe whose models are sub-folders of `folder`, and where its sources lie."""
    parsed = recipe.parse(text)
    folders = {ref: folder / ref.path for ref in parsed.repos}
    opened = {ref: lora.open_source(checkpoint.LocalFiles(path)) for ref, path in folders.items()}
    return planner.make(parsed, opened, **options), folders


def merge(
    text: str,
    folder: Path,
    out: Path,
    *,
    seed: int = 0,
    shard_limit_bytes: int = plan.SHARD_LIMIT_BYTES,
    limits: checkpoint.Limits = checkpoint.TRUSTED,
    progress: Callable[[int, int, str], None] | None = None,
    **options: Any,
) -> engine.Merged:
    """Parse, plan and merge."""
    planned, folders = plan_of(text, folder, seed=seed, shard_limit_bytes=shard_limit_bytes, limits=limits)
    return engine.merge(planned, folders, out, MergeOptions(progress=progress, **options))
