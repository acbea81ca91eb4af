"""Every method against a slow float64 reference, in its ordinary and in its odd cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import method_oracles as oracle
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_memory import merged, merged_and_inputs
from torch import Tensor

from bot.merge.checkpoints.header import TensorInfo
from bot.merge.methods import METHODS, Base, Parameter, merge_method
from bot.merge.planning.work import Operand, Work, mask_key
from bot.merge.recipe.dtypes import BY_NAME
from bot.merge.recipe.spec import ModelRef
from bot.merge.streaming import masks, selection
from bot.merge.streaming.operation import CHUNK
from bot.merge.streaming.selection import Selection

FAMILY = dict(weight=[0.5, -0.3, 0.8], normalize=True, **{"lambda": 1.2})
SPARSE = dict(FAMILY, density=[0.4, 1.0, 0.7], rescale=True)
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("linear", 3, {"weight": [0.5, -0.2, 0.9], "normalize": True}),
    ("linear", 2, {"weight": [0.5, 0.2], "normalize": False}),
    ("passthrough", 1, {"scale": [None]}),
    ("passthrough", 1, {"scale": [0.3]}),
    ("slerp", 1, {"t": 0.3}),
    ("slerp", 1, {"t": 1.4}),
    ("nuslerp", 2, {"weight": [0.3, 0.9], "nuslerp_flatten": True, "nuslerp_row_wise": False}),
    ("nuslerp", 2, {"weight": [0.3, -0.3], "nuslerp_flatten": False, "nuslerp_row_wise": False}),
    ("nuslerp", 2, {"weight": [0.3, 0.9], "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("multislerp", 3, {"weight": [0.3, 0.9, 0.1], "normalize_weights": True, "eps": 1e-8}),
    ("multislerp", 3, {"weight": [0.3, 0.9, 0.1], "normalize_weights": False, "eps": 1e-3}),
    ("multislerp", 1, {"weight": [0.3], "normalize_weights": True, "eps": 1e-8}),
    ("karcher", 4, {"max_iter": 10, "tol": 1e-5}),
    ("karcher", 3, {"max_iter": 0, "tol": 1e-5}),
    ("task_arithmetic", 3, FAMILY),
    ("task_arithmetic", 2, dict(FAMILY, weight=[1.0, -1.0])),
    ("ties", 3, SPARSE),
    ("ties", 2, dict(SPARSE, weight=[0.5, 0.5], density=[0.0, 0.01], rescale=False)),
    ("breadcrumbs", 3, dict(SPARSE, gamma=[0.1, 0.5, 0.35])),
    ("breadcrumbs_ties", 3, dict(SPARSE, gamma=[0.1, 0.5, 0.35], normalize=False)),
    ("dare_linear", 3, SPARSE),
    ("dare_ties", 3, dict(SPARSE, rescale=False)),
    ("della", 3, dict(SPARSE, epsilon=[0.1, 0.2, 0.05])),
    ("della_linear", 3, dict(SPARSE, epsilon=[0.0, 0.2, 0.25])),
    ("model_stock", 3, {"filter_wise": False}),
    ("model_stock", 2, {"filter_wise": True}),
    ("nearswap", 1, {"t": 0.05}),
    ("sce", 3, {"select_topk": 0.6}),
    ("sce", 3, {"select_topk": 1.0}),
    ("sce", 2, {"select_topk": 0.0}),
    ("ram", 3, {"epsilon": 0.03}),
    ("ramplus_tl", 3, {"epsilon": 0.1, "r": 0.5, "alpha": 0.7}),
]
SHAPES = [(6, 7), (13,), (5, 1), (2, 3, 4)]
BASELESS = {"linear", "passthrough", "karcher"}


def inputs(count: int, shape: Sequence[int], seed: int, spread: float = 0.1) -> tuple[list[Tensor], Tensor]:
    """Models near a base, as fine-tunes are, in float32."""
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(*shape, generator=draw)
    return [base + spread * torch.randn(*shape, generator=draw) for _ in range(count)], base


def ours(method: str, x: list[Tensor], b: Tensor | None, values: dict[str, Any], **options: Any) -> Tensor:
    """The result of the engine's kernel, in the compute dtype."""
    tensors = [*x, *([b] if b is not None else [])]
    return merged(work_for(method, tensors, b is not None, values), tensors, **options)


