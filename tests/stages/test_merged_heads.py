"""Heads merged by their models' recipe: its figures at the last layer, and a reason where it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.heads_and_merges import RECIPES
from bot.errors import Refused
from bot.merge.recipe import reading
from bot.merge.recipe.spec import ModelRef
from bot.stages import merged_heads

HIDDEN = 6
BASE, LEFT, RIGHT = ModelRef("org/base"), ModelRef("org/left"), ModelRef("org/right")


def tensors(seed: int, heads: int = 2, layers: int = 1, *, conditioned: bool = False, own: int = 0) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for head in range(heads):
        for block in range(layers):
            entering = 2 * HIDDEN if conditioned and block == 0 else HIDDEN
            made[f"{head}.{block}.linear.weight"] = torch.randn(HIDDEN, entering, generator=draw)
            made[f"{head}.{block}.linear.bias"] = torch.randn(HIDDEN, generator=draw)
        if own:
            made[f"{head}.{layers}.weight"] = torch.randn(own, HIDDEN, generator=draw)
    return made


def heads(folder: Path, made: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    save_file(made, folder / merged_heads.WEIGHTS)
    return folder


def family(tmp_path: Path, **options: Any) -> dict[ModelRef, Path]:
    return {
        LEFT: heads(tmp_path / "left", tensors(1, **options)),
        RIGHT: heads(tmp_path / "right", tensors(2, **options)),
    }


def merged(text: str, given: dict[ModelRef, Path], out: Path, **options: Any) -> dict[str, torch.Tensor]:
    return load_file(merged_heads.merge(reading.parse(text), given, out, **options) / merged_heads.WEIGHTS)


def linear(left: object, right: object, more: str = "") -> str:
    return f"""merge_method: linear
models:
- model: org/left
  parameters: {{weight: {left}}}
- model: org/right
  parameters: {{weight: {right}}}
dtype: bfloat16
{more}"""


SELF = {
    "linear": linear(0.5, 0.5),
    "unequal": linear(0.3, 0.7),
    "thirds": linear(1, 2),
    "slerp aside": "{merge_method: slerp, base_model: org/left, models: [{model: org/right}], parameters: {t: 0.3}}",
    "slerp": "{merge_method: slerp, base_model: org/left, models: [{model: org/right}], parameters: {t: 0.5}}",
    "ties aside": """{merge_method: ties, base_model: org/base, models: [
             {model: org/left, parameters: {weight: 0.2}}, {model: org/right, parameters: {weight: 0.7}}]}""",
    "ties": """{merge_method: ties, base_model: org/base, models: [{model: org/left, parameters: {weight: 0.5}},
             {model: org/right, parameters: {weight: 0.5}}]}""",
    "task_arithmetic": """{merge_method: task_arithmetic, base_model: org/base, models: [
             {model: org/left, parameters: {weight: 0.5}}, {model: org/right, parameters: {weight: 0.5}}]}""",
}


@pytest.mark.parametrize("method", SELF)
@pytest.mark.parametrize("options", [{}, {"layers": 2, "conditioned": True}])
def test_a_parent_merged_with_itself_keeps_its_heads_bit_for_bit(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    left = tensors(1, **options)
    given = {LEFT: heads(tmp_path / "left", left), RIGHT: heads(tmp_path / "right", left)}
    found = merged(SELF[method], given, tmp_path / "out")
    assert found.keys() == left.keys()
    assert all(torch.equal(found[name], left[name]) for name in left)


def test_linear_is_the_weighted_mean_in_float32_whatever_the_models_are_stored_in(tmp_path: Path) -> None:
    found = merged(linear(0.25, 0.75), family(tmp_path), tmp_path / "out")
    left, right = tensors(1), tensors(2)
    assert found["0.0.linear.weight"].dtype == torch.float32
    for name in left:
        torch.testing.assert_close(found[name], 0.25 * left[name] + 0.75 * right[name], rtol=1e-6, atol=1e-7)


def test_without_heads_of_the_base_a_task_vector_is_the_head_itself(tmp_path: Path) -> None:
    """TIES by hand: trim the smaller half, elect the sign of the sum, mean of those that agree; the base is zero."""
    text = """{merge_method: ties, base_model: org/base, parameters: {density: 0.5, weight: 1.0, normalize: true},
              models: [{model: org/left}, {model: org/right}]}"""
    found = merged(text, family(tmp_path), tmp_path / "out")
    left, right = tensors(1), tensors(2)
    for name in left:
        kept = []
        for tensor in (left[name], right[name]):
            order = tensor.abs().flatten().argsort(descending=True)[: tensor.numel() // 2]
            kept.append(torch.zeros(tensor.numel()).scatter(0, order, tensor.flatten()[order]).view(tensor.shape))
        sign = (kept[0] + kept[1]).sign()
        agree = [(each.sign() == sign) & (each != 0) for each in kept]
        total = sum(each * ok for each, ok in zip(kept, agree, strict=True))
        want = total / sum(ok.float() for ok in agree).clamp_min(1)  # type: ignore[union-attr]
        torch.testing.assert_close(found[name], want, rtol=1e-5, atol=1e-6)


def test_heads_of_the_base_are_where_task_vectors_start_when_there_are_any(tmp_path: Path) -> None:
    text = """{merge_method: task_arithmetic, base_model: org/base,
              models: [{model: org/left, parameters: {weight: 1.0}}, {model: org/right, parameters: {weight: 0.5}}]}"""
    given = {**family(tmp_path), BASE: heads(tmp_path / "base", tensors(3))}
    found = merged(text, given, tmp_path / "out")
    left, right, base = tensors(1), tensors(2), tensors(3)
    for name in left:
        want = base[name] + (left[name] - base[name]) + 0.5 * (right[name] - base[name])
        torch.testing.assert_close(found[name], want, rtol=1e-5, atol=1e-6)


def test_a_gradient_over_layers_counts_with_its_last_value_and_filters_reach_only_projections(tmp_path: Path) -> None:
    weight = "[{filter: lm_head, value: 1.0}, {filter: mlp, value: 5.0}, {value: [0.0, 0.5, 0.25]}]"
    found = merged(linear(weight, 0.75), family(tmp_path, own=9), tmp_path / "out")
    left, right = tensors(1, own=9), tensors(2, own=9)
    for name in left:
        share = 1.0 / 1.75 if name.endswith("1.weight") and "linear" not in name else 0.25
        want = share * left[name] + (1 - share) * right[name]
        torch.testing.assert_close(found[name], want, rtol=1e-5, atol=1e-6)


def test_of_slices_the_model_of_the_last_layer_gives_the_heads(tmp_path: Path) -> None:
    text = """{merge_method: passthrough, slices: [
              {sources: [{model: org/left, layer_range: [0, 20]}]},
              {sources: [{model: org/right, layer_range: [10, 30]}]}]}"""
    found = merged(text, family(tmp_path), tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(2).items())
    both = """{merge_method: slerp, base_model: org/left, parameters: {t: [0, 1]}, slices: [{sources: [
              {model: org/left, layer_range: [0, 30]}, {model: org/right, layer_range: [0, 30]}]}]}"""
    found = merged(both, family(tmp_path / "again"), tmp_path / "slerp")
    for name, tensor in tensors(2).items():
        torch.testing.assert_close(found[name], tensor)


def test_recipes_of_several_documents_merge_the_heads_of_each(tmp_path: Path) -> None:
    text = """name: middle
