"""Tiny real models with tiny real PEFT adapters; the truth of an adapter is the logits of the unmerged model."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import merge

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[3, 5, 7, 11, 20, 31, 9, 10, 44, 45]])
TEXT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "vocab_size": 64,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "initializer_range": 0.2,
}
T5: dict[str, Any] = {
    "vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64,
    "init_std": 0.2,
}  # fmt: skip


def build(folder: Path, model_class: str, config: Any) -> Any:
    """A random model of a class of transformers, saved."""
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(copy.deepcopy(config))
    model.save_pretrained(folder)
    return model.eval()


def reopen(folder: Path, model_class: str) -> Any:
    return getattr(transformers, model_class).from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    """Logits for a few tokens; an encoder-decoder gets them on both sides."""
    both = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS, **both).logits
    return out


def adapt(
    folder: Path,
    model: Any,
    options: Mapping[str, Any],
    *,
    before: Callable[[Any, Any], None] | None = None,
    after: Callable[[Any], object] | None = None,
    **saving: Any,
) -> torch.Tensor:
    """Adapt a model, change every trained weight at random, save the adapter, and give the logits of the whole.

    `before` prepares the model for the config, `after` sees the adapted model; `saving` goes to save_pretrained.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(**{"r": 2, "lora_alpha": 6, **options})
        if before is not None:
            before(model, config)
        adapted = peft.get_peft_model(model, config)
        torch.manual_seed(7)
        for name, weight in adapted.named_parameters():
            if weight.requires_grad and "sampler" not in name:
                weight.data.add_(torch.randn_like(weight) * 0.3)
        adapted.eval()
        adapted.save_pretrained(folder, **saving)
        truth = logits(adapted) if getattr(model.config, "vocab_size", 0) != 65 else torch.empty(0)
        if after is not None:
            after(adapted)
    return truth


def merged(folder: Path, name: str = "base+adapter") -> Path:
    """The output of a passthrough of `name`."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    merge(f"merge_method: passthrough\nmodels: [{{model: {name}}}]\n", folder, out)
    return out


def agrees(found: torch.Tensor, truth: torch.Tensor) -> None:
    assert found.shape == truth.shape
    assert float((found - truth).abs().max()) <= 1e-4 * max(1.0, float(truth.abs().max()))
