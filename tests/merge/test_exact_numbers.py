"""Coincidences that once gave wrong numbers: ties at both ends of a bracket, opposite rows, middles of two floats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from in_memory import TensorView, merged, merged_and_inputs
from test_methods import first_largest, ours, truth, work_for
from tiny_checkpoints import llama_tensors, load, merge, save
from torch import Tensor

from bot.errors import Failed
from bot.merge.execution.worker import rounded_to_odd
from bot.merge.methods import METHODS
from bot.merge.planning.memory import memory_of
from bot.merge.streaming import selection
from bot.merge.streaming.inputs import CpuReader, Inputs

TIES = {"weight": [1.0], "density": [0.2], "normalize": True, "lambda": 1.0, "rescale": False}
BY_ROW = {"weight": [0.5, 0.5], "nuslerp_flatten": False, "nuslerp_row_wise": False}


def reference(method: str, tensors: list[Tensor], values: dict[str, Any]) -> Tensor:
    """The slow reference in float64; the base comes last."""
    *x, b = tensors
    return truth(method, x, b, values)


def opposite(shape: tuple[int, ...]) -> list[Tensor]:
    """Two models on opposite sides of a base, the base last."""
    draw = torch.Generator().manual_seed(2)
    delta = torch.randn(shape, generator=draw) * 1e-2
    return [delta, -3 * delta, torch.zeros(shape)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_ties_keeps_exactly_its_density_of_coarse_deltas_that_cluster_where_the_sample_looks(
    dtype: torch.dtype,
) -> None:
    n = 2 * selection.SMALL
    delta = torch.full((n,), 2.0**-10, dtype=dtype)
    looked_at = work_for("ties", [delta, delta], True, TIES)
    views = [TensorView(delta, torch.float32)] * 2
    for part in Inputs(looked_at, CpuReader(views), torch.float32, 1).sample():
        delta[part.start : part.stop] = 2.0**-9
    got = ours("ties", [delta], torch.zeros_like(delta), TIES)
    assert int(got.count_nonzero()) == int(0.2 * n)
    assert torch.equal(got, (delta * first_largest(delta.float(), int(0.2 * n))).float())


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("own", [torch.float32, torch.float64], ids=str)
def test_histograms_find_the_same_threshold_as_a_sort_among_numbers_of_both_signs(
    own: torch.dtype, kind: torch.dtype
) -> None:
    sizes = torch.randn(5000, generator=torch.Generator().manual_seed(3), dtype=own) * 1e-3
    sizes[::7] = 0.0
    sizes[1::7] = -0.0
    sizes[2::7] = sizes[2]
    work = work_for("ram", [sizes, sizes], True, {"epsilon": 0.0})
    inputs = Inputs(work, CpuReader([TensorView(sizes, kind)] * 2), kind, 1, chunk=999)
    for k in (1, 700, 2000, 3000, 3500, 4999):  # importances may be of another width than the working type
        found = selection._by_histogram(inputs, lambda part: [sizes[part.start : part.stop]], 0, k)
        assert found.threshold == float(sizes.sort().values[5000 - k])
        assert int((sizes > found.threshold).sum()) + found.equal == k
        assert found.equal + found.excess == int((sizes == found.threshold).sum())


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
def test_arcee_fusion_chooses_what_the_whole_tensor_would_though_its_sample_misleads(kind: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(4096, 128, generator=draw) * 0.02
    scale = (10 ** (torch.rand(512, 1, generator=draw) * 4 - 4)).repeat_interleave(8, 0) * 0.02
    tuned = base + torch.randn(4096, 128, generator=draw) * scale  # small steps: divergences are noise of either sign
    tuned, base = tuned.to(kind), base.to(kind)
    got = ours("arcee_fusion", [tuned], base, {}, dtype=kind)
    assert torch.equal(got, reference("arcee_fusion", [tuned, base], {}).to(kind))


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ((500, 1), BY_ROW),
        ((1, 500), dict(BY_ROW, nuslerp_row_wise=True)),
        ((1, 500), BY_ROW),
        ((64, 1024), BY_ROW),
        ((1024, 64), dict(BY_ROW, nuslerp_row_wise=True)),
        ((1,), dict(BY_ROW, nuslerp_flatten=True)),
        ((64, 1024), dict(BY_ROW, nuslerp_flatten=True)),
    ],
)
def test_nuslerp_takes_the_straight_line_between_opposite_vectors_as_float64_does(
    shape: tuple[int, ...], values: dict[str, Any]
) -> None:
    tensors = opposite(shape)
    want = reference("nuslerp", [e.double() for e in tensors], values)
    got = merged(work_for("nuslerp", tensors, True, values), tensors)
    assert float((got - want).abs().max()) <= 1e-8


@pytest.mark.parametrize("shape", [(1,), (3, 5), (64, 1024)])
def test_multislerp_sees_that_a_mean_direction_vanishes_as_float64_does(shape: tuple[int, ...]) -> None:
    values = {"weight": [1.0, 1.0], "normalize_weights": True, "eps": 1e-8}
    tensors = opposite(shape)
    got, seen = merged_and_inputs(work_for("multislerp", tensors, True, values), tensors)
    assert seen.corner_cases == {"MEAN_VANISHES": 1}
    torch.testing.assert_close(got, -tensors[0], rtol=1e-6, atol=0)


def test_model_stock_takes_rows_of_one_element_as_float64_does() -> None:
    draw = torch.Generator().manual_seed(4)
    tensors = [torch.randn(500, 1, generator=draw) for _ in range(3)]
    want = reference("model_stock", [e.double() for e in tensors], {"filter_wise": True})
    got = merged(work_for("model_stock", tensors, True, {"filter_wise": True}), tensors)
    assert float((got - want).abs().max()) <= 1e-6


def test_a_tensor_full_of_nan_takes_no_more_memory_than_its_plan() -> None:
    n = 2**20
    tensors = [torch.full((n,), torch.nan), torch.zeros(n)]
    work = work_for("slerp", tensors, True, {"t": 0.5})
    inputs = Inputs(work, CpuReader([TensorView(e, torch.float32) for e in tensors]), torch.float32, 1, chunk=2**14)
    kernel = METHODS["slerp"].kernel(inputs)
    whole = 0
    for part in inputs.chunks():
        out = kernel(part).clone()
        inputs.restore(part, out)
        whole += int(out.isnan().sum())
        held = [e for value in vars(inputs).values() for e in _tensors(value)]
        assert sum(e.numel() * e.element_size() for e in held) <= 16 * 2**14 < memory_of(work)
    assert whole == n
    assert inputs.nonfinite == {"o/m0": n}


def _tensors(value: object) -> list[Tensor]:
    """Tensors held in containers of any depth."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [e for one in value for e in _tensors(one)] if isinstance(value, (list, tuple, set)) else []


