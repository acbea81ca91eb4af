"""Slices and modules with one source: it is taken as it is, whatever the method, and no parameter is asked of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_lora import adapter, factors, layer
from tiny_checkpoints import HIDDEN, INNER, llama_tensors, load, merge, plan_of, save

from bot.errors import Refused
from bot.merge.methods import METHODS, Absent, Base, Method

PAIRS = ("slerp", "nuslerp", "nearswap", "arcee_fusion")
WITH_BASE = sorted(name for name, method in METHODS.items() if method.base is Base.REQUIRED)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("abc"):
        save(folder / name, llama_tensors(seed, layers=4))
    return folder


def required(method: Method) -> str:
    """The parameters that have no default, for the slice that needs them."""
    names = [p.name for p in (*method.per_input, *method.shared) if p.default is Absent.REQUIRED]
    return "parameters: {" + ", ".join(f"{name}: 0.5" for name in names) + "}"


def stacked(method: Method, first: str, last: str, base: str | None) -> str:
    """`first` alone, then two or more models, then `last` alone."""
    several = "abc" if method.least == 2 and base is not None else "ab"
    middle = ", ".join(f"{{model: {name}, layer_range: [1, 3]}}" for name in several)
    return f"""
merge_method: {method.name}
{f"base_model: {base}" if base else ""}
slices:
- sources: [{{model: {first}, layer_range: [0, 1]}}]
- sources: [{middle}]
  {required(method)}
- sources: [{{model: {last}, layer_range: [3, 4]}}]
"""


def assert_taken(out: Path, models: Path, first: str, last: str) -> None:
    made, one, other = load(out), load(models / first), load(models / last)
    for name, tensor in made.items():
        if name.startswith(("model.embed", "model.layers.0.")):
            assert torch.equal(tensor, one[name]), name
        elif name.startswith(("model.norm", "lm_head", "model.layers.3.")):
            assert torch.equal(tensor, other[name]), name
        elif "proj" in name:
            assert not torch.equal(tensor, one[name]) and not torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("name", [*PAIRS, "multislerp"])
def test_a_method_for_two_inputs_takes_the_only_source_of_a_slice_as_it_is(
    name: str, models: Path, tmp_path: Path
) -> None:
    base = "a" if METHODS[name].base is Base.REQUIRED else None
    merge(stacked(METHODS[name], "a", "b", base), models, tmp_path / "out")
    assert_taken(tmp_path / "out", models, "a", "b")


@pytest.mark.parametrize("name", WITH_BASE)
def test_the_base_alone_in_a_slice_is_taken_as_it_is(name: str, models: Path, tmp_path: Path) -> None:
    merge(stacked(METHODS[name], "a", "a", "a"), models, tmp_path / "out")
    assert_taken(tmp_path / "out", models, "a", "a")


@pytest.mark.parametrize("name", sorted(set(WITH_BASE) - set(PAIRS)))
def test_task_vectors_without_their_base_are_refused(name: str, models: Path) -> None:
    with pytest.raises(Refused, match="does not list a, the base"):
        plan_of(stacked(METHODS[name], "a", "b", "a"), models)


@pytest.mark.parametrize("layout", ["models: [{model: a}]", "slices: [{sources: [{model: a, layer_range: [0, 4]}]}]"])
@pytest.mark.parametrize("name", [*PAIRS, "model_stock"])
def test_a_whole_model_of_one_input_is_refused_as_in_mergekit(name: str, layout: str, models: Path) -> None:
    text = f"merge_method: {name}\nbase_model: a\n{layout}\n{required(METHODS[name])}"
    with pytest.raises(Refused, match="besides the base"):
        plan_of(text, models)


def test_the_base_with_no_task_vectors_is_the_whole_model_as_in_mergekit(models: Path, tmp_path: Path) -> None:
    merge("merge_method: ties\nbase_model: a\nmodels: [{model: a}]", models, tmp_path / "out")
    made, base = load(tmp_path / "out"), load(models / "a")
    assert all(torch.equal(made[name], base[name]) for name in base)


def test_the_only_source_of_a_slice_keeps_its_adapter_and_takes_the_output_type(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        save(tmp_path / name, llama_tensors(seed, layers=2))
    target = layer(1, "mlp.up_proj")
    adapter(tmp_path / "lora", factors(target, INNER, HIDDEN))
    text = """
merge_method: slerp
base_model: a
dtype: bfloat16
slices:
- sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]
  parameters: {t: 0.5}
- sources: [{model: b+lora, layer_range: [1, 2]}]
"""
    merge(text, tmp_path, tmp_path / "out")
    merge("merge_method: passthrough\ndtype: bfloat16\nmodels: [{model: b+lora}]", tmp_path, tmp_path / "alone")
    made, alone, plain = load(tmp_path / "out"), load(tmp_path / "alone"), load(tmp_path / "b")
    name = f"{target}.weight"
    assert torch.equal(made[name], alone[name]) and not torch.equal(made[name], plain[name].bfloat16())
