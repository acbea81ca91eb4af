"""bfloat16: on every golden recipe with such weights we are at least as near to the float64 truth as mergekit."""

from __future__ import annotations

from pathlib import Path

import method_oracles as oracle
import numpy as np
import pytest
import torch
from test_golden import merged_golden
from tiny_checkpoints import load
from torch import Tensor

A64 = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def wide(folder: Path) -> dict[str, A64]:
    return {name: tensor.double().numpy() for name, tensor in load(folder).items()}


def true_weights(name: str, parents: Path) -> dict[str, A64]:
    """What the recipe asks for, in float64, from the stored numbers. Written from the recipe, not parsed from it."""
    if name == "linear_bf16":
        a, b, c = (wide(parents / f"{model}_bf16") for model in "abc")
        return {k: (a[k] + 2 * b[k] + 3 * c[k]) / 6 for k in a}
    if name == "slerp_bf16":
        a, b = (wide(parents / f"{model}_bf16") for model in "ab")
        return {k: oracle.slerp([b[k]], a[k], t=0.5) for k in a}
    if name == "out_dtype":
        a, b = wide(parents / "a"), wide(parents / "b")
        return {k: (0.5 * a[k] + 0.5 * b[k]) / 1.0 for k in a}
    base, a, b = (wide(parents / f"{model}_bf16") for model in ("base", "a", "b"))
    values = {"weight": [0.5, 0.5], "density": [0.5, 0.5], "normalize": True, "rescale": False, "lambda": 1.0}
    return {k: oracle.task_vectors("ties", [a[k], b[k]], base[k], **values) for k in a}


def tied(parents: Path, k: str) -> Tensor:
    """Elements whose delta equals the threshold of its model: mergekit's choice among them is luck."""
    base = load(parents / "base_bf16")[k].double().flatten()
    out = torch.zeros(base.numel(), dtype=torch.bool)
    for model in "ab":
        sizes = (load(parents / f"{model}_bf16")[k].double().flatten() - base).abs()
        threshold = sizes.sort(descending=True).values[max(1, int(0.5 * sizes.numel())) - 1]
        out |= sizes == threshold
    return out


@pytest.mark.parametrize("name", ["linear_bf16", "slerp_bf16", "out_dtype", "ties_bf16"])
def test_we_are_no_further_from_the_truth_than_mergekit(name: str, shared: Path, tmp_path: Path) -> None:
    golden = shared / "golden" / "merge"
    merged_golden(name, golden, tmp_path / "out")
    ours, theirs = load(tmp_path / "out"), load(golden / "expected" / name)
    truth = true_weights(name, golden / "parents")
    worse = []
    total = {"ours": 0.0, "mergekit": 0.0, "one rounding": 0.0}
    for k, value in truth.items():
        want = torch.from_numpy(np.asarray(value)).flatten()
        skip = tied(golden / "parents", k) if name == "ties_bf16" else torch.zeros(want.numel(), dtype=torch.bool)
        errors = [
            float((stored.flatten().double() - want)[~skip].abs().sum())
            for stored in (ours[k], theirs[k], want.to(torch.bfloat16))
        ]
        total = {who: sum_ + error for (who, sum_), error in zip(total.items(), errors, strict=True)}
        if errors[0] > errors[1]:
            worse.append(f"{k}: ours {errors[0]:.6g}, mergekit {errors[1]:.6g}")
        whole = [float((stored.flatten().double() - want).abs().max()) for stored in (ours[k], theirs[k])]
        if whole[0] > whole[1]:
            worse.append(f"{k}: our worst {whole[0]:.6g}, mergekit's {whole[1]:.6g}")
    assert not worse, f"{total} {worse}"
    assert total["ours"] <= 1.0001 * total["one rounding"], f"more than one rounding: {total}"
    if name == "ties_bf16":
        assert total["ours"] < total["mergekit"] / 2, f"{total}"
