"""An evaluation that is killed, cancelled or fails in one task keeps what it has, and ends as if nothing had been."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from bot.errors import EvaluationError
from evaluators import harness
from evaluators.harness import results
from evaluators.harness.journal import Journal
from evaluators.harness.scores import ModelEvaluation, TaskData
from evaluators.harness.suites import Suite, SuiteTask
from tests.evaluators import stored, tiny_harness

SETTINGS: dict[str, Any] = {"timeout_s": 240.0, "environment": {"OMP_NUM_THREADS": "1"}, "batch_size": "1"}
ROWS = {"which_animal": 30, "which_bird": 600}  # the second long enough to be interrupted
LOOK = 20


class Cancelled(Exception):
    """What a caller's progress may raise to end the evaluation."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resuming")


@pytest.fixture(scope="module")
def model(place: Path) -> Path:
    return tiny_harness.model(place / "models" / "tiny", rows=25_000)  # slow enough to be interrupted


@pytest.fixture(scope="module")
def suite(place: Path) -> Suite:
    return Suite("two", 1, tuple(tiny_harness.task(place / "tasks", name, rows) for name, rows in ROWS.items()))


@pytest.fixture(scope="module")
def undisturbed(place: Path, model: Path, suite: Suite) -> ModelEvaluation:
    return tiny_harness.evaluate(model, suite, cache=place / "quiet", scratch=place / "s0", **SETTINGS)


def interrupted(place: Path, cache: str, end: Callable[[], None]) -> Callable[[int, int, str], None]:
    """A progress that calls `end` once some answers to the second task stand in the journal."""

    def progress(done: int, total: int, what: str) -> None:
        answers = (place / cache / "partial").glob("*/*.jsonl")
        if what == "which_bird" and any(len(each.read_text().splitlines()) > 3 for each in answers):
            end()

    return progress


def kill() -> None:
    """As kill -9 does it, to the process that evaluates."""
    for child in psutil.Process().children(recursive=True):
        if "evaluators.harness.process" in child.cmdline():
            child.send_signal(signal.SIGKILL)


def same_samples(place: Path, cache: str, found: ModelEvaluation) -> bool:
    def read(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (folder / "samples").iterdir()}

    return read(harness.folder_of(found, place / cache)) == read(harness.folder_of(found, place / "quiet"))


@pytest.mark.slow
def test_killed_and_then_cancelled_an_evaluation_ends_with_the_numbers_of_an_undisturbed_one(
    place: Path, model: Path, suite: Suite, undisturbed: ModelEvaluation
) -> None:
    def cancel() -> None:
        raise Cancelled

    where = {"cache": place / "disturbed", "scratch": place / "s1"}
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(EvaluationError) as caught:
        tiny_harness.evaluate(model, suite, progress=interrupted(place, "disturbed", kill), **where, **SETTINGS)
    assert caught.value.code == "MEMORY_LIMIT"
    answered = _answered(place / "disturbed")
    with pytest.raises(Cancelled):
        tiny_harness.evaluate(model, suite, progress=interrupted(place, "disturbed", cancel), **where, **SETTINGS)
    assert set(psutil.Process().children(recursive=True)) <= before
    assert _answered(place / "disturbed") >= answered
    answered = _answered(place / "disturbed")
    told: list[tuple[int, int, str]] = []
    found = tiny_harness.evaluate(model, suite, progress=lambda *line: told.append(line), **where, **SETTINGS)
    assert (found.scores, found.others) == (undisturbed.scores, undisturbed.others)
    assert same_samples(place, "disturbed", found)
    assert "which_animal" not in {what for _, _, what in told}
    assert min(done for done, _, what in told if what == "which_bird" and done) >= answered
    assert list((place / "disturbed" / "partial").iterdir()) == []


def _answered(cache: Path) -> int:
    """Count the answers to the second task, when it is the one that is left."""
    assert len(list((cache / "tasks").iterdir())) == 1
    (path,) = (cache / "partial").glob("*/*.jsonl")
    answered = len(Journal(path))
    assert 0 < answered < 5 * ROWS["which_bird"]
    return answered


@pytest.fixture(scope="module")
def first_look(place: Path, model: Path, suite: Suite) -> ModelEvaluation:
    """Some samples of each task, those of the second one first."""
    where = {"cache": place / "staged", "scratch": place / "s2"}
    return tiny_harness.evaluate(model, suite, limit=LOOK, order=("which_bird",), **where, **SETTINGS)


