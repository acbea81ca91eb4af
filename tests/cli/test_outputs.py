"""The folder that `mergebot merge` fills: made once, said to be done the second time, replaced only when asked to."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bot.cli.main import app
from bot.errors import MergebotError
from bot.stages import output_folder
from tests import forked
from tests.merge.tiny_checkpoints import llama_tensors, load, save

LINEAR = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: %s}}]\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two models and a recipe, in the working directory."""
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    for seed, name in enumerate("ab"):
        save(tmp_path / name, llama_tensors(seed))
    (tmp_path / "recipe.yml").write_text(LINEAR % 1)
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["--home", "home", *arguments], catch_exceptions=False)


def merge(*flags: str, out: str = "out") -> Any:
    return run("merge", "recipe.yml", out, "--device", "cpu", *flags)


def refused(code: str, *flags: str, out: str = "out") -> str:
    with pytest.raises(MergebotError) as caught:
        merge(*flags, out=out)
    assert caught.value.code == code
    return str(caught.value)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_merge_again_is_done_already(folder: Path) -> None:
    assert merge().exit_code == 0
    (folder / "out" / "model.safetensors").touch()
    first = {path.name: path.stat().st_mtime_ns for path in (folder / "out").iterdir()}
    again = merge()
    assert again.exit_code == 0 and "Already done" in again.output
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "out").iterdir()} == first


def test_another_merge_there_is_refused_and_so_is_one_that_lost_a_byte(folder: Path) -> None:
    merge()
    (folder / "recipe.yml").write_text(LINEAR % 2)
    assert "holds another merge" in refused("OUTPUT_EXISTS")
    assert "--overwrite" in refused("OUTPUT_EXISTS")
    (folder / "recipe.yml").write_text(LINEAR % 1)
    shard = folder / "out" / "model.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    refused("OUTPUT_EXISTS")


def test_new_weights_of_the_same_shapes_are_not_taken_for_the_old_ones(folder: Path) -> None:
    merge()
    save(folder / "b", llama_tensors(7))
    assert "b/model.safetensors was changed" in refused("OUTPUT_EXISTS")
    assert merge("--overwrite").exit_code == 0
    assert "Already done" in merge().output
    name = "model.norm.weight"
    assert torch.allclose(
        load(folder / "out")[name], (llama_tensors(0)[name] + llama_tensors(7)[name]) / 2, atol=1e-6
    )  # fmt: skip


def test_an_empty_folder_is_filled_and_a_link_to_one_followed(folder: Path) -> None:
    (folder / "out").mkdir()
    assert merge().exit_code == 0
    (folder / "disk").mkdir()
    (folder / "link").symlink_to(folder / "disk")
    assert merge(out="link").exit_code == 0
    assert (folder / "link").is_symlink() and bytes_of(folder / "disk") == bytes_of(folder / "out")


def test_overwrite_replaces_an_output_and_leaves_nothing_beside_it(folder: Path) -> None:
    merge()
    (folder / "recipe.yml").write_text(LINEAR % 2)
    assert merge("--overwrite").exit_code == 0
    merge(out="fresh")
    assert bytes_of(folder / "out") == bytes_of(folder / "fresh")
    assert sorted(path.name for path in folder.glob("out*")) == ["out"]


@pytest.mark.parametrize("strange", ["card.md", "notes/diary.txt"])
def test_overwrite_never_touches_a_folder_with_other_files(strange: str, folder: Path) -> None:
    merge()
    path = folder / "out" / strange
    path.parent.mkdir(exist_ok=True)
    path.write_text("precious")
    before = sorted((folder / "out").rglob("*"))
    assert strange.partition("/")[0] in refused("OUTPUT_EXISTS", "--overwrite")
    assert sorted((folder / "out").rglob("*")) == before
    assert "a/" not in refused("OUTPUT_EXISTS", "--overwrite", out="a") and (folder / "a/config.json").exists()


def test_an_output_is_not_replaced_by_a_merge_of_itself(folder: Path) -> None:
    merge()
    (folder / "recipe.yml").write_text((LINEAR % 1).replace("model: a", "model: out"))
    assert "is a source" in refused("OUTPUT_EXISTS", "--overwrite")


def die(moment: str, call: str, number: int) -> None:
    """Have this process killed as by kill -9 when it makes, or has made, its `number`-th such call to the system."""
    made = 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal made
        if event == {"before": "c_call", "after": "c_return"}[moment] and argument.__name__ == call:
            made += 1
            if made == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profile)


def overwrite_and_die(moment: str, call: str, number: int) -> None:
    die(moment, call, number)
    merge("--overwrite")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "call", "number"),
    [
        ("before", "rename", 1),  # before the new one is whole
        ("after", "rename", 1),
        ("after", "rename", 2),  # between the two renames
        ("after", "rename", 3),
        ("before", "rmdir", 3),  # while the old one is removed
    ],
)
def test_killed_while_it_overwrites_the_old_or_the_new_one_is_there(
    moment: str, call: str, number: int, folder: Path
) -> None:
    merge()
    old = bytes_of(folder / "out")
    (folder / "recipe.yml").write_text(LINEAR % 2)
    merge(out="fresh")
    new = bytes_of(folder / "fresh")
    assert forked.status(partial(overwrite_and_die, moment, call, number)) == -signal.SIGKILL
    there = [bytes_of(each) for each in (folder / "out", folder / "out.replaced") if each.is_dir()]
    assert old in there or new in there
    output_folder.settle(Path("out"))
    assert bytes_of(folder / "out") in (old, new)
    assert merge("--overwrite").exit_code == 0
    assert bytes_of(folder / "out") == new
    assert sorted(path.name for path in folder.glob("out*")) == ["out"]


def test_a_user_may_edit_and_remove_what_a_merge_wrote(folder: Path) -> None:
    before = os.umask(0o027)
    try:
        merge()
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (folder / "out").iterdir()} == {0o640}


def test_a_folder_that_cannot_be_made_is_said_so_before_anything_is_read(folder: Path) -> None:
    (folder / "file").write_text("")
    for out in ("/proc/merged", "file/merged"):
        assert out in refused("OUTPUT_UNWRITABLE", out=out)
    assert "exists already" in refused("OUTPUT_EXISTS", out="file")
    assert "exists already" in refused("OUTPUT_EXISTS", out=".")
    (folder / "empty").mkdir()
    os.chdir("empty")
    (folder / "empty2.yml").write_text((LINEAR % 1).replace("model: ", "model: ../"))
    with pytest.raises(MergebotError) as caught:
        CliRunner().invoke(app, ["--home", "../home", "merge", "../empty2.yml", "."], catch_exceptions=False)
    assert "the current folder" in str(caught.value)


def test_stages_that_a_kill_left_are_removed_when_the_merge_is_found_done(folder: Path) -> None:
    (folder / "recipe.yml").write_text(
        "name: half\n" + LINEAR % 1 + "---\n" + (LINEAR % 1).replace("model: a", "model: half")
    )
    merge()
    made = json.loads((folder / "out/merge_provenance.json").read_text())["stages"][0]["plan_digest"]
    left = folder / "out.stages" / f"{made[:32]}-cpu-torch-{torch.__version__}.partial"
    left.mkdir(parents=True)
    assert "Already done" in merge().output
    assert not (folder / "out.stages").exists()
