"""Every row of the table of corners, merging.md 2.3, through recipe, plan and engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from test_contract import text_of
from tiny_checkpoints import llama_tensors, load, merge, plan_of, save
from torch import Tensor

from bot.errors import Failed, Refused
from bot.merge.execution.engine import Merged
from bot.merge.recipe.spec import Notice

NAME = "model.layers.0.mlp.up_proj.weight"  # 12 x 8
SHAPE = (12, 8)


def family(folder: Path, special: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Small llamas that differ from their base everywhere; `special` gives NAME in some of them."""
    base = llama_tensors(0, layers=1)
    for seed, name in enumerate(("base", "a", "b", "c")):
        noise = llama_tensors(seed, layers=1)
        tensors = {k: v + 0.05 * seed * d for (k, v), d in zip(base.items(), noise.values(), strict=True)}
        if name in special:
            tensors[NAME] = special[name].to(dtype)
        save(folder / name, tensors, dtype=dtype)


def run(folder: Path, method: str, inputs: list[str], base: str | None, **parameters: object) -> tuple[Tensor, Merged]:
    """The merged NAME and the report."""
    out = folder / f"out-{len(list(folder.iterdir()))}"
    done = merge(text_of(method, inputs, base, parameters), folder, out)
    return load(out)[NAME], done


def codes(done: Merged) -> set[str]:
    return {notice.code for notice in done.notices}


def noted(done: Merged, code: str) -> Notice:
    """The notice of that code."""
    return next(notice for notice in done.notices if notice.code == code)


def plan_codes(text: str, folder: Path) -> set[str]:
    return {notice.code for notice in plan_of(text, folder)[0].notices}


@pytest.mark.parametrize("method", ["linear", "multislerp"])
def test_weights_that_add_up_to_nothing_are_refused_while_planning_if_they_divide(method: str, tmp_path: Path) -> None:
    family(tmp_path, {})
    text = f"merge_method: {method}\nmodels: [{{model: a, parameters: {{weight: 1}}}}, {{model: b, parameters: "
    with pytest.raises(Refused) as caught:
        plan_of(text + "{weight: -0.999999999}}]", tmp_path)
    assert caught.value.code == "VALUE_OUT_OF_RANGE"
    switch = {"linear": "normalize", "multislerp": "normalize_weights"}[method]
    assert plan_of(text + f"{{weight: -1}}}}]\nparameters: {{{switch}: false}}", tmp_path)[0].steps
    assert plan_of(text + "{weight: -0.9}}]", tmp_path)[0].steps


def test_weights_of_both_signs_under_elected_signs_and_normalisation_get_a_plan_notice(tmp_path: Path) -> None:
    family(tmp_path, {"base": torch.zeros(SHAPE), "a": torch.ones(SHAPE), "b": -torch.ones(SHAPE)})
    text = """
merge_method: ties
base_model: base
models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: -0.99}}]
"""
    assert "MIXED_SIGNS" in plan_codes(text, tmp_path)
    assert "MIXED_SIGNS" not in plan_codes(text.replace("-0.99", "0.99"), tmp_path)
    assert "MIXED_SIGNS" not in plan_codes(text + "parameters: {normalize: false}", tmp_path)
    merge(text, tmp_path, tmp_path / "out")  # (1*1 + -0.99*-1) / (1 - 0.99): the divisor shrinks, as in mergekit
    torch.testing.assert_close(load(tmp_path / "out")[NAME], torch.full(SHAPE, 1.99 / 0.01), rtol=1e-4, atol=0)


ELECTING = ("ties", "dare_ties", "della", "breadcrumbs_ties")
SUMMING = ("task_arithmetic", "dare_linear", "della_linear", "breadcrumbs")


