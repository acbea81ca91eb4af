"""Pickled weights are read for the operator alone, by a process that runs nothing they ask for."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import llama_tensors, load, save
from typer.testing import CliRunner

from bot.cli.main import app
from bot.errors import MergebotError, Refused
from bot.merge.checkpoints import checkpoint, lora
from bot.merge.checkpoints.pickled import pickles

RECIPE = "merge_method: passthrough\nmodels: [{model: a}]\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose weights are pickled, in the working directory."""
    monkeypatch.chdir(tmp_path)
    made = save(tmp_path / "a", llama_tensors(0))
    (made / "model.safetensors").unlink()
    (tmp_path / "recipe.yml").write_text(RECIPE)
    return made


def run(*flags: str) -> Any:
    return CliRunner().invoke(app, ["--home", "home", "merge", "recipe.yml", "out", *flags], catch_exceptions=False)


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [True, False])
def test_the_operator_may_merge_pickled_weights(zipped: bool, folder: Path) -> None:
    tensors = llama_tensors(0)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.contiguous().T.bfloat16()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert run("--allow-pickle").exit_code == 0
    result = load(Path("out"))
    assert all(
        torch.equal(result[name], tensors[name]) and result[name].dtype == tensors[name].dtype for name in tensors
    )
    kept = next(Path("home/cache/unpickled").iterdir())
    before = kept.stat().st_mtime_ns
    Path("out").rename("first")
    assert run("--allow-pickle").exit_code == 0
    assert kept.stat().st_mtime_ns == before


@pytest.mark.slow
def test_pickled_shards_keep_their_index(folder: Path) -> None:
    tensors = llama_tensors(0)
    names = list(tensors)
    weight_map = {}
    for i in range(2):
        file = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in names[i::2]}, folder / file)
        weight_map.update(dict.fromkeys(names[i::2], file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert run("--allow-pickle").exit_code == 0
    result = load(Path("out"))
    assert all(torch.equal(result[name], tensors[name]) for name in tensors)


def test_without_the_flag_pickled_weights_are_refused(folder: Path) -> None:
    torch.save(llama_tensors(0), folder / "pytorch_model.bin")
    with pytest.raises(Refused) as caught:
        run()
    assert caught.value.code == "SOURCE_NOT_SAFETENSORS"
    assert "pytorch_model.bin" in caught.value.message
    with pytest.raises(Refused):
        lora.open_source(checkpoint.LocalFiles(folder), limits=checkpoint.UNTRUSTED)


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def hostile(path: Path, canary: Path, kind: str) -> None:
    loaded: Any = {"model.norm.weight": torch.ones(8), "x": Payload(canary)}
    if kind == "zip":
        torch.save(loaded, path)
    elif kind == "old format":
        torch.save(loaded, path, _use_new_zipfile_serialization=False)
    elif kind == "bare pickle":
        path.write_bytes(pickle.dumps({"x": Payload(canary)}))
    else:  # a zip whose pickle was put there by hand
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Payload(canary)))
            archive.writestr("archive/version", "3")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zip", "old format", "bare pickle", "forged zip"])
def test_a_payload_in_a_pickle_never_runs(kind: str, folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    hostile(folder / "pytorch_model.bin", canary, kind)
    with pytest.raises(MergebotError) as caught:
        run("--allow-pickle")
    assert caught.value.code == "BAD_CHECKPOINT"
    assert "pytorch_model.bin" in caught.value.message
    assert not canary.exists()
    if kind == "bare pickle":  # the payload is a real one
        pickle.loads((folder / "pytorch_model.bin").read_bytes())
        assert canary.exists()
    assert not Path("out").exists()
    assert not any(Path("home/cache/unpickled").iterdir())


@pytest.mark.slow
def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(folder: Path) -> None:
    torch.save({"model.norm.weight": torch.ones(1).expand(10**11)}, folder / "pytorch_model.bin")
    with pytest.raises(MergebotError) as caught:
        run("--allow-pickle")
    assert caught.value.code == "BAD_CHECKPOINT"


def test_only_weights_count_as_pickled_weights() -> None:
    names = ["optimizer.pt", "training_args.bin", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "model.pt"]
    names += ["adapter_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"]
    assert pickles(dict.fromkeys(names, 1)) == sorted(names[4:])


def test_unknown_keys_can_be_ignored_and_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a", llama_tensors(0))
    (tmp_path / "recipe.yml").write_text(RECIPE + "wibble: 3\n")
    with pytest.raises(Refused) as caught:
        run()
    assert caught.value.code == "UNKNOWN_KEY"
    assert run("--unknown-keys", "ignore").exit_code == 0
    notices = json.loads(Path("out/merge_provenance.json").read_text())["notices"]
    assert "UNKNOWN_KEY" in {notice["code"] for notice in notices}
    with pytest.raises(Refused):
        run("--unknown-keys", "perhaps")
