"""Seeded masks (tough case 5, merging.md 6): a draw belongs to seed, source and tensor, and to nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from method_oracles import _stream
from tiny_checkpoints import llama_tensors, load, merge, save
from torch import Tensor

from bot.merge.planning.work import mask_key

MATRIX = "model.layers.0.mlp.up_proj.weight"
DRAWING = ["dare_linear", "dare_ties", "della", "della_linear"]
DIGITS = {"a": 1.0, "b": 16.0, "c": 256.0}  # a sum of digits tells who was kept


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "a", "b", "c")):
        tensors = llama_tensors(seed, layers=2)
        tensors["model.layers.0.column.weight"] = torch.randn(64, 1, generator=torch.Generator().manual_seed(seed))
        tensors["model.layers.1.wide.weight"] = torch.randn(300, 900, generator=torch.Generator().manual_seed(seed))
        save(tmp_path / name, tensors)
    return tmp_path


def text_of(method: str, order: str = "abc", **values: Any) -> str:
    values = {"density": 0.6, "weight": 0.5, **values}
    listed = ", ".join(f"{{model: {name}}}" for name in order)
    parameters = ", ".join(f"{k}: {str(v).lower() if isinstance(v, bool) else v}" for k, v in values.items())
    return f"merge_method: {method}\nbase_model: base\nmodels: [{listed}]\nparameters: {{{parameters}}}\n"


def merged(text: str, folder: Path, **options: Any) -> dict[str, Tensor]:
    out = folder / f"out-{len(list(folder.iterdir()))}"
    merge(text, folder, out, **options)
    return load(out)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first if name in second)


@pytest.mark.parametrize("method", DRAWING)
def test_resharded_parents_other_threads_and_other_shards_give_the_same_bytes(method: str, models: Path) -> None:
    first = merged(text_of(method), models, threads=1)
    assert same(first, merged(text_of(method), models, threads=4))
    assert same(first, merged(text_of(method), models, shard_limit_bytes=9000))
    for name, count in (("base", 4), ("a", 3), ("c", 2)):
        save(models / name, load(models / name), shards=count)
    assert same(first, merged(text_of(method), models))


@pytest.mark.parametrize("method", DRAWING)
def test_an_unrelated_tensor_changes_no_other_tensor(method: str, models: Path) -> None:
    first = merged(text_of(method), models)
    for name in ("base", "a", "b", "c"):
        save(models / name, {"model.layers.0.aaa.weight": torch.rand(5, 7), **load(models / name)})
    second = merged(text_of(method), models)
    assert set(second) - set(first) == {"model.layers.0.aaa.weight"}
    assert same(first, second)


@pytest.mark.parametrize("method", DRAWING)
def test_another_seed_draws_other_masks_and_the_same_seed_the_same(method: str, models: Path) -> None:
    first = merged(text_of(method), models, seed=5)
    assert same(first, merged(text_of(method), models, seed=5))
    other = merged(text_of(method), models, seed=6)
    assert not torch.equal(first[MATRIX], other[MATRIX])
    assert not torch.equal(first["model.layers.0.column.weight"], other["model.layers.0.column.weight"])


def digits(order: str, method: str, folder: Path, **values: Any) -> Tensor:
    """The sum of the kept digits in every element of MATRIX."""
    flat = {"weight": 1.0, "rescale": False, "normalize": False, "epsilon": 0.0, **values}
    return merged(text_of(method, order, **flat), folder)[MATRIX]


@pytest.mark.parametrize("method", DRAWING)
def test_the_masks_stay_with_their_models_when_the_models_change_places(method: str, tmp_path: Path) -> None:
    for name in ("base", *DIGITS):
        tensors = llama_tensors(0, layers=1)
        tensors[MATRIX] = torch.full((12, 8), DIGITS.get(name, 0.0))
        save(tmp_path / name, tensors)
    first = digits("abc", method, tmp_path)
    assert torch.equal(first, digits("cab", method, tmp_path))
    for name, digit in DIGITS.items():
        draws = torch.tensor(_stream(mask_key(0, name, MATRIX), 96)).reshape(12, 8)
        assert torch.equal((first // digit) % 16 == 1, draws < 0.6), f"{name} is not masked by its own stream"


def test_a_column_of_one_element_rows_works(models: Path) -> None:
    for method in DRAWING:
        out = merged(text_of(method, rescale=False), models)["model.layers.0.column.weight"]
        base = load(models / "base")["model.layers.0.column.weight"]
        assert 0 < int((out != base).sum()) <= 64


@pytest.mark.parametrize("method", DRAWING)
def test_the_rate_of_what_is_kept_holds_within_four_sigma(method: str, models: Path) -> None:
    values = {"weight": 1.0, "density": 0.3, "epsilon": 0.1, "rescale": False, "normalize": False}
    for density in (0.3, 0.75):
        out = merged(text_of(method, "a", **{**values, "density": density}), models)["model.layers.1.wide.weight"]
        kept = int((out != load(models / "base")["model.layers.1.wide.weight"]).sum())
        assert abs(kept - density * out.numel()) < 4 * (out.numel() * density * (1 - density)) ** 0.5


@pytest.mark.parametrize("method", DRAWING)
def test_rescaling_restores_the_l1_norm_of_the_delta(method: str, models: Path) -> None:
    out = merged(text_of(method, "a", weight=1.0, normalize=False), models)
    base, a = load(models / "base"), load(models / "a")
    for name in out:
        whole = float((a[name] - base[name]).double().abs().sum())
        assert float((out[name] - base[name]).double().abs().sum()) == pytest.approx(whole, rel=1e-5)


def test_the_seed_stands_in_the_provenance(models: Path) -> None:
    merge(text_of("dare_ties"), models, models / "out", seed=41)
    assert json.loads((models / "out" / "merge_provenance.json").read_text())["seed"] == 41