def keys_for(count: int) -> list[int]:
    return [mask_key(0, f"o/m{i}", "w") for i in range(count)]


def truth(
    method: str, x: list[Tensor], b: Tensor | None, values: dict[str, Any], dtype: torch.dtype = torch.float64
) -> Tensor:
    """The slow reference on the same stored numbers, in float64 or another type."""
    x64 = [e.to(dtype).numpy() for e in x]
    b64 = None if b is None else b.to(dtype).numpy()
    if method in ("ram", "ramplus_tl"):
        out = oracle.ram(x64, b64, **values)  # type: ignore[arg-type]
    elif hasattr(oracle, method):
        function: Callable[..., Any] = getattr(oracle, method)
        out = function(x64, b64, **values)
    else:
        out = oracle.task_vectors(method, x64, b64, **values, keys=keys_for(len(x)))  # type: ignore[arg-type]
    return torch.from_numpy(np.asarray(out))


def with_base(method: str) -> list[bool]:
    return [False] if method in BASELESS else [False, True] if METHODS[method].base.value == "optional" else [True]


def test_every_method_has_a_case() -> None:
    assert {method for method, _, _ in CASES} | {"arcee_fusion"} == set(METHODS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("method", "count", "values"), CASES)
def test_a_method_agrees_with_its_float64_reference(
    method: str, count: int, values: dict[str, Any], shape: tuple[int, ...]
) -> None:
    for seed in range(3):
        x, b = inputs(count, shape, seed)
        for base in (b if used else None for used in with_base(method)):
            before = [e.clone() for e in (*x, b)]
            got, want = ours(method, x, base, values), truth(method, x, base, values)
            assert got.shape == b.shape
            assert float((got.double() - want).abs().max()) <= 3e-6 * float(want.abs().max())
            assert all(torch.equal(e, f) for e, f in zip((*x, b), before, strict=True)), "inputs are left alone"


@pytest.mark.parametrize(("method", "count", "values"), [case for case in CASES if not METHODS[case[0]].draws])
def test_float32_arithmetic_is_never_worse_than_the_formula_in_the_storage_type(
    method: str, count: int, values: dict[str, Any]
) -> None:
    mine = theirs = 0.0
    for seed in range(4):
        x, b = inputs(count, (24, 16), seed, spread=0.02)
        x, b = [e.half() for e in x], b.half()
        base = b if with_base(method)[-1] else None
        want = truth(method, x, base, values)
        mine += float((ours(method, x, base, values).half().double() - want).abs().mean())
        theirs += float((truth(method, x, base, values, torch.float16).half().double() - want).abs().mean())
    assert mine <= theirs * 1.001
    if method in ("ties", "karcher"):
        assert mine < theirs


def test_arcee_fusion_takes_each_element_whole_from_one_parent() -> None:
    x, b = inputs(1, (40, 30), 0)
    got = ours("arcee_fusion", x, b, {})
    from_x = got == x[0]
    assert bool((from_x | (got == b)).all())
    p, q = (torch.softmax(e.double(), -1) + 1e-8 for e in (x[0], b))
    importance = (x[0] - b).double().abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    ordered = importance.flatten().sort().values
    median, low, high = (ordered[int(f * (len(ordered) - 1))] for f in (0.5, 0.25, 0.75))
    expected = importance >= median + 1.5 * (high - low)
    assert 0 < int(expected.sum()) < expected.numel() / 2
    assert int((from_x != expected).sum()) <= 1


