"""`mergebot medusa train` as it is typed: heads that load, sentences that tell what happened, refusals that help."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bot.cli import app
from bot.errors import Refused
from evaluators.medusa import formats
from evaluators.medusa.model import causal_lm
from tests import family

FIXED = ("--heads", "2", "--vocab", "64", "--answers", "4", "--steps", "3", "--device", "cpu")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    family.make(tmp_path)
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


def train(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["--home", "home", "medusa", "train", *arguments], catch_exceptions=False)


@pytest.mark.slow
def test_the_command_writes_heads_and_says_what_it_took(place: Path) -> None:
    done = train("base", "out", *FIXED, "--layers", "2", "--no-conditioned", "--joint")
    assert done.exit_code == 0
    said = " ".join(done.output.split())
    assert "3 steps over" in said and "Joint training changed the model" in said and "out/adapter" in said
    heads, _ = formats.load(place / "out", causal_lm.load(place / "base"))
    assert (heads.spec.heads, heads.spec.layers, heads.spec.conditioned) == (2, 2, False)
    assert json.loads((place / "out" / "training.json").read_text())["joint"]["changes_the_model"] is True
    assert list((place / "home" / "cache" / "medusa").glob("*.safetensors"))
    with pytest.raises(Refused, match="holds Medusa heads already"):
        train("base", "out", *FIXED)


def test_options_that_mean_nothing_are_refused(place: Path) -> None:
    for wrong, says in ((("--vocab", "most"), "neither `full` nor"), (("--kind", "both"), "no kind of heads 'both'")):
        with pytest.raises(Refused, match=says):
            train("base", "out", *FIXED, *wrong)