@pytest.mark.slow
def test_a_first_look_at_some_samples_is_not_asked_again(
    place: Path, model: Path, suite: Suite, first_look: ModelEvaluation, undisturbed: ModelEvaluation
) -> None:
    told: list[tuple[int, int, str]] = []
    assert [score.samples for score in first_look.scores] == [LOOK, LOOK]
    found = tiny_harness.evaluate(
        model,
        suite,
        cache=place / "staged",
        scratch=place / "s2",
        reuse=[first_look],
        order=("which_bird",),
        progress=lambda *line: told.append(line),
        **SETTINGS,
    )
    assert found.scores == undisturbed.scores
    assert min(done for done, _, what in told if what == "which_bird" and done) >= 5 * LOOK
    tasks = [what for _, _, what in told if what.startswith("which")]
    assert tasks.index("which_bird") < tasks.index("which_animal")


@pytest.mark.slow
def test_a_task_that_fails_is_named_and_the_others_are_kept(
    place: Path, model: Path, suite: Suite, first_look: ModelEvaluation
) -> None:
    absent = tiny_harness.task(place / "more", "which_fish", repo="nobody/no-such-data")
    asked = Suite("with a gap", 1, (absent, *suite.tasks))
    with pytest.raises(EvaluationError) as caught:
        tiny_harness.evaluate(model, asked, limit=LOOK, cache=place / "gap", scratch=place / "s3", **SETTINGS)
    assert caught.value.code == "DATASET_UNAVAILABLE"
    assert caught.value.message == (
        "The data of task `which_fish` cannot be loaded: there is no Hub to load it from. "
        "The other 2 of 3 tasks are measured and kept."
    )
    asked_again: list[str] = []
    where = {"cache": place / "gap", "scratch": place / "s3"}
    found = tiny_harness.evaluate(
        model, suite, limit=LOOK, progress=lambda *line: asked_again.append(line[2]), **where, **SETTINGS
    )
    assert asked_again == []  # without the task that failed it is another suite of the same tasks
    assert (found.scores, found.others) == (first_look.scores, first_look.others)
    kept = harness.folder_of(found, place / "gap") / "samples" / "which_bird.jsonl"
    assert kept.read_bytes() == (harness.folder_of(first_look, place / "staged") / "samples" / kept.name).read_bytes()


@pytest.mark.slow
def test_in_another_suite_only_tasks_that_are_new_or_changed_are_asked(
    place: Path, model: Path, suite: Suite, first_look: ModelEvaluation
) -> None:
    """Its neighbour is corrected, another is added, the order changes, and the task is ranked by another metric."""
    changed = tiny_harness.task(place / "tasks", "which_animal", ROWS["which_animal"] - 1)
    added = tiny_harness.task(place / "tasks", "which_fish", 8)
    asked = Suite("other", 2, (added, replace(suite.tasks[1], metric="acc_norm"), changed))
    told: list[str] = []
    found = tiny_harness.evaluate(
        model,
        asked,
        limit=LOOK,
        cache=place / "staged",
        scratch=place / "s2",
        progress=lambda *line: told.append(line[2]),
        **SETTINGS,
    )
    assert {what for what in told if what.startswith("which")} == {"which_fish", "which_animal"}
    assert [score.task for score in found.scores] == ["which_fish", "which_bird", "which_animal"]
    before = {(score.metric, score.value) for score in (*first_look.scores, *first_look.others)}
    assert {(s.metric, s.value) for s in (*found.scores, *found.others) if s.task == "which_bird"} <= before
    samples = harness.folder_of(found, place / "staged") / "samples"
    assert sorted(path.stem for path in samples.iterdir()) == ["which_animal", "which_bird", "which_fish"]


