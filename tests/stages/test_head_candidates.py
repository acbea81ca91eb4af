"""Parents' heads on their merge: by hand at the command line, and by the bot where parents' repos carry some."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from bot.cli.main import app
from bot.errors import Failed, Refused
from bot.hub import Hub
from bot.jobs.job import Source
from bot.localhub import seed
from bot.settings import Settings
from bot.stages import head_candidates, speed_test
from bot.stages.merged_heads import WEIGHTS
from evaluators.medusa import formats
from evaluators.medusa.drafting.heads import Heads, HeadSpec
from evaluators.medusa.model import causal_lm
from tests import family
from tests.localhub.server import running_hub

pytestmark = pytest.mark.slow
LINEAR = """merge_method: linear
models:
- {model: left, parameters: {weight: 0.5}}
- {model: right, parameters: {weight: 0.5}}
dtype: float32
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A family whose children carry heads, their merge, and two questions, in the working directory."""
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    for number, (name, folder) in enumerate(family.make(tmp_path).items()):
        if name != "base":
            draw(folder, folder / head_candidates.CARRIED, number)
    (tmp_path / "recipe.yml").write_text(LINEAR)
    asked = [{"question_id": n, "category": "x", "turns": [f"Say {n}.", "And then?"]} for n in range(3)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    assert run("merge", "recipe.yml", "merged", "--device", "cpu").exit_code == 0
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


def draw(model: Path, out: Path, number: int) -> None:
    """Random heads for a model."""
    base = causal_lm.load(model)
    made = Heads(HeadSpec("shared", 2), base)
    torch.manual_seed(number)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    formats.save(made, out)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["--home", "home", *arguments], catch_exceptions=False)


def bench(*arguments: str) -> Any:
    flags = ("--prompts", "questions.jsonl", "--questions", "2", "--new-tokens", "16", "--budget-s", "12")
    return run("medusa", "bench", *arguments, *flags, "--device", "cpu")


def test_the_command_compares_parents_heads_merged_heads_and_fresh_ones(place: Path) -> None:
    done = bench(
        "merged", "--parent", "left=left", "--parent", "right=right/medusa", "--turns", "2", "--out", "report.json"
    )
    assert done.exit_code == 0
    report = json.loads((place / "report.json").read_text())
    rows = {row["id"]: row for row in report["candidates"]}
    assert {"none", "native", "identity", "parent:left", "parent:right", "merged", "merged_tuned", "fresh"} <= set(rows)
    assert all(rows[name]["absent_because"] is None for name in ("parent:left", "parent:right", "merged", "fresh"))
    assert report["suite"]["turns"] == 2
    places = (place / "left" / "medusa", place / "right" / "medusa", place / "report" / "merged_heads")
    left, right, both = (load_file(folder / WEIGHTS) for folder in places)
    for name in left:
        torch.testing.assert_close(both[name], (left[name] + right[name]) / 2)
    assert report["transfer"] in " ".join(done.output.split()) and "heads of" in done.output
    assert "parent:left" not in done.output.partition("Note:")[0], "rows have names"
    assert not (place / "report" / "decode_speed.json").exists()


def test_given_heads_are_timed_instead_of_new_ones(place: Path) -> None:
    done = bench("merged", "--heads", "left/medusa", "--out", "folder")
    assert done.exit_code == 0
    report = json.loads((place / "folder" / "decode_speed.json").read_text())
    assert [row["id"] for row in report["candidates"]][-1] == "heads:medusa"
    assert not (place / "folder" / "heads").exists()
    assert "given heads" in done.output and "heads:medusa" not in done.output and "float32 on cpu" in done.output
    done = bench("merged", "--heads", "left/medusa", "--out", "alone.json")
    assert (place / "alone.json").is_file() and not (place / "alone").exists(), "no folder for what was not made"


def test_a_given_tree_is_timed_as_it_is_and_one_deeper_than_the_heads_is_refused(place: Path) -> None:
    (place / "choices.py").write_text("wide = [(0,), (1,), (0, 0), (0, 1), (1, 0)]\n")
    done = bench("merged", "--heads", "left/medusa", "--tree", "choices.py", "--out", "folder")
    assert done.exit_code == 0
    row = json.loads((place / "folder" / "decode_speed.json").read_text())["candidates"][-1]
    assert row["tree"] == {"nodes": 6, "depth": 2, "paths": [[0], [1], [0, 0], [0, 1], [1, 0]], "chosen": "given"}
    assert row["exact"]["equal"] == row["exact"]["prompts"] > 0
    (place / "choices.py").write_text("[[0], [0, 0], [0, 0, 0]]")
    with pytest.raises(Failed, match="3 levels deep, but there are only 2 heads"):
        bench("merged", "--heads", "left/medusa", "--tree", "choices.py", "--out", "folder")
    with pytest.raises(Failed, match=r"There is no tree file nowhere\.json"):
        bench("merged", "--heads", "left/medusa", "--tree", "nowhere.json", "--out", "folder")


def test_what_cannot_be_compared_is_said_by_name(place: Path) -> None:
    with pytest.raises(Refused, match=r"not merged from one source 'middle'"):
        bench("merged", "--parent", "middle=left")
    with pytest.raises(Refused, match="names no folder"):
        bench("merged", "--parent", "left")
    with pytest.raises(Failed, match="no folder nowhere"):
        bench("merged", "--parent", "left=nowhere")
    settings = Settings(home=place / "home")
    rows = {
        each.id: each
        for each in head_candidates.by_hand(place / "merged", (), ["left=left"], place / "out", settings, 0)
    }
    assert rows["merged"].absent_because == "The heads cannot be merged: there are no heads of right."
    rows = {
        each.id: each for each in head_candidates.by_hand(place / "base", (), ["left=left"], place / "out", settings, 0)
    }
    assert "mergekit_config.yml" in (rows["merged"].absent_because or "")


def test_the_bot_tries_the_heads_that_parents_carry(place: Path) -> None:
    content = place / "content" / "models" / "alice"
    content.mkdir(parents=True)
    for name in ("base", "left", "right"):
        (place / name).rename(content / name)
    with running_hub(place / "hub") as running:
        seed(running.root, place / "content")
        settings = Settings(home=place / "bot", hub=running.url, device="cpu")
        hub = Hub(running.url)
        pinned = {name: hub.resolve(f"alice/{name}") for name in ("base", "left", "right")}
        assert head_candidates.fetched(hub, "alice/base", pinned["base"].revision, place / "none") is None
        sources = tuple(Source(f"alice/{name}", pinned[name].revision, "mit", 0) for name in ("left", "right"))
        config = place / "merged" / head_candidates.RECIPE
        config.chmod(0o644)
        text = config.read_text()
        for source in sources:
            text = text.replace(f"model: {source.repo.partition('/')[2]}\n", f"model: {source}\n")
        config.write_text(text)
        rows = {
            each.id: each
            for each in head_candidates.of_job(place / "merged", sources, place / "scratch", settings, hub, 0)
        }
        assert list(rows) == ["parent:alice/left", "parent:alice/right", "merged"]
        fetched = rows["parent:alice/left"].folder
        assert fetched is not None and rows["merged"].absent_because is None
        assert (fetched / WEIGHTS).read_bytes() == (content / "left" / "medusa" / WEIGHTS).read_bytes()
        only = (Source("alice/base", pinned["base"].revision, "mit", 0),)
        assert head_candidates.of_job(place / "merged", only, place / "scratch", settings, hub, 0) == ()
        quick = settings.model_copy(update={"speed_budget_s": 12, "speed_questions": 2, "speed_new_tokens": 12})
        report = speed_test.of_merge(place / "merged", sources, quick, place / "scratch", lambda *_: None)
    assert "its parents' heads as they are bring" in report["sentence"]
