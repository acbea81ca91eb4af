"""What a run of the demo says: a line a step where there is no terminal, and of the seconds only its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bot.cli import output
from bot.demo import run
from bot.errors import Failed
from bot.jobs.job import Failure, Job, Publication, Stage
from bot.jobs.queue import Queue
from bot.jobs.request import CardBlock, EvaluateOptions, from_card, from_form
from bot.progress import in_lines

REPO = Path(__file__).resolve().parents[2]


def test_in_a_log_each_step_has_a_line_when_it_begins_and_one_with_its_seconds_when_it_ends() -> None:
    said: list[str] = []
    now = 0.0
    with in_lines(said.append, lambda: now) as show:
        show("base", 0, 3)
        now = 2.0
        show("base", 3, 3)
        show("base", 3, 3)
        show("crests", 1, 48)
        now = 9.4
        show("smiths", 48, 48)
        show("crests", 2, 48)  # what another job still shows
        show("board", 0, 1)
        now = 10.0
    assert said[:4] == ["base …", "base … 2 s", "crests …", "crests … 7 s"]
    assert said[4:] == ["smiths …", "smiths … 0 s", "board …", "board … 1 s"]


def test_a_step_that_fails_says_so_in_the_log() -> None:
    said: list[str] = []
    with pytest.raises(KeyError), in_lines(said.append, lambda: 1.0) as show:
        show("base", 0, 3)
        raise KeyError
    assert said == ["base …", "base … stopped after 0 s"]


_LOGGED = """
from pathlib import Path
from bot.cli import output
from bot.settings import Settings, activate
activate(Settings(home=Path("nowhere")))
from tqdm.auto import tqdm
from transformers.utils import logging
with output.progress() as show:
    show("A step whose name is longer than the column that a bar would leave for it", 0, 2)
    for bar in (tqdm, logging.tqdm):
        for done in bar(range(2), desc="a library's own bar"):
            pass
"""


def test_without_a_terminal_nothing_but_the_lines_of_our_own_steps_is_printed() -> None:
    done = subprocess.run([sys.executable, "-c", _LOGGED], capture_output=True, text=True, cwd=REPO, check=True)
    name = "A step whose name is longer than the column that a bar would leave for it"
    assert done.stderr == ""
    first, last = done.stdout.splitlines()
    assert first == f"{name} …" and last.startswith(f"{name} … ") and last.endswith(" s")


def test_seconds_that_an_earlier_run_took_are_not_told_as_this_ones() -> None:
    seconds = {"base": 0.1, "total": 9.0, "merge": 3.0, "evaluate": 200.0, "publish": 1.0}
    assert run._took(seconds, []) == "base 0 s, total 9 s, merge 3 s, evaluate 200 s, publish 1 s"
    told = run._took(seconds, ["merge", "evaluate"])
    assert told == "base 0 s, total 9 s, publish 1 s; kept from an earlier run: merge, evaluate"


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    return Queue(f"sqlite:///{tmp_path}/jobs.db")


def asked(queue: Queue, name: str, repo: str | None = None) -> Job:
    request = from_form(run.REQUESTER, "a recipe", name, EvaluateOptions())
    if repo is not None:
        request = from_card(repo, "c" * 40, CardBlock("a recipe", None, name, EvaluateOptions(), "none", 1, True), "r")
    return queue.submit(request, digest=name, recipe="{}", sources=(), plan={})


def finish(queue: Queue, fact: Publication | Failure) -> None:
    lease = queue.claim("here")
    assert lease is not None
    queue.record(lease, fact)


def test_what_visitors_asked_for_since_the_last_run_is_not_the_demos(queue: Queue) -> None:
    """The scheduler's queue as an earlier run left it: both requests published, one of a visitor's cancelled."""
    form, card = asked(queue, "both"), asked(queue, "averaged", run.CARD_REPO)
    for _ in range(2):
        finish(queue, Publication("bot/x", "c" * 40, 1.0))
    queue.cancel(asked(queue, "of-a-visitor").id, run.REQUESTER)
    asked(queue, "waiting")
    jobs = run._follow(SimpleNamespace(queue=queue), form.id, lambda what, done, total: None)
    assert [job.id for job in run._published(jobs, output)] == [form.id, card.id]


def test_a_cancelled_job_of_the_demo_is_said_and_not_looked_for(
    queue: Queue, capsys: pytest.CaptureFixture[str]
) -> None:
    form, card = asked(queue, "both"), asked(queue, "averaged", run.CARD_REPO)
    queue.cancel(card.id, run.CARD_REPO.partition("/")[0])
    finish(queue, Publication("bot/x", "c" * 40, 1.0))
    assert [job.id for job in run._published([queue.job(form.id), queue.job(card.id)], output)] == [form.id]
    assert "averaged was cancelled" in capsys.readouterr().out
    with pytest.raises(Failed, match="averaged was cancelled"):
        run._published([queue.job(card.id)], output)


def test_a_failed_job_of_the_demo_gives_its_reason(queue: Queue) -> None:
    form = asked(queue, "both")
    finish(queue, Failure(Stage.MERGING, "DISK_FULL", "The disk is full.", "Make room."))
    with pytest.raises(Failed, match="both was not published: The disk is full"):
        run._published([queue.job(form.id)], output)
