"""What `mergebot plan` shows of a recipe's values, and what `mergebot verify` says of sources it cannot be sure of."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from bot.cli.main import app
from bot.errors import Refused
from tests.merge.tiny_checkpoints import HIDDEN, llama_tensors, save

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Four models and an adapter, in the working directory."""
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    for seed, name in enumerate(("base", "a", "b", "c")):
        save(tmp_path / name, llama_tensors(seed, layers=3))
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["--home", "home", *arguments], catch_exceptions=False)


def planned(text: str, *flags: str) -> str:
    Path("recipe.yml").write_text(text)
    done = run("plan", "recipe.yml", *flags)
    assert done.exit_code == 0
    return str(done.output)


def values(text: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(planned(text, "--json"))["values"]
    return told


SLERP = "merge_method: slerp\nbase_model: base\nmodels: [{model: a}]\nparameters:\n  t: %s\n"


def test_gradients_conditions_and_switches_are_shown_as_they_were_written(folder: Path) -> None:
    assert values(SLERP % "[0, 0.5, 1]") == {"t": [0, 0.5, 1]}
    assert "t: 0 → 0.5 → 1 over the layers" in planned(SLERP % "[0, 0.5, 1]")
    conditions = "[{filter: self_attn, value: [0, 1]}, {filter: mlp, value: 0.3}, {value: 0.5}]"
    assert values(SLERP % conditions)["t"] == [
        {"filter": "self_attn", "value": [0, 1]}, {"filter": "mlp", "value": 0.3}, {"value": 0.5},
    ]  # fmt: skip
    told = planned(SLERP % conditions)
    assert "t for self_attn: 0 → 1 over the layers" in told and "t for mlp: 0.3" in told and "t otherwise: 0.5" in told
    ties = "merge_method: ties\nbase_model: base\nmodels:\n- {model: a, parameters: {weight: [1, 0]}}\n- {model: b}\n"
    told = planned(ties + "parameters: {weight: 0.5, density: 0.4, normalize: true}\n")
    for line in ("normalize: true", "rescale: false", "weight of a: 1 → 0 over the layers", "weight of b: 0.5"):
        assert line in told


def test_slices_that_differ_are_shown_from_the_lowest_to_the_highest(folder: Path) -> None:
    one = "{sources: [{model: a, layer_range: [%d, %d], parameters: {scale: %s}}]}"
    text = f"merge_method: passthrough\nslices: [{one % (0, 2, 0.5)}, {one % (1, 3, 0.25)}]\n"
    assert values(text) == {"scale of a": {"lowest": 0.25, "highest": 0.5}}
    assert "scale of a: 0.25 to 0.5" in planned(text)


STAGED = """name: first
merge_method: linear
models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 3}}]
---
merge_method: slerp
base_model: base
models: [{model: first}]
parameters: {t: 0.25}
"""


def test_a_plan_shows_its_stages_and_a_tensor_in_each_of_them(folder: Path) -> None:
    assert "first: linear" in planned(STAGED)
    told = json.loads(planned(STAGED, "--tensor", f"{Q}.weight", "--json"))
    assert ({each["model"] for each in told["inputs"]}, told["does"]) == ({"first", "base"}, "slerp")
    assert [(each["stage"], each["does"]) for each in told["stages"]] == [("first", "linear")]
    assert [each["weight"] for each in told["stages"][0]["inputs"]] == [1, 3]
    shown = planned(STAGED, "--tensor", f"{Q}.weight")
    assert shown.index("first: model.layers.0") < shown.index("slerp (t 0.25)")
    sliced = STAGED.split("---\n")[0] + (
        "---\nmerge_method: passthrough\nslices: [{sources: [{model: first, layer_range: [0, 1]}]}]\n"
    )
    alone = json.loads(planned(sliced, "--tensor", "model.layers.2.mlp.up_proj.weight", "--json"))
    assert (alone["stage"], alone["does"]) == ("first", "linear")
    with pytest.raises(Refused):
        planned(STAGED, "--tensor", "model.layers.9.mlp.up_proj.weight")


def test_the_factors_of_an_adapter_stand_among_the_inputs(folder: Path) -> None:
    adapter = folder / "lora"
    adapter.mkdir()
    factors = {"lora_A": torch.ones(2, HIDDEN), "lora_B": torch.ones(HIDDEN, 2)}
    save_file(
        {f"base_model.model.{Q}.{part}.weight": t for part, t in factors.items()}, adapter / "adapter_model.safetensors"
    )
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    text = "merge_method: linear\nmodels: [{model: a+lora}, {model: b}]\nparameters: {weight: 1}\n"
    told = json.loads(planned(text, "--tensor", f"{Q}.weight", "--json"))["inputs"]
    assert "adapter" not in told[1]
    assert told[0]["adapter"]["scale"] == 2 and [each["shape"] for each in told[0]["adapter"]["tensors"]] == [
        [2, 8],
        [8, 2],
    ]
    shown = planned(text, "--tensor", f"{Q}.weight")
    assert "+ lora (scale 2)" in shown and "lora_A" in shown and "lora_B" in shown


def test_a_sentence_is_one_line_however_long_the_path(folder: Path) -> None:
    deep = "/".join(["a-folder-with-a-rather-long-name"] * 4)
    text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1, int8_mask: true}\n"
    Path("recipe.yml").write_text(text)
    lines = run("merge", "recipe.yml", deep, "--device", "cpu").output.splitlines()
    assert any(line.startswith("Merged") and f"into {deep} in" in line for line in lines)
    assert run("merge", "recipe.yml", deep).output == f"Already done: {deep} holds this merge; nothing was changed.\n"


def merged(text: str, *flags: str) -> None:
    Path("recipe.yml").write_text(text)
    assert run("merge", "recipe.yml", "out", "--device", "cpu", *flags).exit_code == 0


def test_every_source_whose_bytes_were_not_recorded_is_named_up_to_three(folder: Path) -> None:
    save(folder / "d", llama_tensors(9, layers=3))
    merged("merge_method: linear\nmodels: [{model: a}, {model: b}, {model: c}, {model: d}]\nparameters: {weight: 1}\n")
    shard = folder / "a" / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 0x40
    shard.write_bytes(content)
    with pytest.raises(Exception, match="differs from its provenance"):
        run("verify", "out", "--json")
    from bot.settings import Settings
    from bot.stages import local_runs

    verdict = local_runs.verify("out", Settings(home=folder / "home"), lambda *_: None, device="cpu")
    assert "The bytes of a, b, c and 1 more were not recorded" in verdict.remarks[-1]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--hash-sources",)])
def test_a_merge_of_pickled_weights_is_verified_with_the_flag_it_was_made_with(
    flags: tuple[str, ...], folder: Path
) -> None:
    (folder / "a" / "model.safetensors").unlink()
    torch.save(llama_tensors(1, layers=3), folder / "a" / "pytorch_model.bin")
    text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
    Path("recipe.yml").write_text(text)
    for command in (["plan", "recipe.yml"], ["merge", "recipe.yml", "out"]):
        with pytest.raises(Refused) as caught:
            run(*command)
        assert caught.value.code == "SOURCE_NOT_SAFETENSORS" and "--allow-pickle" in caught.value.next_step
    merged(text, "--allow-pickle", *flags)
    with pytest.raises(Refused) as caught:
        run("verify", "out")
    assert "--allow-pickle" in caught.value.next_step
    done = run("verify", "out", "--allow-pickle")
    assert done.exit_code == 0 and "byte for byte" in done.output
