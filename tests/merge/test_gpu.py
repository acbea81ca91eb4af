"""The same merges on a GPU. Not run where there is none; what can be shown without one is in test_methods.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from in_memory import TensorView, merged
from test_methods import CASES, inputs, keys_for, with_base, work_for
from tiny_checkpoints import llama_tensors, load, merge, save

from bot.merge.execution.device import DeviceReader
from bot.merge.methods import METHODS
from bot.merge.planning.memory import row_length
from bot.merge.streaming.inputs import Inputs
from bot.merge.streaming.masks import torch_draws

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is to be seen here"),
]


@pytest.mark.parametrize(("method", "count", "values"), [*CASES, ("arcee_fusion", 1, {})])
def test_a_gpu_computes_what_the_cpu_does(method: str, count: int, values: dict[str, Any]) -> None:
    device = torch.device("cuda", 0)
    for base in with_base(method):
        x, b = inputs(count, (331, 1021), 5)
        tensors = [*x, *([b] if base else [])]
        work = work_for(method, tensors, base, values)
        views = [TensorView(tensor, torch.float32) for tensor in tensors]
        given = Inputs(work, DeviceReader(views, torch.float32, device), torch.float32, row_length(work), chunk=2**16)
        kernel = METHODS[method].kernel(given)
        got = torch.cat([kernel(part).cpu() for part in given.chunks()]).reshape(work.shape)
        want = merged(work, tensors)
        unlike = (got - want).abs() > 1e-6 * float(want.abs().max())
        assert float(unlike.float().mean()) <= 1e-5, "a sum that differs in its last bit may move a threshold"


def test_draws_on_a_gpu_are_those_of_the_cpu() -> None:
    for key in keys_for(3):
        here, there = (torch_draws(key, 2**33, 2**20, torch.device(kind)) for kind in ("cpu", "cuda"))
        assert torch.equal(here, there.cpu())


def test_a_whole_merge_on_a_gpu_agrees_with_the_cpu(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        save(tmp_path / name, llama_tensors(seed), dtype=torch.bfloat16)
    text = (
        "merge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {weight: 0.7, density: 0.4}"
    )
    merge(text, tmp_path, tmp_path / "cpu", shard_limit_bytes=3000)
    merge(text, tmp_path, tmp_path / "gpu", shard_limit_bytes=3000, device="cuda")
    there = load(tmp_path / "gpu")
    for name, tensor in load(tmp_path / "cpu").items():
        torch.testing.assert_close(there[name], tensor, rtol=1e-2, atol=1e-5)
