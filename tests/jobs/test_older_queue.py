"""A database and settings of the build 528d73e still work.

`queue_of_528d73e.sql` is the SQL dump of a database that this build wrote: a job of each kind and a refused request.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bot.jobs.job import Job, Publication, Stage, missing, stage
from bot.jobs.queue import Queue
from bot.jobs.request import EvaluateOptions, Origin, from_form
from bot.settings import Settings

WRITTEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
NOW = WRITTEN + timedelta(hours=1)
# The settings of 528d73e. `webhook_secret` had no effect there and is ignored.
OLD_SETTINGS = [
    "attempts",
    "database",
    "device",
    "disk_limit_bytes",
    "evaluate_timeout_s",
    "examples",
    "first_stage",
    "first_stage_error",
    "first_stage_margin",
    "home",
    "hub",
    "lease_s",
    "memory_limit_bytes",
    "merge_timeout_s",
    "namespace",
    "open_requests_per_person",
    "poll_s",
    "public",
    "publish_timeout_s",
    "publish_token_file",
    "queue_limit",
    "requests_per_person_and_day",
    "schedule",
    "slots",
    "speed_budget_s",
    "speed_new_tokens",
    "speed_questions",
    "suite",
    "tick_s",
]


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    dump = Path(__file__).with_name("queue_of_528d73e.sql").read_text(encoding="utf-8")
    with closing(sqlite3.connect(tmp_path / "jobs.db")) as connection:
        connection.executescript(dump)
    return Queue(f"sqlite:///{tmp_path}/jobs.db", lease_s=100, attempts=3, limit=50)


def by_name(queue: Queue) -> dict[str, Job]:
    return {job.request.name: job for job in queue.jobs()}


def test_every_job_is_listed_in_its_stage(queue: Queue) -> None:
    assert {name: stage(job, NOW) for name, job in by_name(queue).items()} == {
        "published": Stage.PUBLISHED,
        "failed": Stage.FAILED,
        "cancelled": Stage.CANCELLED,
        "evaluated": Stage.QUEUED,
        "merging": Stage.QUEUED,
        "queued": Stage.QUEUED,
    }
    assert stage(by_name(queue)["merging"], WRITTEN + timedelta(seconds=60)) == Stage.MERGING


def test_every_fact_is_read(queue: Queue) -> None:
    [job] = queue.published()
    assert job.publication == Publication("bot/published", "1" * 40, 1.0)
    assert job.merge is not None and job.merge.files["model.safetensors"].bytes == 10
    found = job.evaluation
    assert found is not None and found.merged is not None and found.comparison is not None
    assert found.merged.scores[0].normalised == pytest.approx(2 / 3)
    assert found.sources[f"org/a@{'a' * 40}"].average == pytest.approx(1 / 3)
    assert found.comparison.tasks[0].differences[0].parent == "org/a"
    assert found.vitals[""].bits_per_byte == 1.2
    assert found.heads["medusa/heads.safetensors"].bytes == 5
    assert by_name(queue)["failed"].failures[0].code == "DISK_FULL"
    assert by_name(queue)["merging"].request.evaluate == EvaluateOptions("none", ("arc_easy",), 4, True, "medusa")


def test_open_jobs_are_continued_at_their_first_missing_fact(queue: Queue) -> None:
    continued = {}
    while lease := queue.claim("w", NOW):
        job = queue.job(lease.job_id)
        continued[job.request.name] = missing(job)
        if job.request.name == "evaluated":
            queue.begin_commit(lease)
            queue.record(lease, Publication("bot/evaluated", "2" * 40, 1.0), NOW)
    assert continued == {"evaluated": Stage.PUBLISHING, "merging": Stage.MERGING, "queued": Stage.MERGING}
    assert [job.request.name for job in queue.published()] == ["published", "evaluated"]


def test_a_request_made_again_finds_its_job_and_a_refusal_its_reply(queue: Queue) -> None:
    again = from_form("dave", "recipe of queued", "queued", EvaluateOptions())
    known = queue.known(again.key)
    assert isinstance(known, Job) and known.id == by_name(queue)["queued"].id
    [(request, job, refusal)] = queue.unanswered()
    assert (request.origin, request.repo, job) == (Origin.CARD, "org/card", None)
    assert refusal is not None and refusal["code"] == "CARD_INVALID"


def test_older_environment_variables_still_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(OLD_SETTINGS) <= set(Settings.model_fields)
    monkeypatch.setenv("MERGEBOT_SLOTS", "3")
    monkeypatch.setenv("MERGEBOT_FIRST_STAGE", "40")
    monkeypatch.setenv("MERGEBOT_WEBHOOK_SECRET", "unused")
    settings = Settings()
    assert (settings.slots, settings.first_stage) == (3, 40)
