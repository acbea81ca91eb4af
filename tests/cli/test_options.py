"""The command line to people who come from mergekit, who put options in another place, or mistake a path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bot import __version__
from bot.cli import main, options
from bot.cli.main import app
from bot.cli.options import bytes_of
from bot.errors import MergebotError, Refused, Transient
from bot.settings import LIVE_HUB, Settings
from tests.merge.tiny_checkpoints import llama_tensors, load, save

REPO = Path(__file__).resolve().parents[2]
LINEAR = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two models and a recipe, in the working directory."""
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    for seed, name in enumerate("ab"):
        save(tmp_path / name, llama_tensors(seed))
    (tmp_path / "recipe.yml").write_text(LINEAR)
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments], catch_exceptions=False)


def said(done: Any) -> str:
    """The words of an error, without the frame around them."""
    return " ".join(str(done.output).replace("│", " ").split())


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bot.cli.main", "--home", "home", *arguments],
        capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(REPO)),
    )  # fmt: skip


@pytest.mark.parametrize("flag", sorted(options._OF_MERGEKIT))
def test_every_flag_of_mergekit_is_answered_with_what_to_do(flag: str, folder: Path) -> None:
    done = run("merge", "recipe.yml", "out", flag)
    assert done.exit_code == 2
    assert f"{flag} is a flag of mergekit. " in said(done)
    assert "Write --" in said(done) or "Leave it out" in said(done)
    assert not (folder / "out").exists()


def test_advice_names_only_flags_that_the_verb_has(folder: Path) -> None:
    assert "Write --device cuda." in said(run("merge", "recipe.yml", "out", "--cuda"))
    assert "Leave it out: `mergebot bakllama`" in said(run("bakllama", "c.yml", "out", "--cuda"))
    assert "Write --seed NUMBER." in said(run("plan", "recipe.yml", "--random-seed=3"))
    assert "Leave it out." in said(run("merge", "recipe.yml", "out", "--no-lazy-unpickle"))
    assert "No such option" in said(run("merge", "recipe.yml", "out", "--nonsense"))
    own = {flag for each in app.registered_commands for flag in _flags_of(each.name or each.callback.__name__)}  # type: ignore[union-attr]
    advised = {word for text in options._OF_MERGEKIT.values() for word in text.split() if word.startswith("--")}
    assert {word.strip(".,;:") for word in advised} <= own | {"--home"}


def _flags_of(verb: str) -> set[str]:
    return {word for word in str(run(verb, "--help").output).split() if word.startswith("--")}


def test_options_of_all_verbs_may_stand_behind_the_verb(folder: Path) -> None:
    assert (
        run("merge", "recipe.yml", "out", "--device", "cpu", "--home", "there", "--hub=http://127.0.0.1:9").exit_code
        == 0
    )
    assert os.environ["MERGEBOT_HUB"] == "http://127.0.0.1:9" and os.environ["MERGEBOT_HOME"] == str(folder / "there")
    assert options._common_first(["merge", "x", "--", "--hub", "y"]) == ["merge", "x", "--", "--hub", "y"]
    assert options._common_first(["hub", "--dir", "d", "--home", "h"]) == ["--home", "h", "hub", "--dir", "d"]


def test_the_hub_of_other_clients_is_ours_unless_another_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MERGEBOT_HUB", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert Settings().hub == LIVE_HUB
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:8765/")
    assert Settings().hub == "http://127.0.0.1:8765"
    monkeypatch.setenv("MERGEBOT_HUB", "http://127.0.0.1:9")
    assert Settings().hub == "http://127.0.0.1:9"
    assert Settings(hub="http://127.0.0.1:10").hub == "http://127.0.0.1:10"


def test_shards_are_as_small_and_threads_as_many_as_asked_for(folder: Path) -> None:
    whole = run("merge", "recipe.yml", "whole", "--device", "cpu")
    parts = run("merge", "recipe.yml", "parts", "--device", "cpu", "--shard-size", "3kB", "--threads", "3")
    assert whole.exit_code == parts.exit_code == 0
    shards = sorted((folder / "parts").glob("model-*.safetensors"))
    assert len(shards) > 1 and (folder / "parts/model.safetensors.index.json").exists()
    told = json.loads(run("plan", "recipe.yml", "--shard-size", "3kB", "--json").output)
    assert len(told["shards"]) == len(shards)
    one, other = load(folder / "whole"), load(folder / "parts")
    assert all(one[name].equal(other[name]) for name in one) and one.keys() == other.keys()


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("1.5 GiB", 3 * 2**29)])
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["5B", "5", "", "GB", "-1GB", "0GB", "1e9GB", "٣GB", "999999999TiB"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(Refused) as caught:
        bytes_of(text)
    assert "5GB" in caught.value.next_step


def test_a_folder_without_a_model_is_named(folder: Path) -> None:
    (folder / "c").mkdir()
    (folder / "recipe.yml").write_text(LINEAR.replace("model: b", "model: c"))
    for code, words in (("SOURCE_NOT_FOUND", "c holds no files."), ("BAD_CHECKPOINT", "c has no config.json.")):
        with pytest.raises(MergebotError) as caught:
            run("plan", "recipe.yml")
        assert (caught.value.code, caught.value.message) == (code, words)
        assert "holds config.json" in caught.value.next_step
        (folder / "c" / "notes.txt").write_text("")


def test_without_a_gpu_the_advice_fits_the_verb(folder: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(Refused) as caught:
        run("classic", "out", "--merge", "a", "--merge", "b", "--method", "slerp", "--weight", "0.5", "--cuda")
    assert caught.value.code == "DEVICE_UNAVAILABLE" and "leave out --cuda" in caught.value.next_step


def test_nobody_is_told_that_a_command_repeats_itself() -> None:
    away = Transient("HUB_UNAVAILABLE", "The Hub answered 502 about a/b.", "It is tried again automatically.")
    assert main._sentence(away) == (
        "The Hub answered 502 about a/b. Run the same command again later. [HUB_UNAVAILABLE]"
    )


def test_an_error_is_one_line_and_nothing_else(folder: Path) -> None:
    (folder / "recipe.yml").write_text(LINEAR.replace("model: b", "model: nowhere/at all"))
    done = command("merge", "recipe.yml", "out")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "nowhere/at all" in done.stderr


def test_a_flag_or_command_is_suggested_only_where_few_letters_differ(folder: Path) -> None:
    merge = ("merge", "recipe.yml", "out")
    for given, suggested in {"--seeds": "--seed", "--shard": "--shard-size", "--thread": "--threads"}.items():
        assert f"(Possible options: {suggested})" in said(run(*merge, given, "3"))
    assert said(run(*merge, "--sharding", "3")).endswith("No such option: --sharding ╰" + "─" * 78 + "╯")
    assert "No such command 'mergee'. Did you mean 'merge'?" in said(run("mergee", "recipe.yml"))
    assert "Did you mean" not in said(run("exports", "recipe.yml"))


def test_the_version_needs_no_command() -> None:
    done = run("--version")
    assert (done.exit_code, done.output) == (0, f"mergebot {__version__}\n")
