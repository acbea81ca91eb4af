"""The documents tell the truth: every command in them runs as it stands, every path they name is there."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bot import localhub
from bot.cli.main import app
from bot.merge.methods.__main__ import page
from bot.settings import settings_page
from bot.stages.suite_file import chosen
from tests import family
from tests.evaluators import tiny_harness
from tests.localhub.server import running_hub
from tests.merge.tiny_checkpoints import llama_tensors, save

REPO = Path(__file__).resolve().parent.parent
MERGING = (REPO / "docs" / "merging.md").read_text()
MEDUSA = (REPO / "docs" / "medusa.md").read_text()
EVALUATION = (REPO / "docs" / "evaluation.md").read_text()
VERDICT = (REPO / "docs" / "verdict.md").read_text()
README = (REPO / "README.md").read_text()
QUESTION = '{"question_id": 1, "category": "math", "turns": ["one two"]}\n'
RECIPE = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
CONFIG = "layer_slices:\n- {model: a, start: 0, end: 2}\n- {model: b, start: 1, end: 2}\n"


def commands(text: str) -> list[str]:
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("mergebot ")]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; the environment that commands set is undone."""
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def folder(workplace: Path) -> Path:
    """What the examples of the merging page name, in the working directory."""
    for seed, name in enumerate(("base", "a", "b")):
        save(workplace / name, llama_tensors(seed, layers=3))
    (workplace / "RECIPE").write_text(RECIPE)
    (workplace / "CONFIG").write_text(CONFIG)
    return workplace


def test_every_command_of_the_merging_page_runs(folder: Path) -> None:
    found = commands(MERGING)
    assert len(found) > 6
    for number, line in enumerate(found):
        words = shlex.split(line, comments=True)[1:]
        out = folder / "OUT"
        if out.exists() and "--overwrite" not in words and "verify" not in words:
            out.rename(folder / f"OUT{number}")
        done = CliRunner().invoke(app, ["--home", "home", *words], catch_exceptions=False)
        assert done.exit_code == 0, f"{line}: {done.output}"


@pytest.mark.slow
def test_every_command_of_the_medusa_page_runs(workplace: Path) -> None:
    family.make(workplace)
    (workplace / "base").rename(workplace / "MODEL")
    (workplace / "question.jsonl").write_text(QUESTION)
    (workplace / "choices.py").write_text("choices = [(0,), (1,), (0, 0)]\n")
    found = commands(MEDUSA)
    assert len(found) == 5
    quick = {"train": "--answers 4 --steps 3 --vocab 64 --no-conditioned", "bench": "--budget-s 10 --new-tokens 8"}
    for line in found:
        words = shlex.split(line)[1:]
        more = [*shlex.split(quick.get(words[1], "")), *(["--device", "cpu"] if words[1] != "export" else [])]
        done = CliRunner().invoke(app, ["--home", "home", *words, *more], catch_exceptions=False)
        assert done.exit_code == 0, f"{line}: {done.output}"
    code = re.search(r"^```python\n(.*?)^```", MEDUSA, re.MULTILINE | re.DOTALL)
    assert code is not None
    exec(compile(code[1], "docs/medusa.md", "exec"), {})


@pytest.mark.slow
def test_every_command_and_the_suite_file_of_the_evaluation_pages_run(workplace: Path, shared: Path) -> None:
    """As they stand, but on two questions per task; with the real datasets, from a local Hub."""
    for seed, name in enumerate(("MERGE", "PARENT"), start=1):
        tiny_harness.model(workplace / name, seed=seed, positions=512)
    tiny_harness.task(workplace, "our_own")
    datasets = workplace / "content" / "datasets"
    for repo in ("allenai/ai2_arc", "baber/piqa", "allenai/openbookqa", "EleutherAI/lambada_openai"):
        (datasets / repo).parent.mkdir(parents=True, exist_ok=True)
        (datasets / repo).symlink_to(shared / "hub_seed" / "datasets" / repo)
    localhub.seed(workplace / "hub", workplace / "content")
    found = commands(EVALUATION) + commands(VERDICT)
    assert len(found) == 3
    with running_hub(workplace / "hub") as hub:
        for line in found:
            words = [*shlex.split(line)[1:], "--limit", "2"]
            done = CliRunner().invoke(app, ["--home", "home", "--hub", hub.url, *words], catch_exceptions=False)
            assert done.exit_code == 0, f"{line}: {done.output}"
    assert json.loads((workplace / "scores.json").read_text())["comparison"] and (workplace / "scores.svg").is_file()
    assert "Cached: MERGE and PARENT." in done.output  # by the first of the pages
    [suite] = re.findall(r"^```yaml\n(.*?)^```", EVALUATION, re.MULTILINE | re.DOTALL)
    (workplace / "ours.yml").write_text(suite)
    assert [task.name for task in chosen("ours.yml").tasks][:4] == ["arc_easy", "arc_challenge", "our_own", "cola"]


def test_the_table_of_methods_is_the_registry() -> None:
    assert (REPO / "docs" / "methods.md").read_text() == page(), "python -m bot.merge.methods > docs/methods.md"


def test_the_table_of_settings_is_generated() -> None:
    assert (REPO / "docs" / "settings.md").read_text() == settings_page(), "bot.settings.settings_page()"


def test_references_to_design_documents_lead_to_a_section() -> None:
    design = REPO / "docs" / "design"
    found = 0
    for folder in ("bot", "evaluators", "space", "tests", "benchmarks"):
        for file in (REPO / folder).rglob("*.py"):
            for name, number in re.findall(r"\b(\w+)\.md`? (\d+(?:\.\d+)*)", file.read_text()):
                headings = re.findall(r"^#+ (\d+(?:\.\d+)*)\b", (design / f"{name}.md").read_text(), re.MULTILINE)
                assert number in headings, f"{file}: {name}.md {number}"
                found += 1
    assert found > 50


def test_every_verb_and_path_the_documents_name_is_there() -> None:
    for line in commands(README):
        for part in line.partition("#")[0].split(";"):
            verb = part.split()[1]
            assert CliRunner().invoke(app, [verb, "--help"]).exit_code == 0, line
    paths = re.findall(
        r"(?:bot|tests|docs|space|evaluators|benchmarks)/[\w./-]*[\w/]",
        README + MERGING + MEDUSA + EVALUATION + VERDICT,
    )
    assert len(paths) > 10
    assert [path for path in paths if not any(REPO.glob(f"{path.rstrip('/')}*"))] == []


def test_every_attack_of_the_page_is_a_test() -> None:
    page = (REPO / "tests" / "attacks" / "README.md").read_text()
    file = ""
    found = re.findall(r"`(tests/[\w/]+\.py|test_\w+)`", page)
    assert len(found) > 40
    for name in found:
        if name.startswith("tests/"):
            file = (REPO / name).read_text()
        else:
            assert f"def {name}(" in file, name