@pytest.mark.parametrize("method", [*ELECTING, *SUMMING])
def test_normalizing_a_negative_sum_of_weights_adds_what_should_be_subtracted_and_is_noted(
    method: str, tmp_path: Path
) -> None:
    family(tmp_path, {})
    base, tuned = (load(tmp_path / name)[NAME] for name in ("base", "a"))

    def merged(normalize: bool, **weights: float) -> tuple[Tensor, bool]:
        models = ", ".join(f"{{model: {name}, parameters: {{weight: {w}}}}}" for name, w in weights.items())
        head = f"merge_method: {method}\nbase_model: base\nmodels: [{models}]\n"
        text = head + f"parameters: {{normalize: {normalize}, density: 1}}\n"
        done = merge(text, tmp_path, tmp_path / f"out-{normalize}-{weights}")
        return load(tmp_path / f"out-{normalize}-{weights}")[NAME], "NEGATIVE_WEIGHTS" in codes(done)

    result, noted_ = merged(True, a=-0.5)
    assert noted_ and torch.allclose(result, tuned, atol=1e-5)
    result, noted_ = merged(False, a=-0.5)
    assert not noted_ and torch.allclose(result, base - 0.5 * (tuned - base), atol=1e-5)
    assert merged(True, a=1.0, b=-0.5)[1] == (method in ELECTING)
    assert merged(True, a=0.5, b=-1.0)[1]
    assert not merged(True, a=1.0, b=0.5)[1]


@pytest.mark.parametrize(("method", "zero"), [("slerp", "a"), ("slerp", "b"), ("nuslerp", "a"), ("nuslerp", "b")])
def test_a_zero_tensor_counts_as_orthogonal_and_is_noted(method: str, zero: str, tmp_path: Path) -> None:
    other = {"a": "b", "b": "a"}[zero]
    value = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    family(tmp_path, {zero: torch.zeros(SHAPE), other: value})
    if method == "slerp":
        got, done = run(tmp_path, "slerp", ["b"], "a", t=0.3)
    else:
        text = "merge_method: nuslerp\nmodels: [{model: a, parameters: {weight: 0.7}}, {model: b, parameters: "
        done = merge(text + "{weight: 0.3}}]", tmp_path, tmp_path / "out")
        got = load(tmp_path / "out")[NAME]
    share = torch.tensor(0.3 if other == "b" else 0.7, dtype=torch.float64)
    torch.testing.assert_close(got, (torch.sin(share * torch.pi / 2) * value).float())
    assert NAME in noted(done, "ZERO_TENSOR").text


@pytest.mark.parametrize("third", [False, True])
def test_a_vanishing_mean_direction_falls_back_to_the_weighted_sum_and_is_noted(third: bool, tmp_path: Path) -> None:
    value = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    family(tmp_path, {"a": value, "b": -0.5 * value if third else -3 * value, "c": -2 * value})
    inputs = ["a", "b", "c"] if third else ["a", "b"]
    weights = {"a": 2.0, "b": 1.0, "c": 1.0} if third else {"a": 1.0, "b": 1.0}
    listed = ", ".join(f"{{model: {m}, parameters: {{weight: {weights[m]}}}}}" for m in inputs)
    text = f"merge_method: multislerp\nmodels: [{listed}]\nparameters: {{normalize_weights: false}}"
    done = merge(text, tmp_path, tmp_path / "out")
    want = 2 * value - 0.5 * value - 2 * value if third else value - 3 * value
    torch.testing.assert_close(load(tmp_path / "out")[NAME], want, rtol=0, atol=1e-5)
    assert NAME in noted(done, "MEAN_VANISHES").text


def test_an_antipodal_pair_under_karcher_stays_finite_and_is_noted(tmp_path: Path) -> None:
    value = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    family(tmp_path, {"a": value, "b": -value, "c": value})
    for inputs in (["a", "b"], ["a", "b", "c"]):
        got, done = run(tmp_path, "karcher", inputs, None)
        torch.testing.assert_close(got, value)  # the mean is y_1; what lies opposite has no direction to pull in
        assert NAME in noted(done, "ANTIPODAL").text


