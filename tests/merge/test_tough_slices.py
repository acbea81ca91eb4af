"""Slices (tough case 10 of merging.md 6): who gives what where a stack is put together from parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import llama_tensors, load, merge, plan_of, save

NORM, HEAD, EMBEDDING = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "a", "b", "c")):
        save(tmp_path / name, llama_tensors(seed, layers=4), layer_types=[f"{name}{i}" for i in range(4)])
    return tmp_path


def layer(i: int, part: str = "mlp.up_proj") -> str:
    return f"model.layers.{i}.{part}.weight"


def test_one_source_then_two_gives_norm_and_head_of_both_and_the_embeddings_of_one(models: Path) -> None:
    text = """
merge_method: linear
slices:
- sources: [{model: a, layer_range: [0, 1]}]
- sources:
  - {model: b, layer_range: [1, 3], parameters: {weight: 0.25}}
  - {model: c, layer_range: [2, 4], parameters: {weight: 0.75}}
parameters: {weight: 1}
"""
    merge(text, models, models / "out")
    a, b, c, out = (load(models / name) for name in ("a", "b", "c", "out"))
    assert torch.equal(out[EMBEDDING], a[EMBEDDING])
    assert torch.equal(out[layer(0)], a[layer(0)])
    for name in (NORM, HEAD):
        torch.testing.assert_close(out[name], 0.25 * b[name] + 0.75 * c[name])
    for i in (1, 2):
        torch.testing.assert_close(out[layer(i)], 0.25 * b[layer(i)] + 0.75 * c[layer(i + 1)])
    assert json.loads((models / "out" / "config.json").read_text())["num_hidden_layers"] == 3
    assert len(out) == 3 + 3 * 9


def test_two_sources_then_one_keeps_every_source_of_the_first_slice(models: Path) -> None:
    text = """
merge_method: linear
slices:
- sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]
- sources: [{model: c, layer_range: [3, 4]}]
parameters: {weight: 1}
"""
    merge(text, models, models / "out")
    a, b, c, out = (load(models / name) for name in ("a", "b", "c", "out"))
    torch.testing.assert_close(out[EMBEDDING], (a[EMBEDDING] + b[EMBEDDING]) / 2)
    assert torch.equal(out[NORM], c[NORM])
    assert torch.equal(out[HEAD], c[HEAD])


def test_a_gradient_over_a_one_layer_slice_takes_its_last_entry_and_the_embeddings_their_first(models: Path) -> None:
    text = """
merge_method: slerp
base_model: a
slices:
- sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]
- sources: [{model: a, layer_range: [1, 4]}, {model: b, layer_range: [1, 4]}]
parameters: {t: [0.1, 0.5, 0.9]}
"""
    planned, _ = plan_of(text, models)
    t = {step.name: step.work.shared["t"] for step in planned.steps}
    assert t[EMBEDDING] == t[NORM] == t[HEAD] == pytest.approx(0.1)
    assert [t[layer(i)] for i in range(4)] == pytest.approx([0.9, 0.1, 0.5, 0.9])


def test_each_slice_has_its_own_parameters_and_its_own_base(models: Path) -> None:
    text = """
merge_method: task_arithmetic
slices:
- base_model: base
  sources: [{model: base, layer_range: [0, 2]}, {model: a, layer_range: [0, 2]}]
  parameters: {weight: 1.0}
- base_model: b
  sources: [{model: b, layer_range: [2, 4]}, {model: c, layer_range: [2, 4]}]
parameters: {weight: 0.5}
"""
    merge(text, models, models / "out")
    a, b, c, out = (load(models / name) for name in ("a", "b", "c", "out"))
    torch.testing.assert_close(out[layer(1)], a[layer(1)])
    torch.testing.assert_close(out[EMBEDDING], a[EMBEDDING])
    for name in (layer(3), NORM, HEAD):
        torch.testing.assert_close(out[name], (b[name] + c[name]) / 2)


def test_a_layer_used_twice_is_written_twice(models: Path) -> None:
    text = "merge_method: passthrough\nslices:\n" + "- sources: [{model: a, layer_range: [1, 3]}]\n" * 3
    merge(text, models, models / "out")
    a, out = load(models / "a"), load(models / "out")
    for i in range(6):
        assert torch.equal(out[layer(i)], a[layer(1 + i % 2)])
    config = json.loads((models / "out" / "config.json").read_text())
    assert config["layer_types"] == ["a1", "a2"] * 3
    sizes = sum(t.numel() * t.element_size() for t in out.values())
    assert (models / "out" / "model.safetensors").stat().st_size > sizes


def test_scale_by_filter_touches_only_the_tensors_it_names(models: Path) -> None:
    text = """
merge_method: passthrough
slices:
- sources:
  - model: a
    layer_range: [0, 2]
    parameters:
      scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: [0.5, 2.0]}]
"""
    merge(text, models, models / "out")
    a, out = load(models / "a"), load(models / "out")
    assert out[layer(0, "self_attn.o_proj")].count_nonzero() == 0
    assert torch.equal(out[layer(0, "mlp.down_proj")], a[layer(0, "mlp.down_proj")] * 0.5)
    assert torch.equal(out[layer(1, "mlp.down_proj")], a[layer(1, "mlp.down_proj")] * 2.0)
    assert torch.equal(out[layer(1)], a[layer(1)])


def test_the_module_called_default_is_the_only_stack(models: Path) -> None:
    slices = "slices: [{sources: [{model: a, layer_range: [1, 3]}]}]"
    plain, _ = plan_of(f"merge_method: passthrough\n{slices}", models)
    nested, _ = plan_of(f"merge_method: passthrough\nmodules: {{default: {{{slices}}}}}", models)
    assert [(s.work, s.offset) for s in plain.steps] == [(s.work, s.offset) for s in nested.steps]


def test_lists_that_speak_of_no_layers_stay_as_they_are_however_many_layers_there_are(tmp_path: Path) -> None:
    save(tmp_path / "a", llama_tensors(1), eos_token_id=[5, 6], architectures=["LlamaForCausalLM", "Other"])
    text = "merge_method: passthrough\nslices:\n" + 2 * "  - sources: [{model: a, layer_range: [0, 2]}]\n"
    merge(text, tmp_path, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_hidden_layers"] == 4
    assert (config["eos_token_id"], config["architectures"]) == ([5, 6], ["LlamaForCausalLM", "Other"])
