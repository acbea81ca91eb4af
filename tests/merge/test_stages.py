"""Recipes of several documents: planned from headers to the end, resumed at any moment, nothing left in scratch."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import llama_tensors, load, merge, save

from bot.errors import Refused
from bot.merge.checkpoints import checkpoint
from bot.merge.execution import stages
from bot.merge.execution.options import MergeOptions
from bot.merge.planning import plan, planner, summary
from bot.merge.recipe import reading as recipe
from bot.merge.recipe.spec import ModelRef
from tests import forked

STAGED = """
name: one
merge_method: slerp
base_model: a
models: [{model: a}, {model: b}]
parameters: {t: 0.25}
---
name: two
merge_method: linear
models: [{model: one, parameters: {weight: 2}}, {model: c, parameters: {weight: 1}}]
---
merge_method: dare_ties
base_model: a
models: [{model: one, parameters: {weight: 1, density: 0.5}}, {model: two, parameters: {weight: 0.5, density: 0.5}}]
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, name in enumerate("abc"):
        save(tmp_path / name, llama_tensors(seed, layers=2), shards=2)
    return tmp_path


def planned(text: str, folder: Path, shard_limit_bytes: int = 3000) -> tuple[plan.Plan, dict[ModelRef, Path]]:
    parsed = recipe.parse(text)
    folders = {ref: folder / ref.path for ref in parsed.repos}
    opened = {ref: checkpoint.open_checkpoint(checkpoint.LocalFiles(path)) for ref, path in folders.items()}
    return planner.make(parsed, opened, shard_limit_bytes=shard_limit_bytes), folders


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def test_a_staged_merge_gives_the_bytes_of_its_documents_run_one_by_one(models: Path) -> None:
    made, folders = planned(STAGED, models)
    seen: list[tuple[int, int, str]] = []
    merged = stages.merge(made, folders, models / "out", options=MergeOptions(progress=lambda *what: seen.append(what)))
    for text, name in zip(STAGED.split("---\n"), ("one", "two", "result"), strict=True):
        merge(text, models, models / name, shard_limit_bytes=3000)
    together, apart = load(models / "out"), load(models / "result")
    assert together.keys() == apart.keys()
    assert all(torch.equal(tensor, apart[name]) for name, tensor in together.items())
    assert not (models / "out.stages").exists()
    total = sum(part.bytes_out for part in made.parts)
    assert seen[-1][:2] == (total, total)
    assert [done for done, *_ in seen] == sorted(done for done, *_ in seen)
    assert merged.manifest_id == digests(models / "out")["manifest.json"]
    written = (models / "out" / "mergekit_config.yml").read_text()
    assert recipe.parse(written) == recipe.parse(STAGED)
    facts = json.loads((models / "out" / "merge_provenance.json").read_text())
    assert [stage["name"] for stage in facts["stages"]] == ["one", "two"]
    assert [stage["plan_digest"] for stage in facts["stages"]] == [part.digest for _, part in made.stages]


def test_the_whole_plan_is_known_before_a_stage_has_run(models: Path) -> None:
    made, _ = planned(STAGED, models)
    shown = json.loads(json.dumps(summary.summary(made)))
    assert [stage["name"] for stage in shown["stages"]] == ["one", "two"]
    assert [source["model"] for source in shown["sources"]] == ["a", "b", "c"]
    assert shown["disk_bytes"] > 3 * shown["bytes_out"]
    assert [str(operand.model) for operand in made.steps[0].work.operands] == ["one", "two", "a"]
    again, _ = planned(STAGED.replace("0.25", "0.75"), models)
    assert again.digest != made.digest


def test_what_cannot_work_in_a_later_document_is_refused_before_the_first_runs(models: Path) -> None:
    text = STAGED.split("---\n")[0] + (
        "---\nmerge_method: passthrough\nslices: [{sources: [{model: one, layer_range: [1, 3]}]}]"
    )
    with pytest.raises(Refused) as caught:
        planned(text, models)
    assert caught.value.code == "VALUE_OUT_OF_RANGE"
    assert "one has 2 layers" in caught.value.message


def test_an_existing_output_is_refused_before_a_stage_runs(models: Path) -> None:
    made, folders = planned(STAGED, models)
    (models / "out").mkdir()
    with pytest.raises(Refused) as caught:
        stages.merge(made, folders, models / "out", scratch=models / "scratch")
    assert caught.value.code == "OUTPUT_EXISTS"
    assert not (models / "scratch").exists()


def test_an_intermediate_made_from_replaced_weights_is_not_built_on(models: Path) -> None:
    made, folders = planned(STAGED, models)

    class Interrupted(Exception):
        pass

    def stop(done: int, total: int, name: str) -> None:
        if name.startswith("two"):
            raise Interrupted

    with pytest.raises(Interrupted):
        stages.merge(made, folders, models / "out", options=MergeOptions(progress=stop))
    save(models / "b", llama_tensors(7, layers=2), shards=2)
    with pytest.raises(Refused) as caught:
        stages.merge(made, folders, models / "out")
    assert caught.value.code == "SOURCE_CHANGED_OR_GONE" and "out.stages" in caught.value.next_step


def test_two_merges_cannot_share_the_folder_of_their_stages(models: Path) -> None:
    made, folders = planned(STAGED, models)
    codes: list[str] = []

    def second(done: int, total: int, name: str) -> None:
        if not codes:
            with pytest.raises(Refused) as caught:
                stages.merge(made, folders, models / "other", scratch=models / "scratch")
            codes.append(caught.value.code)

    stages.merge(made, folders, models / "out", scratch=models / "scratch", options=MergeOptions(progress=second))
    assert codes == ["OUTPUT_EXISTS"]
    assert not (models / "scratch").exists()


def merged(folder: Path, out: Path, kill_at: int = 0) -> int:
    """Merge STAGED and count the steps told of; at the step `kill_at` the process dies as by kill -9."""
    made, folders = planned(STAGED, folder)
    seen = 0

    def progress(done: int, total: int, name: str) -> None:
        nonlocal seen
        seen += 1
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    stages.merge(made, folders, out, MergeOptions(progress=progress, sync_bytes=600))
    return seen


@pytest.mark.slow
def test_killed_inside_or_between_stages_it_continues_and_ends_with_the_same_bytes(models: Path) -> None:
    """Kill points: in the first stage, at its last tensor, at the start of the second, in the second, in the last."""
    each = merged(models, models / "whole") // 3
    out = models / "killed"
    for point in (3, each, 2, each + each // 2, 4):
        assert forked.status(partial(merged, models, out, point)) == -signal.SIGKILL
        assert not out.exists()
    assert merged(models, out) <= 2 * each, "the first stage is not merged again"
    assert digests(out) == digests(models / "whole")
    assert not (models / "killed.stages").exists()