def test_of_equal_magnitudes_the_lowest_index_is_kept_and_exactly_as_many_as_asked_for(tmp_path: Path) -> None:
    delta = torch.zeros(SHAPE).flatten()
    delta[10:50] = 0.5
    delta[60:70] = -0.5
    family(tmp_path, {"base": torch.zeros(SHAPE), "a": delta.reshape(SHAPE)})
    for density, kept in ((0.25, 24), (0.5, 48), (0.01, 1)):
        got, _ = run(tmp_path, "ties", ["a"], "base", weight=1, density=density)
        first = delta.nonzero().flatten()[:kept]
        assert got.flatten().nonzero().flatten().tolist() == first.tolist()
    got, _ = run(tmp_path, "breadcrumbs", ["a"], "base", weight=1, density=0.25, gamma=0.125)
    assert got.flatten().nonzero().flatten().tolist() == delta.nonzero().flatten()[12 : 12 + 24].tolist()
    family(tmp_path, {"base": torch.zeros(SHAPE), "a": delta.reshape(SHAPE), "b": torch.zeros(SHAPE)})
    got, _ = run(tmp_path, "sce", ["a", "b"], "base", select_topk=0.5)  # variances are all equal or zero
    assert got.flatten().nonzero().flatten().tolist() == delta.nonzero().flatten()[:25].tolist()


def test_votes_that_cancel_elect_plus_whatever_the_order_of_the_models(tmp_path: Path) -> None:
    up, down = torch.full(SHAPE, 0.1), torch.full(SHAPE, -0.1)
    family(tmp_path, {"base": torch.zeros(SHAPE), "a": up, "b": down, "c": torch.full(SHAPE, 0.3)})
    for order in (["a", "b"], ["b", "a"]):
        assert torch.equal(run(tmp_path, "ties", order, "base", weight=1)[0], up)
    text = "merge_method: ties\nbase_model: base\nmodels: ["
    entries = {"a": 1.0, "b": 4.0, "c": 1.0}  # 0.1 - 0.4 + 0.3: floats leave a rest of either sign
    for i, order in enumerate((["a", "b", "c"], ["c", "b", "a"], ["b", "a", "c"])):
        listed = ", ".join(f"{{model: {m}, parameters: {{weight: {entries[m]}}}}}" for m in order)
        merge(f"{text}{listed}]", tmp_path, tmp_path / f"three-{i}")
        torch.testing.assert_close(load(tmp_path / f"three-{i}")[NAME], torch.full(SHAPE, 0.2))


def test_a_one_element_row_under_della_is_kept_with_the_density(tmp_path: Path) -> None:
    n = 20_000
    draw = torch.Generator().manual_seed(0)
    for name in ("base", "a"):
        tensors = {**llama_tensors(0, layers=1), "model.layers.0.tall.weight": torch.randn(n, 1, generator=draw)}
        save(tmp_path / name, tensors)
    done = merge(
        text_of("della", ["a"], "base", {"weight": 1, "density": 0.4, "rescale": False}), tmp_path, tmp_path / "o"
    )
    assert done.files
    base, out = load(tmp_path / "base"), load(tmp_path / "o")
    moved = int((out["model.layers.0.tall.weight"] != base["model.layers.0.tall.weight"]).sum())
    assert abs(moved - 0.4 * n) < 4 * (n * 0.4 * 0.6) ** 0.5


