"""Tensors that a family keeps in float32 stay so in a merge that is written in 16 bits, as transformers saves them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from tiny_checkpoints import merge

from bot.merge.checkpoints.float32 import ALWAYS, BESIDE_FLOAT16

_KEPT = re.compile(r"(_keep_in_fp32_modules(?:_strict)?)\s*(?::[^=\n]+)?=\s*(\[[^\]]*\])")


def test_the_table_is_that_of_transformers() -> None:
    tables: dict[str, dict[str, set[str]]] = {"_keep_in_fp32_modules": {}, "_keep_in_fp32_modules_strict": {}}
    for file in (Path(hf.__file__).parent / "models").rglob("modeling_*.py"):
        for attribute, names in _KEPT.findall(file.read_text()):
            tables[attribute].setdefault(file.parent.name, set()).update(ast.literal_eval(names))
    for attribute, ours in (("_keep_in_fp32_modules_strict", ALWAYS), ("_keep_in_fp32_modules", BESIDE_FLOAT16)):
        theirs = {family: names for family, names in tables[attribute].items() if names}
        assert {family: set(names) for family, names in ours.items()} == theirs


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_correction_of_a_router_keeps_its_stored_type(stored: torch.dtype, tmp_path: Path) -> None:
    config = hf.Glm4MoeConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=4, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, first_k_dense_replace=1,
    )  # fmt: skip
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        hf.Glm4MoeForCausalLM(config).to(stored).save_pretrained(tmp_path / name)
    models = "models: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
    merge(f"merge_method: linear\n{models}dtype: bfloat16", tmp_path, tmp_path / "out")
    kinds = {name: tensor.dtype for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items()}
    kept = {name for name, kind in kinds.items() if kind is torch.float32}
    corrections = {name for name in kinds if name.endswith("e_score_correction_bias")}
    assert corrections and kept == (corrections if stored is torch.float32 else set())
    loaded = hf.Glm4MoeForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert loaded.dtype is torch.bfloat16
