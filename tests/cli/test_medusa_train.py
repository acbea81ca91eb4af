"""`mergebot medusa train` as it is typed: heads that load, sentences that tell what happened, refusals that help."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bot.cli.main import app
from bot.errors import Refused
from bot.stages import head_training
from evaluators.medusa import formats
from evaluators.medusa.drafting.heads import HeadSpec, identity_heads
from evaluators.medusa.model import causal_lm
from tests import family

REPO = Path(__file__).resolve().parents[2]

FIXED = ("--heads", "2", "--vocab", "64", "--answers", "4", "--steps", "3", "--device", "cpu")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    family.make(tmp_path)
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["--home", "home", *arguments], catch_exceptions=False)


def train(*arguments: str) -> Any:
    return run("medusa", "train", *arguments)


def heeds_ctrl_c() -> None:
    """A shell starts what runs in the background deaf to it, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


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
    assert "So few steps" in said and "hardly trained" in said
    for command in (
        "classic out-model --merge base+out/adapter --weight 1 --method linear --no-bf16",
        "medusa generate out-model 'Describe a lighthouse.' --heads out",
        "medusa bench out-model --heads out",
        "medusa export out out-vllm --model out-model --format vllm",
    ):
        assert f"mergebot {command}" in said
    with pytest.raises(Refused, match="holds Medusa heads already"):
        train("base", "out", *FIXED)
    merged = ("--merge", "base+out/adapter", "--weight", "1", "--method", "linear", "--no-bf16")
    assert run("classic", "out-model", *merged).exit_code == 0
    assert run("medusa", "export", "out", "out-vllm", "--model", "out-model", "--format", "vllm").exit_code == 0


def test_conditioned_heads_are_said_to_be_for_mergebot_alone() -> None:
    held_out = {"best": None, "answers": 0, "nodes": 8, "untrained": None}
    facts = {
        "steps": 900, "tokens": 9000, "positions": 9000, "prompts": 9, "seconds": {"total": 9.0}, "generate_s": 1.0,
        "held_out": held_out, "dropped_prompts": [], "shortened_prompts": 2, "heads": {"formats": ["ours"]},
    }  # fmt: skip
    said = head_training.told(facts, "a model", Path("out"))
    assert "  mergebot medusa generate 'a model' 'Describe a lighthouse.' --heads out" in said
    assert any(each.startswith("2 prompts leave too little of the model's context") for each in said)
    assert said[-1].endswith("train with --no-conditioned.") and not any("hardly" in each for each in said)


WRONG = (
    ("train", ("base", "out", "--vocab", "most"), "neither `full` nor"),
    ("train", ("base", "out", "--kind", "both"), "--kind 'both' is not supported. Write shared or own."),
    ("train", ("base", "out", "--dtype", "int4"), "--dtype 'int4' is not supported"),
    ("train", ("base", "out", "--device", "tpu"), "'tpu' is not a device"),
    ("train", ("base", "base"), "base is not empty"),
    ("train", ("base", "base/config.json"), "config.json is a file"),
    ("train", ("base", "out", "--prompts", "base/README.md"), "README.md line 1 is not JSON"),
    ("train", ("base", "out", "--test", "none.jsonl"), "no prompt file none.jsonl"),
    ("train", ("empty", "out"), "empty holds no config.json"),
    ("bench", ("base", "--tree", "none.py"), "no tree file none.py"),
    ("bench", ("base", "--heads", "nowhere"), "no folder nowhere"),
    ("generate", ("base", "one", "--sample", "beam"), "Write greedy, exact or typical."),
    ("generate", ("base", "one", "--heads", "nowhere"), "no folder nowhere"),
    ("export", ("base", "out", "--model", "base", "--format", "gguf"), "--format 'gguf' is not supported"),
    ("export", ("base", "out", "--model", "base", "--format", "v2", "--dtype", "int4"), "'int4' is not supported"),
    ("export", ("base", "base", "--model", "base", "--format", "v2"), "base is not empty"),
)


@pytest.mark.slow
def test_what_is_wrong_is_refused_before_torch_is_imported(place: Path) -> None:
    (place / "empty").mkdir()
    code = (
        "import sys, json\nfrom typer.testing import CliRunner\nfrom bot.cli.main import app\n"
        "for verb, words, _ in json.loads(sys.argv[1]):\n"
        "    found = CliRunner().invoke(app, ['--home', 'home', 'medusa', verb, *words]).exception\n"
        "    print(str(found).replace('\\n', ' '))\n"
        "print('torch' in sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    said = subprocess.run(
        [sys.executable, "-c", code, json.dumps(WRONG)], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for line, (verb, words, says) in zip(said[:-1], WRONG, strict=True):
        assert says in line, (verb, words)
    assert said[-1] == "False"
    assert set(head_training.LAYOUTS) == set(formats.FORMATS)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", "bench"])
def test_ctrl_c_is_answered_with_what_is_kept_and_how_to_go_on(verb: str, place: Path) -> None:
    """The signal comes once there is work of the verb's own on the disk."""
    base = causal_lm.load(place / "left")
    formats.save(identity_heads(HeadSpec("shared", 2), base), place / "own")
    (place / "left" / "mergekit_config.yml").write_text(
        "merge_method: linear\nmodels: [{model: right, parameters: {weight: 1.0}}]\n"
    )
    words, made, kept = {
        "train": (("base", "out", "--budget-s", "600"), "out/unfinished/state.json", "so far are kept. Run the same"),
        "bench": (("left", "--out", "out", "--parent", "right=own"), "out/merged_heads", "is not kept. Run the"),
    }[verb]
    command = [sys.executable, "-m", "bot.cli.main", "--home", "home", "medusa", verb, *words, "--device", "cpu"]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(REPO)}, stderr=subprocess.PIPE, text=True,
        preexec_fn=heeds_ctrl_c,
    ) as process:  # fmt: skip
        while not (place / made).exists() and process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and kept in said and said.strip().endswith("[CANCELLED]")
