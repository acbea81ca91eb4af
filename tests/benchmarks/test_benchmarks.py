"""A measurement is worth what it measures with: models that load, a floor that counts, costs that are true."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from benchmarks import floor, methods, models
from benchmarks.agreement import compare
from benchmarks.agreement.corners import corners
from benchmarks.agreement.drawn import at_random
from benchmarks.measure import run
from benchmarks.merge import work_of
from bot.merge.recipe import reading as recipe

SMALL = models.Shape(layers=4, hidden=32, inner=48, heads=4, kv_heads=2, vocabulary=64)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return models.synthetic(tmp_path_factory.mktemp("models"), SMALL, 2, lambda _: None)


def test_the_large_model_has_the_size_it_is_said_to_have() -> None:
    assert models.LARGE.parameters == 1_100_048_384
    assert len(models.tensors_of(models.LARGE)) == 201


@pytest.mark.slow
def test_made_checkpoints_load_and_run_in_transformers(made: list[Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for folder in made:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        tokens = AutoTokenizer.from_pretrained(folder)("w1 w2", return_tensors="pt")["input_ids"]
        assert torch.isfinite(model(tokens).logits).all()


def test_parents_are_the_base_and_a_tenth_of_noise(made: list[Path]) -> None:
    base, one, two = (load_file(folder / "model-00001-of-00001.safetensors") for folder in made)
    name = "model.layers.1.mlp.up_proj.weight"
    delta = (one[name].float() - base[name].float()).std() / base[name].float().std()
    assert 0.08 < float(delta) < 0.12
    assert not torch.equal(one[name], two[name])


def test_the_same_checkpoint_is_made_every_time(made: list[Path], tmp_path: Path) -> None:
    again = models.synthetic(tmp_path, SMALL, 1, lambda _: None)
    assert len(again) == 2, "the base and one parent"
    for before, after in zip(made[:2], again, strict=True):
        file = "model-00001-of-00001.safetensors"
        assert (before / file).read_bytes() == (after / file).read_bytes()


def test_rounding_to_bfloat16_is_that_of_torch() -> None:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 1e3
    ours = torch.from_numpy(models.to_bfloat16(values.numpy()).view("int16")).view(torch.bfloat16)
    assert torch.equal(ours, values.to(torch.bfloat16))


def test_the_floor_reads_what_the_merge_reads_and_writes_as_much(made: list[Path], tmp_path: Path) -> None:
    text = tmp_path / "recipe.yml"
    text.write_text(yaml.safe_dump(methods.recipe("passthrough", made, SMALL.layers)))
    reads, bytes_out = work_of(text)
    weights = (made[0] / "model-00001-of-00001.safetensors").stat().st_size
    read = sum(stop - start for _, start, stop in reads)
    assert 0.5 * 2 * weights < read < 2 * weights, "two layers of each model, not two models"
    assert floor.copy(reads, bytes_out, tmp_path / "out") == (read, bytes_out)
    assert (tmp_path / "out").stat().st_size == bytes_out


def test_the_floor_does_not_pass_over_a_file_that_is_too_short(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(10))
    with pytest.raises(EOFError, match="ends before byte 20"):
        floor.copy([(str(tmp_path / "short"), 0, 20)], 20, tmp_path / "out")


def test_a_cost_counts_what_a_child_and_its_children_use(tmp_path: Path) -> None:
    held = "import time; held = bytearray(b'1') * 200_000_000; time.sleep(0.4)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}]); sum(range(10_000_000))"
    cost = run([sys.executable, "-c", code], cwd=tmp_path)
    assert cost.status == 0 and not cost.stopped
    assert cost.anonymous_bytes > 190_000_000
    assert cost.wall_s > 0.4 and cost.cpu_s > 0.1


def test_a_run_past_its_time_is_stopped_and_says_so(tmp_path: Path) -> None:
    cost = run([sys.executable, "-c", "import time; time.sleep(60)"], cwd=tmp_path, timeout_s=0.3)
    assert cost.stopped and cost.status < 0 and cost.wall_s < 30


def test_every_recipe_of_the_comparison_is_one_of_ours() -> None:
    named_templates = {"template"}
    cases = [*corners(), *map(at_random, range(40))]
    assert len({name for name, _ in cases}) == len(cases)
    for name, document in cases:
        if name not in named_templates:
            assert recipe.parse(json.dumps(document)).method == document["merge_method"]


def test_the_comparison_sees_one_wrong_element(made: list[Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = "model-00001-of-00001.safetensors"
    for folder, change in ((tmp_path / "a", 0.0), (tmp_path / "b", 1e-3)):
        folder.mkdir()
        tensors = {name: tensor.float() for name, tensor in load_file(made[0] / file).items()}
        tensors["lm_head.weight"][3, 5] += change
        save_file(tensors, folder / file)
        for text in ("config.json", "tokenizer.json"):
            (folder / text).write_bytes((made[0] / text).read_bytes())
    asked = {"merge_method": "linear", "dtype": "float32"}
    assert compare.compare(tmp_path / "a", tmp_path / "a", asked).differences == ()
    assert "lm_head.weight" in compare.compare(tmp_path / "b", tmp_path / "a", asked).differences[0]
