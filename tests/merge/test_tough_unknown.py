"""A family nobody knows (tough case 8 of merging.md 6): other names, no class, layers of differing shapes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import merge, plan_of
from torch import Tensor

from bot.errors import Refused


def shapes(i: int) -> dict[str, tuple[int, ...]]:
    """Layers differ in width, and every third has no `turn`."""
    width = 2 + i % 3
    out: dict[str, tuple[int, ...]] = {
        "mix.left.w": (width, 4), "mix.right.w": (4, width), "mix.scale": (width,), "gate.in.w": (width + 1, 2),
        "gate.out.w": (2, width + 1), "turn.w": (width, width), "turn.b": (width,),
    }  # fmt: skip
    return {k: v for k, v in out.items() if i % 3 or not k.startswith("turn")}


def save(folder: Path, seed: int, layers: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    tensors = {"zunge.token_embedding": torch.randn(8, 4, generator=draw)}
    for i in range(layers):
        for part, shape in shapes(i).items():
            tensors[f"zunge.cells.{i}.{part}"] = torch.randn(*shape, generator=draw)
    tensors["zunge.closing_norm.w"] = torch.randn(4, generator=draw)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "zunge", "architectures": ["Zunge"]}))
    return tensors


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    return tmp_path, {name: save(tmp_path / name, seed, 9) for seed, name in enumerate(("base", "a", "b"))}


def out_of(folder: Path, text: str) -> dict[str, Tensor]:
    out = folder / f"out-{len(list(folder.iterdir()))}"
    merge(text, folder, out)
    return load_file(out / "model.safetensors")


def test_linear_ties_slices_and_passthrough_work_on_an_unknown_family(
    models: tuple[Path, dict[str, dict[str, Tensor]]],
) -> None:
    folder, stored = models
    a, b, base = (stored[name] for name in ("a", "b", "base"))
    linear = out_of(folder, "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}")
    assert set(linear) == set(a)
    for name, tensor in linear.items():
        torch.testing.assert_close(tensor, (a[name] + b[name]) / 2)
    ties = out_of(folder, "merge_method: ties\nbase_model: base\nmodels: [{model: a}]\nparameters: {weight: 1}")
    for name, tensor in ties.items():
        torch.testing.assert_close(tensor, a[name])
    assert not torch.equal(base["zunge.closing_norm.w"], a["zunge.closing_norm.w"])
    text = "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 3]}]\n"
    stack = out_of(folder, text + "- sources: [{model: b, layer_range: [1, 9]}]")
    origin = [(a, i) for i in range(3)] + [(b, i) for i in range(1, 9)]
    for i, (source, layer) in enumerate(origin):
        for part in shapes(layer):
            assert torch.equal(stack[f"zunge.cells.{i}.{part}"], source[f"zunge.cells.{layer}.{part}"])
    assert torch.equal(stack["zunge.token_embedding"], a["zunge.token_embedding"])
    assert torch.equal(stack["zunge.closing_norm.w"], b["zunge.closing_norm.w"])
    assert len(stack) == 2 + sum(len(shapes(layer)) for _, layer in origin)


def test_layers_that_do_not_fit_each_other_are_refused_by_name(
    models: tuple[Path, dict[str, dict[str, Tensor]]],
) -> None:
    folder, _ = models
    text = """
merge_method: linear
slices: [{sources: [{model: a, layer_range: [1, 3]}, {model: b, layer_range: [2, 4]}]}]
parameters: {weight: 1}
"""
    with pytest.raises(Refused) as caught:
        plan_of(text, folder)
    assert caught.value.code in ("SHAPE_MISMATCH", "TENSOR_MISSING")
    assert "zunge.cells" in caught.value.message


@pytest.mark.slow
def test_thirty_thousand_tensors_of_an_unknown_family_are_planned_in_five_seconds(tmp_path: Path) -> None:
    count = min([len(save(tmp_path / name, seed, 4800)) for seed, name in enumerate(("base", "a"))])
    assert count > 30_000
    texts = {
        "ties": "merge_method: ties\nbase_model: base\nmodels: [{model: a}]\nparameters: {weight: 1, density: 0.5}",
        "passthrough": "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 4800]}]}]",
    }
    for text in texts.values():
        started = time.process_time()
        planned, _ = plan_of(text, tmp_path)
        assert time.process_time() - started < 5.0
        assert len(planned.steps) == count
