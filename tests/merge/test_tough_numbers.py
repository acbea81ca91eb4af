"""Numbers: the float64 truth rounded once, and values that are not finite (tough cases 2 and 9, merging.md 6)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import method_oracles as oracle
import numpy as np
import pytest
import torch
from test_contract import TABLE, text_of
from tiny_checkpoints import llama_tensors, load, merge, save
from torch import Tensor

from bot.errors import Failed
from bot.merge.methods import METHODS, Base
from bot.merge.planning.work import mask_key

MATRIX = "model.layers.0.mlp.up_proj.weight"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VALUES: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.4, "normalize": False},
    "slerp": {"t": 0.3},
    "nuslerp": {"weight": 0.4},
    "multislerp": {"weight": 0.4},
    "karcher": {},
    "task_arithmetic": {"weight": 0.7, "lambda": 1.1},
    "ties": {"weight": 0.7, "density": 0.4, "lambda": 1.1},
    "dare_linear": {"weight": 0.3, "density": 0.6},
    "dare_ties": {"weight": 0.7, "density": 0.6},
    "della": {"weight": 0.7, "density": 0.6},
    "della_linear": {"weight": 0.3, "density": 0.6, "epsilon": 0.3},
    "breadcrumbs": {"weight": 0.3, "density": 0.6, "gamma": 0.1},
    "breadcrumbs_ties": {"weight": 0.7, "density": 0.6, "gamma": 0.1},
    "model_stock": {},
    "passthrough": {"scale": 0.3},
    "nearswap": {"t": 0.03},
    "sce": {"select_topk": 0.6},
    "ram": {"epsilon": 0.03},
    "ramplus_tl": {"r": 0.5, "alpha": 0.7, "epsilon": 0.03},
}


def family(folder: Path, dtype: torch.dtype = torch.float32, spread: float = 0.05) -> dict[str, dict[str, Tensor]]:
    """A base and three fine-tunes of it, as stored."""
    base = llama_tensors(0, layers=1)
    out = {}
    for seed, name in enumerate(("base", "a", "b", "c")):
        noise = llama_tensors(10 + seed, layers=1)
        tensors = {k: v + (spread * noise[k] if seed else 0) for k, v in base.items()}
        save(folder / name, tensors, dtype=dtype)
        out[name] = load(folder / name)
    return out


def usual(method: str) -> tuple[list[str], str | None]:
    base, _, most, *_ = TABLE[method]
    return ["a", "b", "c"][: most or 3], None if base is Base.IGNORED else "base"


def truth(method: str, name: str, stored: Mapping[str, Mapping[str, Tensor]], base: str | None) -> Tensor:
    """The float64 reference for one tensor, with the masks that the engine draws."""
    inputs, _ = usual(method)
    x = [stored[model][name].double().numpy() for model in inputs]
    b = None if base is None else stored[base][name].double().numpy()
    _, _, _, per_input, shared, _ = TABLE[method]
    values = {**per_input, **shared, **VALUES[method]}
    values = {k: [v] * len(x) if k in per_input else v for k, v in values.items()}
    if method in ("ram", "ramplus_tl"):
        return torch.from_numpy(np.asarray(oracle.ram(x, b, **values)))  # type: ignore[arg-type]
    if hasattr(oracle, method):
        function: Callable[..., Any] = getattr(oracle, method)
        return torch.from_numpy(np.asarray(function(x, b, **values)))
    keys = [mask_key(0, model, name) for model in inputs]
    assert b is not None
    return torch.from_numpy(np.asarray(oracle.task_vectors(method, x, b, **values, keys=keys)))


def half_ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest error of one rounding of `value` (float64) to `dtype`."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(value.abs().clamp(min=info.tiny)))
    return torch.exp2(exponent) * info.eps / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", VALUES)
def test_a_merge_is_the_float64_truth_rounded_once(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    stored = family(tmp_path, dtype)
    for base in {usual(method)[1], None if METHODS[method].base is Base.OPTIONAL else usual(method)[1]}:
        out = tmp_path / f"out-{base}"
        merge(text_of(method, usual(method)[0], base, VALUES[method]), tmp_path, out)
        for name, got in load(out).items():
            want = truth(method, name, stored, base)
            assert got.dtype == dtype
            allowed = half_ulp(want, dtype) + 3e-6 * float(want.abs().max())
            worst = ((got.double() - want).abs() / allowed).max()
            assert float(worst) <= 1, f"{name} {float(worst)}"


def test_arcee_fusion_in_bfloat16_chooses_what_float64_would(tmp_path: Path) -> None:
    stored = family(tmp_path, torch.bfloat16)
    merge(text_of("arcee_fusion", ["a"], "base", {}), tmp_path, tmp_path / "out")
    differs = total = 0
    for name, got in load(tmp_path / "out").items():
        assert got.dtype == torch.bfloat16
        x, b = stored["a"][name], stored["base"][name]
        from_x = got == x
        assert bool((from_x | (got == b)).all()), "every element is one parent's, bit for bit"
        p, q = (np.exp(e) / np.exp(e).sum(-1, keepdims=True) + 1e-8 for e in (x.double().numpy(), b.double().numpy()))
        importance = np.abs((x.double() - b.double()).numpy()) * (p * np.log(p / q)).sum(-1, keepdims=True)
        ordered = np.sort(importance.ravel())
        median, low, high = (ordered[int(f * (len(ordered) - 1))] for f in (0.5, 0.25, 0.75))
        wanted = torch.from_numpy(importance >= median + 1.5 * (high - low))
        differs += int(((from_x != wanted) & (x != b)).sum())
        total += got.numel()
    assert differs <= 1e-3 * total


def test_ramplus_in_bfloat16_writes_bfloat16(tmp_path: Path) -> None:
    family(tmp_path, torch.bfloat16)
    for method, inputs_ in (("ramplus_tl", ["a", "b", "c"]), ("arcee_fusion", ["a"])):
        merge(text_of(method, inputs_, "base", {}) + "dtype: bfloat16", tmp_path, tmp_path / method)
        assert {tensor.dtype for tensor in load(tmp_path / method).values()} == {torch.bfloat16}
        assert json.loads((tmp_path / method / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("method", "bad"),
    [*((method, "nan") for method in [*VALUES, "arcee_fusion"]), ("linear", "inf"), ("ties", "-inf"), ("slerp", "inf")],
)
def test_a_value_that_is_not_finite_stays_one_element_and_is_named(method: str, bad: str, tmp_path: Path) -> None:
    stored = family(tmp_path)
    inputs_, base = usual(method)
    text = text_of(method, inputs_, base, VALUES.get(method, {}))
    merge(text, tmp_path, tmp_path / "clean")
    for model in dict.fromkeys(["a", inputs_[-1], *([base] if base else [])]):
        tensors = {k: v.clone() for k, v in stored[model].items()}
        tensors[MATRIX][3, 5] = float(bad)
        save(tmp_path / model, tensors)
        done = merge(text, tmp_path, tmp_path / f"out-{model}")
        got, clean = load(tmp_path / f"out-{model}"), load(tmp_path / "clean")
        assert (~got[MATRIX].isfinite()).nonzero().tolist() == [[3, 5]]
        assert all(torch.equal(got[name], clean[name]) for name in got if name != MATRIX)
        notice = next(notice for notice in done.notices if notice.code == "NOT_FINITE")
        assert notice.count == 1
        assert notice.text.startswith(f"{model} ")
        assert MATRIX in notice.text
        if method in ("linear", "passthrough", "task_arithmetic", "nearswap", "ram"):
            rest = torch.ones_like(got[MATRIX], dtype=torch.bool)
            rest[3, 5] = False
            assert torch.equal(got[MATRIX][rest], clean[MATRIX][rest])
        with pytest.raises(Failed) as caught:
            merge(text, tmp_path, tmp_path / f"strict-{model}", on_nonfinite="fail")
        assert (caught.value.code, caught.value.value) == ("NOT_FINITE", MATRIX)
        assert model in caught.value.message
        save(tmp_path / model, stored[model])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_nan_at_either_end_of_a_tensor_of_any_type_is_found(where: str, dtype: torch.dtype, tmp_path: Path) -> None:
    stored = family(tmp_path, dtype)
    for name in ("model.embed_tokens.weight", "model.norm.weight", MATRIX):
        tensors = {k: v.clone() for k, v in stored["b"].items()}
        tensors[name].view(-1)[0 if where == "first" else -1] = float("nan")
        save(tmp_path / "b", tensors)
        with pytest.raises(Failed) as caught:
            merge(text_of("linear", ["a", "b"], None, {"weight": 1}), tmp_path, tmp_path / name, on_nonfinite="fail")
        assert (caught.value.code, caught.value.value) == ("NOT_FINITE", name)
        assert not (tmp_path / name).exists()