def test_a_merge_that_may_not_hold_nan_stops_at_the_first_piece_of_the_first_pass() -> None:
    n = 2**16
    tensors = [torch.full((n,), torch.nan), torch.zeros(n)]
    work = work_for("slerp", tensors, True, {"t": 0.5})

    def judge(found: object) -> None:
        raise Failed("NOT_FINITE", f"{found}", "")

    views = [TensorView(e, torch.float32) for e in tensors]
    inputs = Inputs(work, CpuReader(views), torch.float32, 1, chunk=2**10, on_nonfinite=judge)
    with pytest.raises(Failed, match=str(2**10)):
        METHODS["slerp"].kernel(inputs)


@pytest.mark.parametrize("run", [reference, lambda m, x, v: merged(work_for(m, x, True, v), x)])
def test_ramplus_with_no_epsilon_and_nothing_changed_by_one_model_alone_is_ram(
    run: Callable[[str, list[Tensor], dict[str, Any]], Tensor],
) -> None:
    tensors = [torch.ones(4), torch.full((4,), 3.0), torch.zeros(4)]
    got = run("ramplus_tl", tensors, {"r": 0.1, "alpha": 0.2, "epsilon": 0.0})
    assert got.tolist() == [2.0] * 4


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)], ids=str)
def test_float64_is_rounded_once(dtype: torch.dtype, bits: int, tmp_path: Path) -> None:
    middle, ulp = 1 + 2.0**-bits, 2.0 ** (1 - bits)
    want = {middle + 2.0**-40: 1 + ulp, middle - 2.0**-40: 1.0, middle: 1.0, 1 + 1.5 * ulp: 1 + 2 * ulp, 0.0: 0.0}
    values = torch.tensor([sign * value for value in want for sign in (1, -1)], dtype=torch.float64)
    assert rounded_to_odd(values).to(dtype).tolist() == [sign * value for value in want.values() for sign in (1, -1)]
    assert rounded_to_odd(torch.tensor([1e300, 1e-300]).double()).to(dtype).tolist() == [torch.inf, 0.0]
    tensors = {name: tensor.double() for name, tensor in llama_tensors(0).items()}
    tensors["model.norm.weight"] = values[:8]
    save(tmp_path / "a", tensors)
    text = f"merge_method: linear\nmodels: [{{model: a, parameters: {{weight: 1}}}}]\nout_dtype: {str(dtype)[6:]}"
    merge(text, tmp_path, tmp_path / "out")
    got = load(tmp_path / "out")["model.norm.weight"]
    assert got.dtype == dtype
    assert got.tolist() == [sign * value for value in want.values() for sign in (1, -1)][:8]