def test_a_torn_line_of_the_journal_costs_one_batch(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    text = ("a", {"until": ["."]})
    first = Journal(path)
    first.add(("a", " b"), (-1.5, True))
    first.batch_ended()
    first.add(text, "text")
    first.batch_ended()
    path.write_bytes(path.read_bytes()[:-5])
    second = Journal(path)
    assert second.known([("a", " b"), text]) == [(-1.5, True), None]
    second.add(text, "text")
    assert Journal(path).known([text]) == [None]
    second.batch_ended()
    assert Journal(path).known([text]) == ["text"]
    path.write_bytes(path.read_bytes() + b'\xff\0\n[1]\n7\n{"a": 1}\n')
    assert Journal(path).known([("a", " b"), text]) == [(-1.5, True), "text"]


def test_a_question_drawn_several_times_keeps_every_draw(tmp_path: Path) -> None:
    drawn = ("a", {"do_sample": True})
    journal = Journal(tmp_path / "journal.jsonl")
    for answer in ("one", "two"):
        journal.add(drawn, answer)
    journal.batch_ended()
    assert Journal(tmp_path / "journal.jsonl").known([drawn, ("b", {}), drawn, drawn]) == ["one", None, "two", None]


def test_what_samples_hold_is_known_whatever_letters_are_in_them(tmp_path: Path) -> None:
    """A line separator of Unicode is no end of a line of JSON; each filter tells of the same answers."""
    asked = ("one\u2028two\x85", {"do_sample": True})
    row = {"arguments": [asked], "resps": [["first", "second"]]}
    lines = [json.dumps({**row, "filter": name}, ensure_ascii=False) + "\n" for name in ("strict", "loose")]
    (tmp_path / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    journal = Journal(tmp_path / "journal.jsonl")
    journal.take_samples(tmp_path / "samples.jsonl")
    assert journal.known([asked] * 3) == ["first", "second", None]


# -- the folders of an evaluation, without a model --------------------------------------------------------------------


FINISHED = Suite("one", 1, (SuiteTask("pets", "acc"),))
KEY = "0" * 64
TASK_KEYS = ["1" * 64]


def finished(cache: Path) -> Path:
    """An evaluation under way whose only task, a group of two, is finished."""
    where = {"repo": "org/pets", "split": "test", "revision": "c" * 40}
    told = {
        "results": {"results": {"pets": {"acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 9}}},
        "data": {"cats": {**where, "config": "cats"}, "dogs": {**where, "config": "dogs"}},
        "environment": asdict(stored.ENVIRONMENT),
        "seconds": 1.0,
        "batch": 4,
    }
    results.finish(cache, TASK_KEYS[0], json.dumps(told), {"cats": ["{}\n"], "dogs": ["{}\n"]})
    return results.task_folder(cache, TASK_KEYS[0])


def test_a_group_tells_what_the_data_of_its_tasks_have_in_common(tmp_path: Path) -> None:
    finished(tmp_path)
    [score] = results.read(tmp_path, FINISHED, TASK_KEYS, KEY).scores
    assert score.data == TaskData("org/pets", None, "test", "c" * 40)


def test_until_an_evaluation_has_its_name_no_finished_task_is_let_go(tmp_path: Path) -> None:
    finished(tmp_path)
    (tmp_path / "results").write_text("a file in place of the folder")
    with pytest.raises(OSError, match="results"):
        results.keep(tmp_path, results.read(tmp_path, FINISHED, TASK_KEYS, KEY), TASK_KEYS)
    assert results.finished(tmp_path, TASK_KEYS[0]) is not None
    (tmp_path / "results").unlink()
    (tmp_path / "results" / KEY / "samples").mkdir(parents=True)  # what a clumsy hand left of an earlier one
    found = results.read(tmp_path, FINISHED, TASK_KEYS, KEY)
    results.keep(tmp_path, found, TASK_KEYS)
    assert results.stored(tmp_path, KEY) == found
    assert sorted(path.name for path in (tmp_path / "results" / KEY).rglob("*")) == [
        "cats.jsonl",
        "dogs.jsonl",
        "evaluation.json",
        "lm_eval.json",
        "samples",
    ]
    assert [path.name for path in (tmp_path / "results").iterdir()] == [KEY]


@pytest.mark.parametrize("text", ["", '{"results": ', "[]", "[" * 100_000])
def test_what_a_disk_did_not_keep_whole_is_measured_again(text: str, tmp_path: Path) -> None:
    (finished(tmp_path) / "result.json").write_text(text)
    assert results.finished(tmp_path, TASK_KEYS[0]) is None
    finished(tmp_path)
    assert results.finished(tmp_path, TASK_KEYS[0]) is not None
    (tmp_path / "results" / KEY).mkdir(parents=True)
    (tmp_path / "results" / KEY / "evaluation.json").write_text(text)
    assert results.stored(tmp_path, KEY) is None


def test_one_at_a_time_is_under_way_also_where_the_first_removed_its_lock(tmp_path: Path) -> None:
    """Two wait for the first, which ends and removes the lock they wait for; then only one of them goes on."""
    inside: list[int] = []
    entered, most = threading.Event(), [0]

    def work(number: int, hold: threading.Event) -> None:
        with results.under_way(tmp_path, KEY, time.monotonic() + 9):
            inside.append(number)
            most[0] = max(most[0], len(inside))
            entered.set()
            hold.wait(5)
            if number == 0:
                (tmp_path / "partial" / f"{KEY}.lock").unlink()
            inside.remove(number)

    holds = [threading.Event() for _ in range(3)]
    threads = [threading.Thread(target=work, args=each) for each in enumerate(holds)]
    threads[0].start()
    entered.wait(5)
    entered.clear()
    threads[1].start()
    threads[1].join(0.3)  # it waits
    holds[0].set()
    threads[0].join()
    threads[2].start()
    entered.wait(5)
    threads[2].join(0.5)
    for hold in holds:
        hold.set()
    for thread in threads:
        thread.join()
    assert most == [1]
