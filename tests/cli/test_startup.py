"""What somebody at a terminal waits for before any work: help, and the plan of a merge however large its models are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from benchmarks import methods, models

REPO = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "gradio", "lm_eval", "pandas")
# the targets are 0.5 s and 2 s of wall time on a quiet machine; benchmarks/RESULTS.md has the figures
HELP_CPU_S, PLAN_CPU_S = 2.0, 6.0


def _run(*arguments: str) -> tuple[str, float, set[str]]:
    """Output, CPU seconds and imported packages of one `mergebot` command."""
    code = (
        "import sys, atexit\n"
        "def packages(): return sorted({name.partition('.')[0] for name in sys.modules})\n"
        "atexit.register(lambda: print('|'.join(packages()), file=sys.stderr))\n"
        "from bot.cli import main\nmain.main()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stderr is not None
    said, imported = child.stdout.read(), child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, imported
    return said, usage.ru_utime + usage.ru_stime, set(imported.strip().splitlines()[-1].split("|"))


def test_help_comes_at_once_and_imports_nothing_heavy() -> None:
    said, cpu_s, imported = _run("--help")
    assert "merge" in said
    assert imported.isdisjoint(HEAVY)
    assert cpu_s < HELP_CPU_S


def test_seventy_billion_parameters_are_planned_from_headers_alone(tmp_path: Path) -> None:
    folders = models.headers_only(tmp_path, models.SEVENTY, 4)
    if sum(file.stat().st_blocks * 512 for file in tmp_path.rglob("*.safetensors")) > 10**9:
        pytest.skip("this file system does not keep holes in files")
    text = tmp_path / "recipe.yml"
    text.write_text(yaml.safe_dump(methods.recipe("ties", folders, models.SEVENTY.layers)))
    said, cpu_s, imported = _run("plan", str(text))
    assert "ties" in said
    assert imported.isdisjoint(HEAVY)
    assert cpu_s < PLAN_CPU_S


def _imported(*arguments: str) -> set[str]:
    """The packages that one successful `mergebot` command imports, up to its last moment."""
    command = [sys.executable, "-X", "importtime", "-m", "bot.cli.main", *arguments]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Merged" in done.stdout
    lines = (line for line in done.stderr.splitlines() if line.startswith("import time:"))
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


@pytest.fixture
def parents(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        draws = torch.Generator().manual_seed(seed)
        names = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight")
        stored = {name: torch.randn(8, 4, generator=draws).to(torch.bfloat16) for name in names}
        stored["model.layers.1.mlp.up_proj.weight"][0, :2] = torch.tensor([float("nan"), float("-inf")])
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2}
        (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    return folders


def test_layers_are_stacked_without_torch(parents: list[Path], tmp_path: Path) -> None:
    (tmp_path / "stack.yml").write_text(
        "merge_method: passthrough\ndtype: bfloat16\nslices:\n"
        f"- sources: [{{model: {parents[0]}, layer_range: [0, 2]}}]\n"
        f"- sources: [{{model: {parents[1]}, layer_range: [1, 2]}}]\n"
    )
    assert _imported("merge", str(tmp_path / "stack.yml"), str(tmp_path / "out")).isdisjoint(HEAVY)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    theirs = [load_file(folder / "model.safetensors") for folder in parents]
    for layer, (parent, its) in enumerate(((0, 0), (0, 1), (1, 1))):
        stored = theirs[parent][f"model.layers.{its}.mlp.up_proj.weight"]
        assert torch.equal(
            merged[f"model.layers.{layer}.mlp.up_proj.weight"].view(torch.int16), stored.view(torch.int16)
        )
    told = json.loads((tmp_path / "out" / "merge_provenance.json").read_text())
    assert sorted(notice["count"] for notice in told["notices"] if notice["code"] == "NOT_FINITE") == [2, 2]
    assert told["environment"]["torch"] == torch.__version__


def test_what_is_computed_is_computed_by_torch(parents: list[Path], tmp_path: Path) -> None:
    (tmp_path / "scaled.yml").write_text(
        "merge_method: passthrough\ndtype: bfloat16\nslices:\n"
        f"- sources: [{{model: {parents[0]}, layer_range: [0, 2], parameters: {{scale: 0.5}}}}]\n"
    )
    assert "torch" in _imported("merge", str(tmp_path / "scaled.yml"), str(tmp_path / "out"))