def test_opposite_votes_of_one_size_elect_plus_whatever_the_order() -> None:
    base = torch.zeros(4)
    x = [torch.tensor([0.1, -0.1, 0.3, 0.0]), torch.tensor([-0.1, 0.1, 0.0, 0.0])]
    values = dict(weight=[1.0, 1.0], density=[1.0, 1.0], normalize=True, rescale=False, **{"lambda": 1.0})
    for order in (x, x[::-1]):
        torch.testing.assert_close(ours("ties", order, base, values), torch.tensor([0.1, 0.1, 0.3, 0.0]))


def first_largest(sizes: Tensor, k: int) -> Tensor:
    """Mask of the k largest elements by a stable sort; of equal elements the first ones."""
    out = torch.zeros(len(sizes), dtype=torch.bool)
    out[sizes.sort(descending=True, stable=True).indices[:k]] = True
    return out


def test_equal_magnitudes_are_kept_from_the_front_and_exactly_as_many_as_asked_for() -> None:
    sizes = torch.tensor([1.0, 2.0, 1.0, 1.0, 3.0, 1.0])
    assert (streamed(sizes, 4)[1] != 0).tolist() == [True, True, True, False, True, False]
    assert (streamed(sizes, 0)[1] != 0).sum() == 0
    assert (streamed(sizes, 6)[1] != 0).all()


def streamed(sizes: Tensor, k: int, chunk: int = 7) -> tuple[Selection, Tensor]:
    """The streaming search for the k largest of `sizes`, and `-sizes` with the other elements set to zero."""
    work = work_for("ram", [sizes, torch.zeros_like(sizes)], True, {"epsilon": 0.0})
    _, given = merged_and_inputs(work, [sizes, torch.zeros_like(sizes)], chunk=chunk)
    ((found,),) = selection.select(given, lambda part: [part.x[0]], [[k]])
    select = selection.Selector(found, torch.float32)
    return found, torch.cat([select(part) for part in (-sizes).split(chunk)])


@settings(max_examples=60)
@given(st.lists(st.sampled_from([0.0, 0.5, 0.5, 1.0, 2.0]), min_size=1, max_size=40), st.integers(0, 45))
def test_a_streaming_search_selects_what_a_sort_would(values: list[float], k: int) -> None:
    sizes = torch.tensor(values)
    want = torch.where(first_largest(sizes, k), -sizes, torch.zeros_like(sizes))
    assert torch.equal(streamed(sizes, k)[1], want)


