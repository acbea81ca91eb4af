"""Every golden recipe agrees with what mergekit 0.1.5 made of it (merging.md 6)."""

from __future__ import annotations

import contextlib
import hashlib
import os
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bot.merge.checkpoints import checkpoint
from bot.merge.execution import engine
from bot.merge.execution.options import MergeOptions
from bot.merge.planning import planner
from bot.merge.planning.plan import Plan
from bot.merge.recipe import reading as recipe

NAMES = [
    "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "karcher", "linear", "linear_bf16", "linear_sharded_filter",
    "linear_unnormalized", "model_stock", "multislerp", "nearswap", "nuslerp", "nuslerp_base", "nuslerp_rowwise",
    "out_dtype", "passthrough_frankenmerge", "passthrough_scale", "ram", "ramplus_tl", "sce", "slerp", "slerp_bf16",
    "slerp_gradient", "task_arithmetic", "tied_embeddings", "ties", "ties_bf16", "ties_lambda_int8", "ties_slices",
    "tokenizer_base", "tokenizer_tokens", "tokenizer_union",
]  # fmt: skip


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Golden recipes name their parents relative to their own folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def test_every_golden_recipe_is_listed_here(shared: Path) -> None:
    present = {path.stem for path in (shared / "golden" / "merge" / "recipes").glob("*.yml")}
    assert present - set(NAMES) == set(), "a golden recipe without a test"


def merged_golden(name: str, golden: Path, out: Path, **options: Any) -> Plan:
    """Merge a golden recipe into `out`, as its author would: from inside the golden folder."""
    text = (golden / "recipes" / f"{name}.yml").read_text()
    with _inside(golden):
        parsed = recipe.parse(text)
        folders = {ref: Path(ref.path) for ref in parsed.sources}
        opened = {ref: checkpoint.open_checkpoint(checkpoint.LocalFiles(folder)) for ref, folder in folders.items()}
        planned = planner.make(parsed, opened)
        engine.merge(planned, folders, out, MergeOptions(**options))
    return planned


def differences(name: str, shared: Path, out: Path) -> list[str]:
    """What the yardstick says of a merged golden recipe; nothing if it agrees."""
    yardstick: dict[str, Any] = runpy.run_path(str(shared / "golden" / "compare.py"))
    golden = shared / "golden" / "merge"
    yardstick["compare"].__globals__["golden"] = golden
    text = (golden / "recipes" / f"{name}.yml").read_text()
    return list(yardstick["compare"](out, name, yaml.safe_load(text)))


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_recipe_agrees_with_what_mergekit_made_of_it(name: str, shared: Path, tmp_path: Path) -> None:
    planned = merged_golden(name, shared / "golden" / "merge", tmp_path / "out", threads=1)
    assert differences(name, shared, tmp_path / "out") == []
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == planned.shards[0].nbytes


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_recipe_has_the_same_bytes_with_two_threads(name: str, shared: Path, tmp_path: Path) -> None:
    golden = shared / "golden" / "merge"
    digests = []
    for threads in (1, 2):
        out = tmp_path / f"out-{threads}"
        merged_golden(name, golden, out, threads=threads)
        digests.append(hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest())
    assert digests[0] == digests[1]


EVERY_KIND_OF_PASS = [
    "arcee_fusion", "breadcrumbs", "karcher", "linear_bf16", "model_stock", "multislerp", "nearswap", "nuslerp_rowwise",
    "passthrough_scale", "ramplus_tl", "sce", "slerp", "ties", "tokenizer_union",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY_KIND_OF_PASS)
def test_a_golden_recipe_agrees_in_pieces_of_seven_elements(name: str, shared: Path, tmp_path: Path) -> None:
    merged_golden(name, shared / "golden" / "merge", tmp_path / "out", chunk=7)
    assert differences(name, shared, tmp_path / "out") == []