def test_equal_magnitudes_in_a_row_share_the_lowest_rank_under_della(tmp_path: Path) -> None:
    rows, width = 400, 64
    deltas = torch.full((rows, width), 0.5)  # all equal: rank 0, so each is kept with density - epsilon
    base = llama_tensors(0, layers=1)
    save(tmp_path / "base", {**base, "model.layers.0.flat.weight": torch.zeros(rows, width)})
    save(tmp_path / "a", {**base, "model.layers.0.flat.weight": deltas})
    values = {"weight": 1, "density": 0.5, "epsilon": 0.2, "rescale": False, "normalize": False}
    merge(text_of("della", ["a"], "base", values), tmp_path, tmp_path / "out")
    kept = int(load(tmp_path / "out")["model.layers.0.flat.weight"].count_nonzero())
    n = rows * width
    assert abs(kept - 0.3 * n) < 4 * (n * 0.3 * 0.7) ** 0.5


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"weight": 1, "density": 0}), ("breadcrumbs", {"weight": 1, "density": 0}),
        ("breadcrumbs", {"weight": 1, "density": 0.01}), ("breadcrumbs_ties", {"weight": 1, "density": 0}),
        ("dare_linear", {"weight": 1, "density": 0}), ("della", {"weight": 1, "density": 0}),
        ("sce", {"select_topk": 0}), ("sce", {"select_topk": 0.001}),
    ],
)  # fmt: skip
def test_where_nothing_is_kept_the_base_comes_out_with_a_notice(
    method: str, parameters: dict[str, object], tmp_path: Path
) -> None:
    family(tmp_path, {})
    text = text_of(method, ["a", "b"], "base", parameters)
    done = merge(text, tmp_path, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")[NAME], load(tmp_path / "base")[NAME])
    assert "NOTHING_KEPT" in codes(done)


def test_tiny_offsets_damp_the_cosine_of_model_stock_and_are_counted(tmp_path: Path) -> None:
    offset = torch.full(SHAPE, 1e-5)  # |o|^2 = 96e-10, below the floor of 1e-6
    family(tmp_path, {"base": torch.zeros(SHAPE), "a": offset, "b": offset})
    got, done = run(tmp_path, "model_stock", ["a", "b"], "base")
    q = 96e-10 / 1e-6
    torch.testing.assert_close(got, 2 * q / (1 + q) * offset, rtol=1e-5, atol=0)
    assert NAME in (notice := noted(done, "COSINE_DAMPED")).text or notice.count > 1


def test_the_energy_floor_of_sce_is_kept_and_counted(tmp_path: Path) -> None:
    """Energies 1e-8 and 9e-8: mergekit's floor of 1e-6 gives equal shares instead of one to nine."""
    family(tmp_path, {"base": torch.zeros(SHAPE), "a": torch.full(SHAPE, 1e-4), "b": torch.full(SHAPE, 3e-4)})
    got, done = run(tmp_path, "sce", ["a", "b"], "base")
    torch.testing.assert_close(got, torch.full(SHAPE, 2e-4))
    assert NAME in (notice := noted(done, "EVEN_SHARES")).text or notice.count > 1
    family(tmp_path, {"base": torch.zeros(SHAPE), "a": torch.full(SHAPE, 0.1), "b": torch.full(SHAPE, 0.3)})
    got, done = run(tmp_path, "sce", ["a", "b"], "base")
    torch.testing.assert_close(got, torch.full(SHAPE, (0.1 * 0.1 + 0.9 * 0.3)))
    assert "EVEN_SHARES" not in codes(done)


def test_an_almost_zero_delta_is_not_rescaled(tmp_path: Path) -> None:
    tiny = torch.full(SHAPE, 1e-10)
    tiny[0, 0] = 2e-10  # L1 = 9.7e-9 < 1e-7
    family(tmp_path, {"base": torch.zeros(SHAPE), "a": tiny})
    got, _ = run(tmp_path, "ties", ["a"], "base", weight=1, density=0.02, rescale=True)
    assert float(got[0, 0]) == pytest.approx(2e-10)
    assert got.count_nonzero() == 1


def test_an_output_that_overflows_half_precision_fails_and_names_the_tensor(tmp_path: Path) -> None:
    family(tmp_path, {"a": torch.full(SHAPE, 4e4), "b": torch.full(SHAPE, 4e4)}, torch.float16)
    with pytest.raises(Failed) as caught:
        run(tmp_path, "linear", ["a", "b"], None, weight=1, normalize=False)
    assert (caught.value.code, caught.value.value) == ("NOT_FINITE", NAME)
    assert torch.equal(run(tmp_path, "linear", ["a", "b"], None, weight=1)[0], torch.full(SHAPE, 4e4).half())
