"""What an interrupted merge leaves behind: continued, cleared away or left alone, and never taken for another's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from tiny_checkpoints import llama_tensors, merge, plan_of, save

from bot.errors import Refused
from bot.merge.execution.partial import held_bytes

LINEAR = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: %s}}]\n"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, name in enumerate("ab"):
        save(tmp_path / name, llama_tensors(seed, layers=3))
    return tmp_path


class Stop(Exception):
    pass


def stop_half_way(done: int, total: int, name: str) -> None:
    if done * 2 > total:
        raise Stop


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_a_byte_flipped_in_a_finished_tensor_of_a_partial_output_is_found_when_it_is_continued(models: Path) -> None:
    with pytest.raises(Stop):
        merge(LINEAR % 1, models, models / "out", progress=stop_half_way, sync_bytes=1, threads=1)
    planned, _ = plan_of(LINEAR % 1, models)
    journal = (models / "out.partial" / "journal").read_bytes().splitlines()[1:]
    step = planned.steps[json.loads(journal[0].rpartition(b" ")[0])["step"]]
    with (models / "out.partial" / "model.safetensors").open("r+b") as shard:
        shard.seek(step.offset + 5)
        byte = shard.read(1)
        shard.seek(step.offset + 5)
        shard.write(bytes([byte[0] ^ 4]))
    merge(LINEAR % 1, models, models / "out")
    merge(LINEAR % 1, models, models / "undisturbed")
    assert hashes(models / "out") == hashes(models / "undisturbed")


def test_a_whole_output_without_its_last_rename_is_made_anew_and_nothing_of_another_merge_is_kept(models: Path) -> None:
    (models / "a" / "generation_config.json").write_text("{}")
    merge(LINEAR % 1, models, models / "first", shard_limit_bytes=3000)
    (models / "a" / "generation_config.json").unlink()
    (models / "first").rename(models / "out.partial")  # as it lies after the journal is dropped
    merge(LINEAR % 2, models, models / "out")
    merge(LINEAR % 2, models, models / "whole")
    assert hashes(models / "out") == hashes(models / "whole")
    assert not (models / "out" / "generation_config.json").exists()
    assert not (models / "out.partial").exists()


def test_a_folder_of_that_name_with_files_of_somebody_else_is_left_alone(models: Path) -> None:
    (models / "out.partial").mkdir()
    (models / "out.partial" / "diary.txt").write_text("precious")
    with pytest.raises(Refused) as caught:
        merge(LINEAR % 1, models, models / "out")
    assert caught.value.code == "OUTPUT_EXISTS"
    assert "diary.txt" in caught.value.message
    assert [path.name for path in (models / "out.partial").iterdir()] == ["diary.txt"]


def test_what_the_partial_output_holds_counts_as_space_it_has(models: Path) -> None:
    assert held_bytes(models / "nowhere") == 0
    with pytest.raises(Stop):
        merge(LINEAR % 1, models, models / "out", progress=stop_half_way)
    planned, _ = plan_of(LINEAR % 1, models)
    assert held_bytes(models / "out.partial") >= planned.shards[0].nbytes
