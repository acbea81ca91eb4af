"""Killed at any call to the system, a merge continues and ends with the same bytes (tough case 3, merging.md 6)."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from killed_calls import EXISTS
from tiny_checkpoints import llama_tensors, save

TIES = """
merge_method: ties
base_model: base
models:
- {model: a, parameters: {weight: 0.5, density: 0.5}}
- {model: b, parameters: {weight: 0.7, density: 0.6}}
- {model: c, parameters: {weight: 0.2, density: 0.7}}
"""
STAGED = """
name: one
merge_method: dare_ties
base_model: base
models: [{model: a, parameters: {weight: 0.5, density: 0.5}}]
---
name: two
merge_method: linear
models: [{model: one, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]
---
merge_method: slerp
base_model: two
models: [{model: c}]
parameters: {t: 0.4}
"""


@pytest.fixture
def models() -> Iterator[Path]:
    """A folder that an ordinary user may reach and write to."""
    folder = Path(tempfile.mkdtemp(prefix="mergebot-kills-"))
    for seed, name in enumerate(("base", "a", "b", "c")):
        save(folder / name, llama_tensors(seed, layers=2), shards=1 + seed % 2)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    folder.chmod(0o777)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "calls", "least"),
    [(TIES, [], 18), (STAGED, ["pwrite", "fdatasync", "update", "unlink", "rename"], 10)],
    ids=["one document", "three documents"],
)
def test_killed_at_any_call_to_the_system_a_merge_continues_to_the_same_bytes(
    text: str, calls: list[str], least: int, models: Path
) -> None:
    (models / "recipe.yml").write_text(text)
    runner = Path(__file__).parent / "killed_calls.py"
    done = subprocess.run(
        [sys.executable, str(runner), str(models), str(models / "recipe.yml"), *calls],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert {"pwrite", "fdatasync", "update", "rename"} <= set(report["counts"]), "the calls that matter are watched"
    died = [outcome for outcome in report["points"].values() if outcome["died_of"]]
    assert len(died) >= least, "how often data are synced depends on time, so that some last calls are never made"
    for point, outcome in report["points"].items():
        told = f"{point}: {outcome} {done.stderr}"
        assert outcome["died_of"] == signal.SIGKILL or outcome["appeared"], told
        assert outcome["appeared"] in (None, report["whole"]), told
        assert outcome["second"] == (0 if outcome["appeared"] is None else EXISTS), told
        assert outcome["digests"] == report["whole"], told
        assert outcome["left"] == [], told
    renamed = report["points"][f"after-rename-{report['counts']['rename']}"]
    assert renamed["appeared"] == report["whole"]
    assert report["points"][f"before-rename-{report['counts']['rename']}"]["appeared"] is None
