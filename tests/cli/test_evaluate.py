"""`mergebot evaluate`: a merge beside its parents, asked alike, each model measured once; stopped and gone on with."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from bot.cli import evaluation_output, output
from bot.cli.evaluation_output import fitted, labels
from bot.cli.main import app
from bot.errors import Failed, Refused
from bot.hub import Hub
from bot.jobs.job import Source
from bot.jobs.request import EvaluateOptions
from bot.jobs.specs import MergeSpec
from bot.settings import Settings
from bot.stages import evaluation, local_runs, worker
from evaluators import comparison
from evaluators.figures import number
from evaluators.harness import SUITES, results
from evaluators.harness.eval_config import EvalConfig
from evaluators.harness.scores import ModelEvaluation
from tests.evaluators import stored, tiny_harness

REPO = Path(__file__).resolve().parents[2]
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before = dict(os.environ)
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = tmp_path_factory.mktemp("evaluate")
    for seed, name in enumerate(("merge", "first", "second")):
        tiny_harness.model(folder / name, seed=seed, chat_template=None if name == "second" else TEMPLATE)
    for name in ("which_animal", "which_bird"):
        tiny_harness.task(folder, name)
    (folder / "mine.yml").write_text(
        "name: mine\ntasks:\n"
        "- {task: which_animal, file: which_animal.yaml}\n- {task: which_bird, file: which_bird.yaml}\n"
    )
    yield folder
    os.environ.clear()
    os.environ.update(before)


def run(place: Path, *words: str) -> Any:
    options = ("--home", str(place / "home"), "--hub", "http://127.0.0.1:9", "evaluate")
    return CliRunner().invoke(app, [*options, *words], catch_exceptions=False)


@pytest.fixture(scope="module")
def shown(place: Path) -> str:
    """A merge against its parents, of which one was measured before: two processes are left to start."""
    suite = ("--suite", str(place / "mine.yml"))
    assert run(place, str(place / "first"), *suite).exit_code == 0
    before = len(measured(place))
    against = [word for name in ("first", "second") for word in ("--against", str(place / name))]
    done = run(place, str(place / "merge"), *against, *suite, "--out", str(place / "out.json"))
    assert done.exit_code == 0, done.output
    assert len(measured(place)) == before + 2
    return str(done.output)


def measured(place: Path) -> list[str]:
    """The models that a process was started for, from its log."""
    log = (place / "home" / "scratch" / "evaluate" / "lm-eval" / "harness.log").read_text()
    return [line for line in log.splitlines() if "assuming single-process call" in line]


@pytest.mark.slow
def test_a_merge_stands_beside_its_parents_with_intervals_and_all_scores_in_json(place: Path, shown: str) -> None:
    words = " ".join(shown.split())
    for title in ("which_animal acc, 24 questions", "which_bird acc, 24 questions", "average of 2 tasks"):
        figure = r"\d+\.\d +\d+\.\d to \d+\.\d"
        difference = r"[+-]\d+\.\d +[+-]\d+\.\d to [+-]\d+\.\d (?:\d\.\d{3}|< 0.001)"
        block = rf"{title} merge {figure} first {figure} {difference} second {figure} {difference} "
        assert re.search(block, words), words
    table = shown[
        shown.index("mine  percent") : shown.index("merge against first and second, on average over 2 tasks:")
    ]
    assert max(map(len, table.splitlines())) <= 80
    assert "would be missed in more than one of five such measurements" in words and "parent" not in words
    assert "Same answer as first, right or wrong: " in words
    assert re.search(r"sanity check merge first second perplexity \(bits per byte\) \d", words) and "looping" in words
    assert (
        "prompts as plain text, seed 0. Generation settings: neutral; softmax in float32; reading " in words
        and "Evaluated now: merge and second. Cached: first." in words
    )
    told = json.loads((place / "out.json").read_text())
    assert list(told["first_look"]) == [told["model"], *told["against"]]
    assert told["suite"] == "mine" and told["model"] == str(place / "merge") and len(told["against"]) == 2
    found = {name: ModelEvaluation.from_dict(_stored(each)) for name, each in told["evaluations"].items()}
    assert {each.suite_digest for each in found.values()} == {told["suite_digest"]}
    assert len({each.key for each in found.values()}) == 3
    assert (
        told["comparison"]["overall"]["merge"]["model"] == told["model"] and told["model"] in told["comparison"]["keys"]
    )
    assert all(low <= each["average"] <= high for each in told["evaluations"].values()
               for low, high in [each["average_interval95"]])  # fmt: skip
    assert [task["task"] for task in told["comparison"]["tasks"]] == ["which_animal", "which_bird"]
    for at, task in enumerate(told["comparison"]["tasks"]):
        merge, *parents = (found[str(place / name)].scores[at].value for name in ("merge", "first", "second"))
        assert task["merge"]["value"] == merge and task["chance"] == pytest.approx(1 / 5)
        assert [each["value"] for each in task["differences"]] == pytest.approx([merge - value for value in parents])
    for each in told["evaluations"].values():
        lines = (Path(each["folder"]) / "samples" / "which_bird.jsonl").read_text().splitlines()
        assert [json.loads(line)["doc_id"] for line in lines] == list(range(24))


def _stored(told: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in told.items() if key not in ("average", "average_interval95", "folder")}


@pytest.mark.slow
def test_what_was_measured_once_is_not_measured_again(place: Path, shown: str) -> None:
    before = len(measured(place))
    done = run(place, str(place / "first"), "--against", str(place / "merge"), "--suite", str(place / "mine.yml"))
    assert done.exit_code == 0 and len(measured(place)) == before
    assert "Cached: first and merge." in " ".join(done.output.split())
    out = place / "again.json"
    out.write_text("old")
    out.with_suffix(".svg").write_text("old")
    words = (str(place / "first"), "--suite", str(place / "mine.yml"), "--out", str(out), "--overwrite")
    assert run(place, *words).exit_code == 0 and json.loads(out.read_text())["comparison"] is None
    assert not out.with_suffix(".svg").exists()  # nothing was compared: an old picture would tell of other figures


def test_a_model_that_talks_nonsense_is_refused_before_any_task_and_measured_only_when_asked(place: Path) -> None:
    words = (str(place / "merge"), "--suite", str(place / "mine.yml"))
    with pytest.raises(Failed) as caught:  # random weights: alone, no better than a blind guess
        run(place, *words)
    assert caught.value.code == "MODEL_NONSENSE" and "--no-first-look" in caught.value.next_step
    with pytest.raises(Failed) as caught:
        run(place, *words, "--against", str(place))
    assert caught.value.code != "MODEL_NONSENSE"  # a name that is no model is found before anything is looked at


def test_a_file_of_scores_is_not_overwritten_unasked(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    out.write_text("mine")
    with pytest.raises(Refused) as caught:
        run(place, str(place / "merge"), "--suite", str(place / "mine.yml"), "--out", str(out))
    assert caught.value.code == "OUTPUT_EXISTS" and "--overwrite" in caught.value.next_step
    assert out.read_text() == "mine"


def test_help_names_every_suite() -> None:
    told = CliRunner().invoke(app, ["evaluate", "--help"], env={"COLUMNS": "200"}).output
    assert [name for name in SUITES if name not in told] == []


def test_long_names_lose_their_middle_and_stay_different() -> None:
    names = labels(["models/SmolLM2-135M-Instruct-crests", "org/SmolLM2-135M-Instruct-smiths@abc", "a/x", "b/x"])
    assert [*names.values()] == ["SmolLM2-135M-Instruct-crests", "SmolLM2-135M-Instruct-smiths", "a/x", "b/x"]
    assert [*fitted(names, 16).values()] == ["SmolLM2-…-crests", "SmolLM2-…-smiths", "a/x", "b/x"]
    assert fitted({"1": "aaaaaaaaab1aaaaaaaa", "2": "aaaaaaaaab2aaaaaaaa"}, 6) == {
        "1": "aaaaaaaaab1aaaaaaaa", "2": "aaaaaaaaab2aaaaaaaa"
    }  # fmt: skip


def test_a_narrow_screen_cuts_no_figure_and_no_name_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = {"merge": 20, "other": 10}
    found = {
        f"models/{name}-with-a-long-name": stored.evaluation(
            tmp_path, f"{count:064x}", {"left": [1.0] * count + [0.0] * (40 - count)}
        )
        for name, count in right.items()
    }
    merge, other = found
    judged = comparison.compare(found[merge], {other: found[other]}, cache=tmp_path)
    size = output.console.width
    try:
        output.console.width = 64
        evaluation_output.evaluations(local_runs.Evaluated(found, frozenset()), judged, "")
    finally:
        output.console.width = size
    told = capsys.readouterr().out
    [row] = [" ".join(line.split()) for line in told.splitlines() if " 25.0 " in line]
    assert row.startswith("othe") and row.endswith("25.0 14.2 to 40.2 +25.0 +9.3 to +38.3 < 0.001")


@pytest.mark.parametrize("scale", [1.0, 1300.0, 456789.0, 3e12])
def test_a_blank_stands_before_every_figure_however_large(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scale: float
) -> None:
    found = {
        name: stored.evaluation(
            tmp_path, key * 64, {"text": [scale * (2 + at % 5 + (key == "b")) for at in range(40)]},
            metric="word_perplexity", higher_is_better=False,
        )
        for name, key in (("short", "a"), ("other", "b"))
    }  # fmt: skip
    judged = comparison.compare(found["short"], {"other": found["other"]}, cache=tmp_path)
    for compared in (judged, None):
        evaluation_output.evaluations(local_runs.Evaluated(found, frozenset()), compared, "")
        told = capsys.readouterr().out
        rows = [line for line in told.splitlines() if re.match(r"  (short|other) .*\d to ", line)]
        assert len(rows) == 2 and "…" not in told, told
        assert all(f" {number(scale * 4)} " in row or f" {number(scale * 5)} " in row for row in rows)


def test_numbers_are_written_out_up_to_a_million() -> None:
    assert [number(each) for each in (0.01234, 12.345, 1340.4, 999_999, 1.3e8)] == [
        "0.0123", "12.3", "1,340", "999,999", "1.3e+08"
    ]  # fmt: skip
    assert [number(each, signed=True) for each in (0.5, -1340, 2000)] == ["+0.5", "-1,340", "+2,000"]


@pytest.mark.slow
def test_a_model_without_a_chat_template_is_named_and_the_others_are_kept(place: Path) -> None:
    words = (str(place / "first"), "--against", str(place / "second"), "--suite", str(place / "mine.yml"))
    with pytest.raises(Failed) as caught:
        run(place, *words, "--chat-template")
    assert caught.value.code == "NO_CHAT_TEMPLATE" and str(place / "second") in caught.value.message
    assert "all compared models without --chat-template" in caught.value.next_step
    before = len(measured(place))
    assert run(place, str(place / "first"), "--suite", str(place / "mine.yml"), "--chat-template").exit_code == 0
    assert len(measured(place)) == before


def asking(parent: psutil.Process) -> list[psutil.Process]:
    """The processes of lm-eval under `parent`; a library may start others on the way."""
    found = []
    for child in parent.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "evaluators.harness.process" in child.cmdline():
                found.append(child)
    return found


def heeds_ctrl_c() -> None:
    """A shell starts what runs in the background (`make test &`) deaf to it, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_ctrl_c_ends_the_process_that_evaluates_and_says_how_to_go_on(place: Path) -> None:
    command = [sys.executable, "-m", "bot.cli.main", "--home", str(place / "stopped"), "--hub", "http://127.0.0.1:9"]
    command += ["evaluate", str(place / "merge"), "--suite", str(place / "mine.yml"), "--no-first-look"]
    with subprocess.Popen(
        command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeds_ctrl_c
    ) as process:
        parent = psutil.Process(process.pid)
        while not (children := asking(parent)) and process.poll() is None:
            psutil.wait_procs([parent], timeout=0.05)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "Interrupted; finished evaluations are kept. Run the same command again to continue. [CANCELLED]" in said
    _gone, alive = psutil.wait_procs(children, timeout=30)
    assert children and not alive