@pytest.mark.parametrize("kind", ["smooth", "few values", "mostly zero", "sample misled", "ascending"])
def test_a_search_in_a_large_tensor_is_exact_whatever_its_sample_says(kind: str) -> None:
    n = 600_000
    draw = torch.Generator().manual_seed(1)
    sizes = torch.randn(n, generator=draw).abs_()
    if kind == "few values":
        sizes = (sizes * 4).round() / 4
    elif kind == "mostly zero":
        sizes = sizes * (torch.rand(n, generator=draw) < 0.2)
    elif kind == "sample misled":
        sizes[torch.arange(n) % (n // 63) < 1100] += 50.0
    elif kind == "ascending":
        sizes = sizes.sort().values
    for k in (1, 17, n // 3, n - 5, int(0.2 * n)):
        want = torch.where(first_largest(sizes, k), -sizes, torch.zeros_like(sizes))
        found, got = streamed(sizes, k, chunk=2**17)
        assert int((sizes > found.threshold).sum()) + found.equal == k
        assert torch.equal(got, want)


def test_the_spherical_methods_are_defined_for_zero_and_for_opposite_vectors() -> None:
    zero, one = torch.zeros(4), torch.ones(4)
    settings = {"max_iter": 10, "tol": 1e-5}
    assert torch.allclose(ours("karcher", [zero, one], None, settings), one / 2)
    assert torch.equal(ours("karcher", [zero, zero], None, settings), zero)
    assert ours("karcher", [one, -one], None, settings).isfinite().all()
    assert torch.allclose(ours("slerp", [-one], one, {"t": 0.25}), one / 2)
    assert torch.allclose(ours("slerp", [one], zero, {"t": 0.5}), one * 0.5**0.5)
    weights = {"weight": [1.0, 1.0], "normalize_weights": True, "eps": 1e-8}
    assert torch.equal(ours("multislerp", [one, -one], None, weights), zero)


def test_the_random_stream_is_splitmix64_and_its_key_names_the_tensor() -> None:
    cpu = torch.device("cpu")
    assert masks.torch_draws(0, 0, 1, cpu).tolist() == [0xE220A8397B1DCDAF >> 40]
    key = mask_key(0, "parents/a", "model.norm.weight")
    assert key == 0x2C544E03C5B7CDB7
    assert masks.torch_draws(key, 0, 1, cpu).tolist() == [0x728C703FE3024C47 >> 40]
    assert mask_key(1, "parents/a", "model.norm.weight") != key
    assert [n * 2.0**-24 for n in masks.torch_draws(key, 0, 50, cpu).tolist()] == oracle._stream(key, 50)
    assert masks.torch_draws(key, 5, 3, cpu).tolist() == masks.torch_draws(key, 0, 8, cpu)[5:].tolist()


def test_a_drop_rate_holds_within_four_sigma_and_l1_is_preserved() -> None:
    n, density = 600_000, 0.3
    x, b = inputs(1, (n,), 0)
    kept = float(masks.by_chance(density, 7)(x[0] - b, 0).sum())
    assert abs(kept - density * n) < 4 * (n * density * (1 - density)) ** 0.5
    values = dict(weight=[1.0], density=[density], normalize=False, rescale=True, **{"lambda": 1.0})
    result = ours("dare_linear", x, b, values)
    assert float((result - b).abs().sum()) == pytest.approx(float((x[0] - b).abs().sum()), rel=1e-4)


def work_for(method: str, x: Sequence[Tensor], base: bool, values: dict[str, Any]) -> Work:
    """The work the planner would make for inputs x, the base last."""
    contract = METHODS[method]
    mine = {p.name for p in contract.per_input}
    per_input = {k: (*v, *([None] if base else [])) for k, v in values.items() if k in mine}
    shared = {k: v for k, v in values.items() if k not in mine}
    shape = tuple(x[0].shape)
    operands = tuple(
        Operand(ref, ref, TensorInfo("w", BY_NAME[str(e.dtype).removeprefix("torch.")], shape, "f", 0, 0))
        for ref, e in ((ModelRef(f"o/m{i}"), e) for i, e in enumerate(x))
    )
    keys = tuple(keys_for(len(x))) if contract.draws else ()
    position = len(x) - 1 if base else None
    return Work("w", shape, BY_NAME["bfloat16"], "merge", method, operands, position, per_input, shared, keys)


SUMMED = {"slerp", "nuslerp", "multislerp", "karcher", "model_stock", "della", "della_linear", "sce"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("method", "count", "values"), [*CASES, ("arcee_fusion", 1, {})])
def test_chunks_give_the_bits_of_the_whole_tensor(
    method: str, count: int, values: dict[str, Any], dtype: torch.dtype
) -> None:
    for base in with_base(method):
        x, b = inputs(count, (331, 1021), 5)
        tensors = [e.to(dtype) for e in (*x, *([b] if base else []))]
        work = work_for(method, tensors, base, values)
        whole = merged(work, tensors, chunk=2 * CHUNK)  # in one chunk
        chunks = merged(work, tensors)
        if method in SUMMED or values.get("rescale"):  # sums over the tensor are formed in other portions
            torch.testing.assert_close(chunks, whole, rtol=0, atol=5e-7 * float(whole.abs().max()))
        else:
            assert torch.equal(chunks, whole)
        assert torch.equal(merged(work, tensors, ring=True), chunks)


@pytest.mark.parametrize(("method", "count", "values"), [*CASES, ("arcee_fusion", 1, {})])
def test_chunks_of_seven_elements_agree_with_the_reference(method: str, count: int, values: dict[str, Any]) -> None:
    for shape in SHAPES:
        for base in with_base(method):
            x, b = inputs(count, shape, 6)
            tensors = [*x, *([b] if base else [])]
            work = work_for(method, tensors, base, values)
            for kind in (torch.float32, torch.float64):
                want = truth(method, x, b if base else None, values).to(kind)
                chunks = merged(work, tensors, chunk=7, dtype=kind)
                torch.testing.assert_close(chunks, want, rtol=0, atol=3e-6 * float(want.abs().max()))


@pytest.mark.parametrize(("method", "count", "values"), [*CASES, ("arcee_fusion", 1, {})])
def test_a_nan_stays_in_its_element_and_no_sum_sees_it(method: str, count: int, values: dict[str, Any]) -> None:
    for base in with_base(method):
        x, b = inputs(count, (6, 7), 6)
        clean = [*x, *([b] if base else [])]
        spoilt = [e.clone() for e in clean]
        for e in clean:
            e[3, 4] = 0.0
        spoilt[0][3, 4] = torch.nan
        work = work_for(method, clean, base, values)
        want = merged(work, clean, chunk=14)
        got, remembered = merged_and_inputs(work, spoilt, chunk=14)
        assert torch.isnan(got[3, 4])
        got[3, 4] = want[3, 4] = 0.0
        assert torch.equal(got, want)
        assert remembered.nonfinite == {"o/m0": 1}


def test_draws_in_torch_are_those_of_numpy_bit_for_bit() -> None:
    for key in (0, 1, 2**63, 2**64 - 1, mask_key(0, "o/m", "w")):
        for start in (0, 2**18, 2**40):
            want = np.concatenate([part >> np.uint64(40) for _, part in masks._stream(key, start, 5000)])
            assert masks.torch_draws(key, start, 5000, torch.device("cpu")).tolist() == want.tolist()


@pytest.mark.parametrize(
    ("method", "tensors", "values", "code"),
    [
        ("slerp", [torch.zeros(4), torch.ones(4)], {"t": 0.5}, "ZERO_TENSOR"),
        ("karcher", [torch.ones(4), -torch.ones(4)], {"max_iter": 5, "tol": 1e-5}, "ANTIPODAL"),
        (
            "multislerp", [torch.ones(4), -torch.ones(4)],
            {"weight": [1.0, 1.0], "normalize_weights": True, "eps": 1e-8}, "MEAN_VANISHES",
        ),
        ("sce", [torch.ones(4), torch.ones(4) + 1e-4], {"select_topk": 1.0}, "EVEN_SHARES"),
        ("model_stock", [torch.ones(4), torch.ones(4), torch.ones(4) + 1e-5], {"filter_wise": False}, "COSINE_DAMPED"),
    ],
)  # fmt: skip
def test_corner_cases_are_counted(method: str, tensors: list[Tensor], values: dict[str, Any], code: str) -> None:
    base = method not in BASELESS and METHODS[method].base.value == "required"
    _, remembered = merged_and_inputs(work_for(method, tensors, base, values), tensors)
    assert remembered.corner_cases == {code: 1}


def test_a_method_in_one_decorated_function_can_be_planned_and_merged() -> None:
    """A new method needs a kernel and its parameters, nothing else."""

    @merge_method(
        "midpoint", base=Base.REQUIRED, inputs=(1, 1), shared=(Parameter("pull", 0.5, low=0, high=1),), reference="test"
    )
    def midpoint(given: Any) -> Any:
        """(1 - pull) b + pull x."""
        pull = given.number("pull")
        return lambda part: part.x[0].mul_(pull).add_(part.b.mul_(1 - pull))

    try:
        x, b = inputs(1, (6, 7), 0)
        torch.testing.assert_close(ours("midpoint", x, b, {"pull": 0.25}), 0.25 * x[0] + 0.75 * b)
        assert METHODS["midpoint"].summary == "(1 - pull) b + pull x."
    finally:
        del METHODS["midpoint"]
