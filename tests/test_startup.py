"""What somebody at a terminal waits for before any work: help, and the plan of a merge however large its models are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import methods, models

REPO = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "gradio", "lm_eval", "pandas")
# the targets are 0.5 s and 2 s of wall time on a quiet machine; benchmarks/RESULTS.md has the figures
HELP_CPU_S, PLAN_CPU_S = 2.0, 6.0


def _run(*arguments: str) -> tuple[str, float, set[str]]:
    """Output, CPU seconds and imported packages of one `mergebot` command."""
    code = (
        "import sys, atexit\n"
        "def packages(): return sorted({name.partition('.')[0] for name in sys.modules})\n"
        "atexit.register(lambda: print('|'.join(packages()), file=sys.stderr))\n"
        "from bot import cli\ncli.main()\n"
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