merge_method: linear
models: [{model: org/left, parameters: {weight: 0.5}}, {model: org/right, parameters: {weight: 0.5}}]
---
merge_method: linear
models: [{model: middle, parameters: {weight: 0.5}}, {model: org/right, parameters: {weight: 0.5}}]
"""
    found = merged(text, family(tmp_path), tmp_path / "out")
    left, right = tensors(1), tensors(2)
    torch.testing.assert_close(
        found["1.0.linear.bias"], 0.25 * left["1.0.linear.bias"] + 0.75 * right["1.0.linear.bias"]
    )


def test_the_fewest_heads_decide_and_draft_vocabularies_are_joined(tmp_path: Path) -> None:
    left, right = tensors(1, heads=3), tensors(2, heads=2)
    given = {
        LEFT: heads(tmp_path / "left", {**left, "keep": torch.tensor([4, 2, 9])}),
        RIGHT: heads(tmp_path / "right", {**right, "keep": torch.tensor([2, 7])}),
    }
    found = merged(linear(0.5, 0.5), given, tmp_path / "out")
    assert {name for name in found if name != "keep"} == right.keys()
    assert found["keep"].tolist() == [4, 2, 9, 7]


def test_untrained_heads_with_projections_start_from_the_rows_of_the_base_model(tmp_path: Path) -> None:
    text = """{merge_method: task_arithmetic, base_model: org/base,
              models: [{model: org/left, parameters: {weight: 1.0}}, {model: org/right, parameters: {weight: 1.0}}]}"""
    rows = torch.randn(9, HIDDEN)
    (tmp_path / "base").mkdir()
    save_file({"model.embed_tokens.weight": rows}, tmp_path / "base" / "model.safetensors")
    given = family(tmp_path, own=9)
    found = merged(text, given, tmp_path / "out", models={BASE: tmp_path / "base"})
    left, right = tensors(1, own=9), tensors(2, own=9)
    torch.testing.assert_close(found["0.1.weight"], left["0.1.weight"] + right["0.1.weight"] - rows)
    torch.testing.assert_close(found["0.0.linear.bias"], left["0.0.linear.bias"] + right["0.0.linear.bias"])
    with pytest.raises(Refused, match="rows of its own output projection"):
        merged(text, given, tmp_path / "again")


@pytest.mark.parametrize(
    ("left", "right", "says"),
    [
        ({"layers": 2}, {}, "differ in number of blocks a head: org/left has 2, org/right has 1"),
        ({"conditioned": True}, {}, "differ in conditioning"),
        ({"own": 9}, {}, "differ in kind"),
        ({"own": 9}, {"own": 10}, "differ in rows of the projections: org/left has 9, org/right has 10"),
    ],
)
def test_heads_that_do_not_fit_each_other_are_refused_by_what_differs(
    left: dict[str, Any], right: dict[str, Any], says: str, tmp_path: Path
) -> None:
    given = {
        LEFT: heads(tmp_path / "left", tensors(1, **left)),
        RIGHT: heads(tmp_path / "right", tensors(2, **right)),
    }
    with pytest.raises(Refused, match=says):
        merged(linear(0.5, 0.5), given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("keep", torch.zeros(2, 2, dtype=torch.long)),
        ("keep", torch.tensor(3)),
        ("keep", torch.tensor([1.5, 2.0])),
        ("keep", torch.zeros(0, dtype=torch.long)),
        ("0.0.linear.bias", torch.zeros(2, 3)),
        ("1.0.linear.weight", torch.zeros(6, 6, dtype=torch.int8)),
        ("0.1.weight", torch.tensor(1.0)),
        ("0.1.weight", torch.zeros(9)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{list(value.shape)}-{value.dtype}",
)
def test_a_strangers_tensor_that_is_not_what_its_name_says_is_refused_by_name(
    name: str, tensor: torch.Tensor, tmp_path: Path
) -> None:
    given = family(tmp_path)
    save_file({**tensors(2), name: tensor}, given[RIGHT] / merged_heads.WEIGHTS)
    with pytest.raises(Refused, match=f"{name} in right has a shape or a type"):
        merged(linear(0.5, 0.5), given, tmp_path / "out")


def test_names_that_only_look_like_heads_are_not_read_as_such(tmp_path: Path) -> None:
    given = family(tmp_path)
    foreign = {f"{'9' * 5000}.0.linear.weight": torch.zeros(6, 6), "\u0661.0.linear.weight": torch.zeros(6, 6)}
    save_file({**tensors(2), **foreign}, given[RIGHT] / merged_heads.WEIGHTS)
    assert merged(linear(0.5, 0.5), given, tmp_path / "out").keys() == tensors(2).keys()


def test_a_source_without_heads_is_named(tmp_path: Path) -> None:
    given = {LEFT: heads(tmp_path / "left", tensors(1))}
    with pytest.raises(Refused, match="there are no heads of org/right"):
        merged(linear(0.5, 0.5), given, tmp_path / "out")
    slerp = "{merge_method: slerp, base_model: org/right, models: [{model: org/left}], parameters: {t: 0.5}}"
    with pytest.raises(Refused, match="there are no heads of org/right"):
        merged(slerp, given, tmp_path / "out")


def test_random_masks_follow_the_seed(tmp_path: Path) -> None:
    text = """{merge_method: dare_linear, base_model: org/base, parameters: {density: 0.5, weight: 1.0},
              models: [{model: org/left}, {model: org/right}]}"""
    given = family(tmp_path)
    first, same, other = (merged(text, given, tmp_path / f"out-{n}", seed=seed) for n, seed in enumerate((1, 1, 2)))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_an_adapter_on_a_model_uses_the_heads_of_the_two_together_or_else_of_the_model(tmp_path: Path) -> None:
    text = linear(0.5, 0.5).replace("org/left\n", "org/left+org/skill\n")
    given = family(tmp_path)
    found = merged(text, given, tmp_path / "out")
    torch.testing.assert_close(
        found["0.0.linear.bias"], (tensors(1)["0.0.linear.bias"] + tensors(2)["0.0.linear.bias"]) / 2
    )
    own = {**given, ModelRef("org/left", None, ModelRef("org/skill")): heads(tmp_path / "own", tensors(5))}
    found = merged(text, own, tmp_path / "second")
    torch.testing.assert_close(
        found["0.0.linear.bias"], (tensors(5)["0.0.linear.bias"] + tensors(2)["0.0.linear.bias"]) / 2
    )


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_of_the_benchmark_merges_heads_of_two_parents(name: str, tmp_path: Path) -> None:
    asked = reading.parse(RECIPES[name])
    refs = [ref for ref in asked.sources if not ref.path.endswith("instruct")]
    given = {ref: heads(tmp_path / f"source-{n}", tensors(n, conditioned=True)) for n, ref in enumerate(refs)}
    found = load_file(merged_heads.merge(asked, given, tmp_path / "out") / merged_heads.WEIGHTS)
    assert len(refs) == 2 and found.keys() == tensors(0, conditioned=True).keys()
    assert any(float(tensor.abs().max()) > 0 for tensor in found.values())
