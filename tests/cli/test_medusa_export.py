"""`mergebot medusa export` as it is typed: heads in the layout of others, notes for their user, refusals that help."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bot.cli.main import app
from bot.errors import EvaluationError
from evaluators.medusa import formats
from evaluators.medusa.drafting.heads import Heads, HeadSpec
from evaluators.medusa.model import causal_lm
from tests import family


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    family.make(tmp_path)
    base = causal_lm.load(tmp_path / "base")
    for name, spec in (("plain", HeadSpec("shared", 2)), ("conditioned", HeadSpec("shared", 2, conditioned=True))):
        heads = Heads(spec, base)
        torch.nn.init.normal_(heads.first)
        formats.save(heads, tmp_path / name)
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


def export(*arguments: str) -> Any:
    asked = ["--home", "home", "medusa", "export", *arguments, "--model", "base"]
    return CliRunner().invoke(app, asked, catch_exceptions=False)


@pytest.mark.slow
def test_heads_go_out_to_every_program_and_come_back(place: Path) -> None:
    for layout in ("v1", "v2", "tgi", "vllm"):
        done = export("plain", layout, "--format", layout)
        assert done.exit_code == 0 and f"The {layout} heads are in {layout}" in done.output
        assert ("vLLM reads Medusa heads up to release 0.32" in " ".join(done.output.split())) == (layout == "vllm")
        assert export(layout, f"{layout}-back", "--format", "ours").exit_code == 0
        assert (place / f"{layout}-back" / formats.WEIGHTS).read_bytes() == (
            place / "plain" / formats.WEIGHTS
        ).read_bytes()
    told = json.loads((place / "tgi" / "config.json").read_text())
    assert told["base_model_name_or_path"] == "base" and "architectures" not in told
    assert "--speculate" in " ".join(export("plain", "again", "--format", "tgi").output.split())


@pytest.mark.slow
def test_what_cannot_be_exported_is_refused_in_a_sentence(place: Path) -> None:
    for arguments, says in (
        (("conditioned", "out", "--format", "vllm"), "which vllm does not support. Train heads with --no-conditioned"),
        (("base", "out", "--format", "v1"), "base is a model without heads"),
    ):
        with pytest.raises(EvaluationError) as caught:
            export(*arguments)
        assert says in str(caught.value)
    assert not (place / "out").exists()
