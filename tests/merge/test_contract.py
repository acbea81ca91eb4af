"""The table of merging.md 2.1 as data of its own, held against what planning does with a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import llama_tensors, plan_of, save

from bot.errors import Refused
from bot.merge.methods import METHODS, Base, Missing

R, O, I = Base.REQUIRED, Base.OPTIONAL, Base.IGNORED  # noqa: E741
FAMILY = {"normalize": False, "lambda": 1.0, "rescale": False}
CRUMBS: dict[str, Any] = {"weight": "required", "density": 1.0, "gamma": 0.01}
DELLA: dict[str, Any] = {"weight": "required", "density": 1.0, "epsilon": 0.15}
SPARSE: dict[str, Any] = {"weight": "required", "density": 1.0}
ON = {"rescale": True}

# method: base, fewest and most inputs beside the base, per-input defaults, shared defaults, policy for what is missing
TABLE: dict[str, tuple[Base, int, int | None, dict[str, Any], dict[str, Any], Missing]] = {
    "linear": (I, 1, None, {"weight": "required"}, {"normalize": True}, Missing.MERGE),
    "slerp": (R, 1, 1, {}, {"t": "required"}, Missing.ONE),
    "nuslerp": (
        O, 2, 2, {"weight": "required"}, {"nuslerp_flatten": True, "nuslerp_row_wise": False}, Missing.ONE,
    ),
    "multislerp": (O, 1, None, {"weight": "required"}, {"normalize_weights": True, "eps": 1e-8}, Missing.MERGE),
    "karcher": (I, 1, None, {}, {"max_iter": 10, "tol": 1e-5}, Missing.MERGE),
    "task_arithmetic": (R, 1, None, {"weight": "required"}, {"normalize": False, "lambda": 1.0}, Missing.MERGE),
    "ties": (R, 1, None, SPARSE, {**FAMILY, "normalize": True}, Missing.MERGE),
    "dare_linear": (R, 1, None, SPARSE, {**FAMILY, **ON}, Missing.MERGE),
    "dare_ties": (R, 1, None, SPARSE, {**FAMILY, **ON}, Missing.MERGE),
    "della": (R, 1, None, DELLA, {**FAMILY, **ON, "normalize": True}, Missing.MERGE),
    "della_linear": (R, 1, None, DELLA, {**FAMILY, **ON}, Missing.MERGE),
    "breadcrumbs": (R, 1, None, CRUMBS, FAMILY, Missing.MERGE),
    "breadcrumbs_ties": (R, 1, None, CRUMBS, FAMILY, Missing.MERGE),
    "model_stock": (R, 2, None, {}, {"filter_wise": False}, Missing.STOCK),
    "passthrough": (I, 1, 1, {"scale": None}, {}, Missing.MERGE),
    "nearswap": (R, 1, 1, {}, {"t": "required"}, Missing.BASE),
    "arcee_fusion": (R, 1, 1, {}, {}, Missing.ONE),
    "sce": (R, 1, None, {}, {"select_topk": 1.0}, Missing.MERGE),
    "ram": (R, 1, None, {}, {"epsilon": 1e-5}, Missing.MERGE),
    "ramplus_tl": (R, 1, None, {}, {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}, Missing.MERGE),
}  # fmt: skip


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "a", "b", "c")):
        save(tmp_path / name, llama_tensors(seed, layers=1))
    return tmp_path


def given(method: str, **more: object) -> dict[str, object]:
    """The required parameters of a method, and those named."""
    _, _, _, per_input, shared, _ = TABLE[method]
    return {**{k: 0.5 for k, v in {**per_input, **shared}.items() if v == "required"}, **more}


def text_of(method: str, inputs: list[str], base: str | None, parameters: dict[str, object]) -> str:
    values = ", ".join(f"{k}: {str(v).lower() if isinstance(v, bool) else v}" for k, v in parameters.items())
    listed = ", ".join(f"{{model: {name}}}" for name in inputs)
    head = f"merge_method: {method}\n" + (f"base_model: {base}\n" if base else "")
    return f"{head}models: [{listed}]\nparameters: {{{values}}}\n"


def usual(method: str) -> tuple[list[str], str | None]:
    """Inputs and base that the method takes."""
    base, least, *_ = TABLE[method]
    return ["a", "b", "c"][: max(least, 2 if base is O else 1)], "base" if base is R else None


def refusal(text: str, folder: Path) -> Refused:
    with pytest.raises(Refused) as caught:
        plan_of(text, folder)
    assert caught.value.next_step
    return caught.value


def test_the_table_names_every_method() -> None:
    assert set(TABLE) == set(METHODS)


@pytest.mark.parametrize("method", TABLE)
def test_what_a_recipe_leaves_out_gets_the_default_of_the_table(method: str, models: Path) -> None:
    inputs, base = usual(method)
    planned, _ = plan_of(text_of(method, inputs, base, given(method)), models)
    _, _, _, per_input, shared, _ = TABLE[method]
    want_shared = {k: 0.5 if v == "required" else v for k, v in shared.items()}
    for step in planned.steps:
        assert dict(step.work.shared) == want_shared
        for name, default in per_input.items():
            value = 0.5 if default == "required" else default
            assert step.work.per_input[name] == (*[value] * len(inputs), *([None] if base else []))
        assert set(step.work.per_input) == set(per_input)


@pytest.mark.parametrize(
    ("method", "name"),
    [(m, k) for m, row in TABLE.items() for k, v in {**row[3], **row[4]}.items() if v == "required"],
)
def test_a_required_parameter_is_asked_for_by_name(method: str, name: str, models: Path) -> None:
    inputs, base = usual(method)
    parameters = given(method)
    del parameters[name]
    error = refusal(text_of(method, inputs, base, parameters), models)
    assert error.code == "MISSING_KEY"
    assert name in error.message


@pytest.mark.parametrize("method", TABLE)
def test_a_method_takes_as_many_inputs_as_the_table_says(method: str, models: Path) -> None:
    kind, least, most, *_ = TABLE[method]
    base = "base" if kind is not I else None
    fewer, more = ["a", "b", "c"][: least - 1], ["a", "b", "c"][: (most or 0) + 1]
    if fewer:
        assert refusal(text_of(method, fewer, base, given(method)), models).code == "RECIPE_INVALID"
    elif base and most == 1:  # the base alone is no input
        assert refusal(text_of(method, ["base"], "base", given(method)), models).code == "RECIPE_INVALID"
    elif kind is R:  # a base without task vectors is copied
        alone, _ = plan_of(text_of(method, ["base"], "base", given(method)), models)
        assert {step.work.action for step in alone.steps} == {"copy"}
    if most is not None:
        assert refusal(text_of(method, more, base, given(method)), models).code == "RECIPE_INVALID"
    assert plan_of(text_of(method, ["a", "b", "c"][: most or 3], base, given(method)), models)[0].steps


@pytest.mark.parametrize("method", TABLE)
def test_a_base_is_required_optional_or_an_ordinary_input(method: str, models: Path) -> None:
    kind = TABLE[method][0]
    inputs, _ = usual(method)
    if kind is R:
        assert refusal(text_of(method, inputs, None, given(method)), models).code == "MISSING_KEY"
    elif method == "passthrough":
        assert refusal(text_of(method, inputs, "base", given(method)), models).code == "RECIPE_INVALID"
    else:
        step = plan_of(text_of(method, inputs, "base", given(method)), models)[0].steps[0]
        assert [str(operand.model) for operand in step.work.operands] == [*inputs, "base"]
        assert step.work.base == (len(inputs) if kind is O else None)
        assert plan_of(text_of(method, inputs, None, given(method)), models)[0].steps[0].work.base is None


OUTSIDE = [
    *[(m, "density", v) for m, row in TABLE.items() if row[3].get("density") is not None for v in (-0.1, 1.5)],
    ("breadcrumbs", "gamma", 1.0), ("breadcrumbs_ties", "gamma", -0.1), ("multislerp", "eps", 0),
    ("karcher", "max_iter", -1), ("karcher", "max_iter", 2.5), ("karcher", "tol", 0), ("nearswap", "t", -0.1),
    ("sce", "select_topk", 1.1), ("sce", "select_topk", -0.1), ("ram", "epsilon", -1), ("ramplus_tl", "alpha", -0.1),
    ("ramplus_tl", "epsilon", -0.1), ("linear", "weight", ".inf"), ("ties", "lambda", ".nan"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "name", "value"), OUTSIDE)
def test_a_value_outside_its_range_is_refused_before_a_weight_is_read(
    method: str, name: str, value: object, models: Path
) -> None:
    inputs, base = usual(method)
    error = refusal(text_of(method, inputs, base, given(method, **{name: value})), models)
    assert error.code in ("VALUE_OUT_OF_RANGE", "RECIPE_INVALID")
    assert name in error.message


EDGES = [
    ("ties", "density", 0), ("ties", "density", 1), ("ties", "weight", -3e5), ("breadcrumbs", "gamma", 0),
    ("karcher", "max_iter", 0), ("nearswap", "t", 0), ("sce", "select_topk", 0), ("ram", "epsilon", 0),
    ("ramplus_tl", "alpha", 0), ("ramplus_tl", "r", -2), ("slerp", "t", -1.5), ("dare_ties", "lambda", -2),
    ("passthrough", "scale", 0), ("della", "epsilon", 0),
]  # fmt: skip


@pytest.mark.parametrize(("method", "name", "value"), EDGES)
def test_a_value_at_the_edge_of_its_range_is_taken(method: str, name: str, value: object, models: Path) -> None:
    inputs, base = usual(method)
    work = plan_of(text_of(method, inputs, base, given(method, **{name: value})), models)[0].steps[0].work
    assert value in (work.shared.get(name), *work.per_input.get(name, ()))


def test_int8_mask_and_parameters_of_other_methods_change_nothing(models: Path) -> None:
    for method in TABLE:
        inputs, base = usual(method)
        plain = plan_of(text_of(method, inputs, base, given(method)), models)[0]
        noisy = plan_of(text_of(method, inputs, base, given(method, int8_mask=True)), models)[0]
        assert [s.work.shared for s in plain.steps] == [s.work.shared for s in noisy.steps]
        assert [s.work.per_input for s in plain.steps] == [s.work.per_input for s in noisy.steps]


@pytest.mark.parametrize("method", [m for m, row in TABLE.items() if "density" in row[3]])
def test_settings_unused_by_task_arithmetic_are_used_by_the_other_task_vector_methods(
    method: str, models: Path
) -> None:
    assert METHODS[method].parameter("density") is not None
    text = text_of("task_arithmetic", ["a"], "base", {"weight": 1, "density": 0.5, "rescale": True})
    work = plan_of(text, models)[0].steps[0].work
    assert "density" not in work.per_input
    assert "rescale" not in work.shared


BIAS = "model.layers.0.self_attn.q_proj.bias"


def with_bias(folder: Path, *names: str) -> None:
    for seed, name in enumerate(("base", "a", "b", "c")):
        tensors = llama_tensors(seed, layers=1)
        if name in names:
            tensors[BIAS] = torch.full((8,), float(seed + 1))
        save(folder / name, tensors)


def planned_bias(method: str, inputs: list[str], base: str | None, folder: Path) -> tuple[str, list[str]] | None:
    planned, _ = plan_of(text_of(method, inputs, base, given(method)), folder)
    work = next((step.work for step in planned.steps if step.name == BIAS), None)
    return None if work is None else (work.action, [str(operand.model) for operand in work.operands])


@pytest.mark.parametrize("method", TABLE)
def test_a_tensor_that_only_the_base_has_is_kept(method: str, tmp_path: Path) -> None:
    with_bias(tmp_path, "base")
    kind, _, most, *_, policy = TABLE[method]
    if kind is R:
        inputs = ["a", "b"][: most or 2]
        assert planned_bias(method, inputs, "base", tmp_path) == ("copy", ["base"])
    elif policy is Missing.ONE:
        assert planned_bias(method, ["a", "b"], "base", tmp_path) == ("copy", ["base"])
    elif method in ("linear", "karcher"):
        assert planned_bias(method, ["a", "b"], "base", tmp_path) == ("merge", ["base"])


@pytest.mark.parametrize("method", TABLE)
def test_a_tensor_that_only_one_input_has_is_kept_left_out_or_refused_as_the_table_says(
    method: str, tmp_path: Path
) -> None:
    with_bias(tmp_path, "a")
    kind, _, most, *_, policy = TABLE[method]
    base, inputs = "base" if kind is R else None, ["a", "b", "c"][: most or 3]
    if policy is Missing.ONE:
        assert planned_bias(method, inputs, base, tmp_path) == ("copy", ["a"])
    elif policy is Missing.STOCK:
        assert planned_bias(method, inputs, base, tmp_path) is None
        notices = {n.code for n in plan_of(text_of(method, inputs, base, {}), tmp_path)[0].notices}
        assert "LEFT_OUT" in notices
    elif kind is R:
        error = refusal(text_of(method, inputs, base, given(method)), tmp_path)
        assert (error.code, error.value) == ("TENSOR_MISSING", BIAS)
    else:
        assert planned_bias(method, inputs, base, tmp_path) == ("merge", ["a"])


@pytest.mark.parametrize("method", [m for m, row in TABLE.items() if row[0] is R and row[2] is None])
def test_a_tensor_that_the_base_and_some_inputs_have_is_merged_from_those(method: str, tmp_path: Path) -> None:
    with_bias(tmp_path, "base", "a")
    want = None if method == "model_stock" else ("merge", ["a", "base"])
    assert planned_bias(method, ["a", "b", "c"], "base", tmp_path) == want
    with_bias(tmp_path, "base", "a", "c")
    assert planned_bias(method, ["a", "b", "c"], "base", tmp_path) == ("merge", ["a", "c", "base"])


def test_one_matrix_too_few_is_never_optional(models: Path) -> None:
    tensors = llama_tensors(1, layers=1)
    del tensors["model.layers.0.input_layernorm.weight"]
    save(models / "a", tensors)
    for method in TABLE:
        inputs, base = usual(method)
        if method == "passthrough":
            continue
        error = refusal(text_of(method, inputs if len(inputs) > 1 or base else ["a", "b"], base, given(method)), models)
        assert (error.code, error.value) == ("TENSOR_MISSING", "model.layers.0.input_layernorm.weight")
