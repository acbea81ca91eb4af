"""Twelve mistakes people make, each refused from headers alone, within two seconds, with the offending path named."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import llama_tensors, plan_of, save

from bot.errors import Refused

MATRIX = "model.layers.1.mlp.up_proj.weight"
TIES = """
merge_method: ties
base_model: base
models:
- model: a
  parameters: {weight: 0.5, %s}
"""
# what is wrong: recipe, code, what the sentence or its place must name, what the next step must say
DOZEN: dict[str, tuple[str, str, str, str]] = {
    "a mistyped parameter": (TIES % "denstiy: 0.5", "UNKNOWN_KEY", "models[0].parameters.denstiy", "density"),
    "a mistyped method": ("merge_method: dare-ties\nmodels: [{model: a}]", "UNKNOWN_METHOD", "dare-ties", "dare_ties"),
    "a range past the end": (
        "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [1, 4]}]}]",
        "VALUE_OUT_OF_RANGE", "slices[0].sources[0].layer_range", "[0, 3]",
    ),
    "slices of unequal length": (
        "merge_method: linear\nparameters: {weight: 1}\nslices:\n- sources:\n"
        "  - {model: a, layer_range: [0, 2]}\n  - {model: b, layer_range: [0, 3]}",
        "RECIPE_INVALID", "slices[0]", "same number",
    ),
    "a base missing from its slices": (
        "merge_method: ties\nbase_model: base\nparameters: {weight: 1}\nslices: [{sources: [{model: a, layer_range:"
        " [0, 2]}]}]",
        "RECIPE_INVALID", "slices[0]", "base",
    ),
    "a missing matrix": (
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: gap}]",
        "TENSOR_MISSING", MATRIX, "architecture",
    ),
    "another hidden size": (
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: wide}]",
        "SHAPE_MISMATCH", "wide [16, 10]", "width",
    ),
    "weights that add up to zero": (
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: -1}}]",
        "VALUE_OUT_OF_RANGE", "add up to 0", "normalize",
    ),
    "a density above one": (TIES % "density: 1.5", "VALUE_OUT_OF_RANGE", "models[0].parameters.density", "[0, 1]"),
    "della with density 0.9 and the default epsilon": (
        "merge_method: della\nbase_model: base\nmodels: [{model: a, parameters: {weight: 1, density: 0.9}}]",
        "VALUE_OUT_OF_RANGE", "epsilon 0.15", "epsilon",
    ),
    "one source twice": (
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}, {model: a}]",
        "RECIPE_INVALID", "models[2]", "once",
    ),
}  # fmt: skip


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "a", "b")):
        save(tmp_path / name, llama_tensors(seed, layers=3))
    gap = llama_tensors(4, layers=3)
    del gap[MATRIX]
    save(tmp_path / "gap", gap)
    save(tmp_path / "wide", llama_tensors(5, layers=3, hidden=10))
    for file in tmp_path.glob("*/*.safetensors"):  # headers only: no weight can be read
        content = file.read_bytes()
        head = 8 + int.from_bytes(content[:8], "little")
        file.write_bytes(content[:head])
        with file.open("r+b") as handle:
            handle.truncate(len(content))
    return tmp_path


@pytest.mark.parametrize("name", DOZEN)
def test_a_broken_recipe_is_refused_in_two_seconds_with_its_place(name: str, models: Path) -> None:
    text, code, named, advice = DOZEN[name]
    started = time.process_time()
    with pytest.raises(Refused) as caught:
        plan_of(text, models)
    assert time.process_time() - started < 2.0
    error = caught.value
    assert error.code == code
    place = "" if error.where is None else f"{error.where.file}:{error.where.line} {error.where.path}"
    assert named in f"{error.message} {place}"
    assert advice in error.next_step
    assert "\n" not in error.message


def test_the_twelfth_an_adapter_for_another_base_is_refused_with_its_tensor(models: Path) -> None:
    """Its matrices are as wide as another model's."""
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    folder = models / "adapter"
    folder.mkdir()
    tensors = {f"{prefix}.lora_A.weight": torch.ones(2, 10), f"{prefix}.lora_B.weight": torch.ones(10, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    started = time.process_time()
    with pytest.raises(Refused) as caught:
        plan_of("merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a+adapter}, {model: b}]", models)
    assert time.process_time() - started < 2.0
    assert caught.value.code == "SHAPE_MISMATCH"
    assert "adapter" in caught.value.message
    assert "q_proj" in caught.value.message
