"""Every golden recipe agrees with what mergekit 0.1.5 made of it (merging.md section 9)."""

from __future__ import annotations

import contextlib
import os
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bot.merge import checkpoint, engine, plan, recipe

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


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_recipe_agrees_with_what_mergekit_made_of_it(name: str, shared: Path, tmp_path: Path) -> None:
    yardstick: dict[str, Any] = runpy.run_path(str(shared / "golden" / "compare.py"))
    golden = shared / "golden" / "merge"
    yardstick["compare"].__globals__["golden"] = golden
    text = (golden / "recipes" / f"{name}.yml").read_text()
    with _inside(golden):
        parsed = recipe.parse(text)
        folders = {ref: Path(ref.path) for ref in parsed.sources}
        opened = {ref: checkpoint.open_checkpoint(checkpoint.LocalFiles(folder)) for ref, folder in folders.items()}
        planned = plan.make(parsed, opened)
        merged = engine.merge(planned, folders, tmp_path / "out")
    assert yardstick["compare"](tmp_path / "out", name, yaml.safe_load(text)) == []
    assert merged.files["model.safetensors"].bytes == planned.shards[0].nbytes
