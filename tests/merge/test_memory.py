"""A merge takes the memory its plan promises, and no whole tensor ever stands in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_methods import CASES, work_for
from tiny_checkpoints import llama_tensors, save

from bot.merge.planning.memory import chunk_of, row_length
from bot.merge.streaming.inputs import CpuReader, Inputs
from bot.merge.streaming.operation import CHUNK

ROWS, WIDTH = 12_000, 2048  # one tensor of 98 MB in float32
PARENTS = "models: [{model: a, parameters: {weight: 0.5}}, {model: b, parameters: {weight: 0.3}}]"
BASE = "base_model: base\n"
RECIPES = {
    "linear": PARENTS,
    "nuslerp": f"{PARENTS}\nparameters: {{nuslerp_flatten: false, nuslerp_row_wise: true}}",
    "karcher": PARENTS,
    "model_stock": f"{BASE}{PARENTS}\nparameters: {{filter_wise: true}}",
    "breadcrumbs_ties": f"{BASE}{PARENTS}\nparameters: {{density: 0.4, gamma: 0.1, rescale: true}}",
    "della": f"{BASE}{PARENTS}\nparameters: {{density: 0.5}}",
    "sce": f"{BASE}{PARENTS}\nparameters: {{select_topk: 0.5}}",
    "arcee_fusion": f"{BASE}models: [{{model: a}}]",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    for seed, name in enumerate(("base", "a", "b")):
        draw = torch.Generator().manual_seed(seed)
        tensors = llama_tensors(seed, layers=1)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.randn(ROWS, WIDTH, generator=draw)
        save(folder / name, tensors)
    return folder


@pytest.mark.parametrize(("method", "count", "values"), [*CASES, ("arcee_fusion", 1, {})])
def test_no_piece_is_longer_than_the_plan_counts_on_and_none_cuts_a_row(
    method: str, count: int, values: dict[str, Any]
) -> None:
    for shape in ((3 * CHUNK // 2,), (3, 2 * CHUNK + 1), (1000, 700), (2, 3, CHUNK), (5,), ()):
        tensors = [torch.empty(shape, device="meta")] * (count + 1)
        work = work_for(method, tensors, True, values)
        spans = list(Inputs(work, CpuReader([]), torch.float32, row_length(work)).spans())
        assert max(stop - start for start, stop in spans) <= chunk_of(work)
        assert {start % row_length(work) for start, _ in spans} == {0}


@pytest.fixture(scope="module")
def measured(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """The memory that a merge by each method took and was said to take, in bytes."""
    folder = tmp_path_factory.mktemp("merges")
    recipes = []
    for method, text in RECIPES.items():
        recipes.append(folder / f"{method}.yml")
        recipes[-1].write_text(f"merge_method: {method}\n{text}\n")
    command = [sys.executable, str(Path(__file__).parent / "measured_merge.py"), str(models), *map(str, recipes)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return dict(zip(RECIPES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("method", RECIPES)
def test_a_merge_takes_no_more_memory_than_its_plan_says(method: str, measured: dict[str, dict[str, int]]) -> None:
    assert measured[method]["peak"] <= measured[method]["planned"]
    assert measured[method]["planned"] < 600e6, "three inputs alone have 295 MB and the output 98 MB"