@pytest.mark.parametrize(
    "words",
    [("--device", "tpu"), ("--dtype", "int8"), ("--batch-size", "0"), ("--backend", "x"), ("--seed", "-1")],
)
def test_a_condition_that_is_none_is_refused_with_those_there_are(words: tuple[str, str], place: Path) -> None:
    with pytest.raises(Failed) as caught:
        run(place, str(place / "merge"), "--suite", str(place / "mine.yml"), *words)
    assert caught.value.code == "VALUE_OUT_OF_RANGE" and words[1] in caught.value.message
    assert caught.value.next_step.startswith("Write ")


def _written_at(path: Path) -> int:
    return path.stat().st_mtime_ns


@pytest.mark.slow
def test_a_merge_whose_parent_is_known_costs_one_model_and_no_download(place: Path) -> None:
    """The parent's folder does not even exist: what is stored under its commit is enough."""
    settings = Settings(home=place / "bot", hub="http://127.0.0.1:9")
    asked = EvaluateOptions(suite="offline", limit=2)
    put = evaluation.question_of(asked, settings)
    parent = Source("alice/parent", "0" * 40, "mit", 1)
    heard: list[str] = []
    hub = Hub(settings.hub, deadline_s=1.0)

    def report(what: str, done: float, total: float) -> None:
        heard.append(what)

    model = evaluation.Model(place / "first", parent.repo, str(parent))
    first = evaluation.evaluate(model, put, settings, place / "scratch", report)
    twin = Source("alice/b", "0" * 39 + "b", "mit", 1)  # the same answers, stored under another name
    stored = settings.evaluations / "results" / put.key(str(twin))
    shutil.copytree(results.folder_of(first, settings.evaluations), stored)
    (stored / "evaluation.json").write_text(json.dumps(replace(first, key=stored.name).as_dict()))
    assert evaluation.is_known(parent, asked, settings, hub)
    spec = MergeSpec("", place / "out", 0, (parent, twin), asked)
    assert worker._measured(spec, settings, hub) == set()
    heard.clear()
    merged, found = evaluation.scores(
        place / "merge", "m" * 64, (parent, twin), asked, settings, place / "scratch", report
    )
    assert set(heard) == {"Evaluating the merge"} and merged is not None
    assert list(found) == [str(parent), str(twin)]
    assert all(len(each.task_seconds) == 3 and min(each.task_seconds) > 0 for each in found.values())
    written = (results.folder_of(merged, settings.evaluations) / "samples").iterdir()
    order = comparison.most_telling(found, cache=settings.evaluations)
    assert len(order) == 3 and [path.stem for path in sorted(written, key=_written_at)] == order
    assert results.stored(
        settings.evaluations, EvalConfig(2, 0, "auto", "auto", "auto").key("m" * 64, put.suite.digest)
    )
