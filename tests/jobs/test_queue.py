"""The queue's promises: nothing accepted is lost, no work is done twice, a late process has no effect."""

from __future__ import annotations

import multiprocessing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bot.errors import Failed, Refused
from bot.jobs.job import Evaluation, Failure, Job, Merge, Progress, Publication, Source, Stage, stage
from bot.jobs.queue import Queue
from bot.jobs.request import EvaluateOptions, MergeRequest, Origin, from_form

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SOURCES = (Source("org/a", "a" * 40, "mit", 10), Source("org/b", "b" * 40, "apache-2.0", 10))
MERGE = Merge({}, "m" * 64, 1, 1.0, 7)
EVALUATION = Evaluation("m" * 64, None, {}, None, 1.0)


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    return Queue(f"sqlite:///{tmp_path}/jobs.db", lease_s=100, attempts=3, limit=50)


def ask(queue: Queue, name: str = "x", requester: str = "alice", at: datetime = NOW, digest: str | None = None) -> Job:
    request = from_form(requester, f"recipe of {name}", name, EvaluateOptions())
    return queue.submit(
        request, digest=digest or name * 8, recipe="{}", sources=SOURCES, plan={"method": "linear"}, now=at
    )


def test_the_same_request_twice_is_one_job(queue: Queue) -> None:
    assert ask(queue).id == ask(queue).id
    assert len(queue.jobs()) == 1


def test_two_requests_for_the_same_work_share_one_job(queue: Queue) -> None:
    first, second = ask(queue, requester="alice", digest="d" * 64), ask(queue, requester="bob", digest="d" * 64)
    assert first.id == second.id
    assert second.request.requester == "alice"


def test_work_that_failed_is_done_anew_when_asked_again(queue: Queue) -> None:
    first = ask(queue, requester="alice", digest="d" * 64)
    lease = queue.claim("w", NOW)
    assert lease is not None
    queue.record(lease, Failure(Stage.MERGING, "DISK_FULL", "full.", "wait."), NOW)
    second = ask(queue, requester="bob", digest="d" * 64)
    assert second.id != first.id


def test_a_job_survives_a_new_connection_with_every_fact(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path}/jobs.db"
    job = ask(Queue(address))
    lease = Queue(address).claim("w")
    assert lease is not None
    Queue(address).record(lease, MERGE)
    again = Queue(address).job(job.id)
    assert again.merge == MERGE
    assert again.sources == SOURCES
    assert again.request.text == "recipe of x"


def test_facts_alone_decide_the_stage(queue: Queue) -> None:
    job = ask(queue)
    seen = [stage(queue.job(job.id), NOW)]
    lease = queue.claim("w", NOW)
    assert lease is not None
    for fact in (None, MERGE, EVALUATION, Publication("bot/x", "c" * 40, 1.0)):
        if fact is not None:
            queue.record(lease, fact, NOW)
        seen.append(stage(queue.job(job.id), NOW))
    assert seen == [Stage.QUEUED, Stage.MERGING, Stage.EVALUATING, Stage.PUBLISHING, Stage.PUBLISHED]


def test_people_take_turns(queue: Queue) -> None:
    for number in range(3):
        ask(queue, f"a{number}", "alice", NOW + timedelta(seconds=number))
    ask(queue, "b0", "bob", NOW + timedelta(seconds=10))
    order = []
    while lease := queue.claim("w", NOW + timedelta(seconds=20)):
        order.append(queue.job(lease.job_id).request.name)
        queue.record(lease, Failure(Stage.MERGING, "DISK_FULL", "full.", "wait."), NOW)
    assert order == ["a0", "b0", "a1", "a2"]


def test_a_claimed_job_is_not_claimed_again_before_its_lease_ends(queue: Queue) -> None:
    ask(queue)
    assert queue.claim("first", NOW) is not None
    assert queue.claim("second", NOW + timedelta(seconds=99)) is None
    assert queue.claim("second", NOW + timedelta(seconds=101)) is not None


def test_a_process_that_wakes_up_late_has_no_effect(queue: Queue) -> None:
    job = ask(queue)
    late = queue.claim("late", NOW)
    assert late is not None
    queue.claim("next", NOW + timedelta(seconds=200))
    for deed in (lambda: queue.record(late, MERGE), lambda: queue.renew(late), lambda: queue.begin_commit(late)):
        with pytest.raises(Failed, match="claimed by another"):
            deed()
    assert queue.job(job.id).merge is None


def test_a_renewed_lease_outlives_its_first_end_and_shows_progress(queue: Queue) -> None:
    job = ask(queue)
    lease = queue.claim("w", NOW)
    assert lease is not None
    queue.renew(lease, Progress("Merging", 3, 10), NOW + timedelta(seconds=90))
    assert queue.claim("other", NOW + timedelta(seconds=150)) is None
    assert queue.job(job.id).progress == Progress("Merging", 3, 10)


def test_a_fact_is_recorded_once(queue: Queue) -> None:
    ask(queue)
    lease = queue.claim("w", NOW)
    assert lease is not None
    queue.record(lease, MERGE)
    with pytest.raises(Exception, match="UNIQUE"):
        queue.record(lease, MERGE)


def test_a_transient_failure_waits_and_is_tried_again_while_attempts_are_left(queue: Queue) -> None:
    job = ask(queue)
    for attempt in range(3):
        at = NOW + timedelta(hours=attempt)
        lease = queue.claim("w", at)
        assert lease is not None
        later = at + timedelta(minutes=5)
        queue.record(lease, Failure(Stage.MERGING, "HUB_UNAVAILABLE", "away.", "wait.", later), at)
        assert queue.claim("w", at + timedelta(minutes=4)) is None
    assert queue.claim("w", NOW + timedelta(days=1)) is None
    assert stage(queue.job(job.id), NOW) is Stage.QUEUED
    assert len(queue.job(job.id).failures) == 3


def test_a_worker_that_dies_three_times_ends_the_job_with_a_reason(queue: Queue) -> None:
    job = ask(queue)
    for attempt in range(3):
        assert queue.claim("w", NOW + timedelta(hours=attempt)) is not None
    assert queue.sweep(NOW + timedelta(hours=9)) == 1
    ended = queue.job(job.id)
    assert stage(ended, NOW) is Stage.FAILED
    assert ended.failures[-1].code == "WORKER_DIED"
    assert ended.ended_at is not None


def test_cancel_stops_the_holder_and_is_for_the_owner_only(queue: Queue) -> None:
    job = ask(queue)
    lease = queue.claim("w", NOW)
    assert lease is not None
    with pytest.raises(Refused, match="belongs to alice"):
        queue.cancel(job.id, "mallory")
    assert stage(queue.cancel(job.id, "alice"), NOW) is Stage.CANCELLED
    with pytest.raises(Failed, match="cancelled by its owner"):
        queue.renew(lease)
    assert queue.claim("w", NOW + timedelta(hours=1)) is None


def test_after_the_commit_has_begun_a_cancel_comes_too_late(queue: Queue) -> None:
    job = ask(queue)
    lease = queue.claim("w", NOW)
    assert lease is not None
    queue.begin_commit(lease)
    with pytest.raises(Refused, match="can no longer be cancelled"):
        queue.cancel(job.id, "alice")
    queue.record(lease, Publication("bot/x", "c" * 40, 1.0), NOW)
    assert stage(queue.job(job.id), NOW) is Stage.PUBLISHED


def test_a_full_queue_refuses_and_keeps_what_it_has(tmp_path: Path) -> None:
    queue = Queue(f"sqlite:///{tmp_path}/jobs.db", limit=2)
    ask(queue, "a")
    ask(queue, "b")
    with pytest.raises(Refused, match="its limit"):
        ask(queue, "c")
    assert len(queue.jobs()) == 2


def test_a_refused_card_is_answered_once(queue: Queue) -> None:
    request = MergeRequest("alice", Origin.CARD, "?", "x", repo="alice/x", revision="a" * 40, reply="discussion")
    for _ in range(2):
        queue.refuse(request, Refused("CARD_INVALID", "no.", "mend it."))
    [(again, job, refusal)] = queue.unanswered()
    assert (again, job) == (request, None)
    assert refusal is not None and refusal["code"] == "CARD_INVALID"
    queue.answered(request.key, "refused")
    assert queue.unanswered() == []


def test_one_leader_at_a_time(queue: Queue) -> None:
    assert queue.lead("poll", "a", 30, NOW)
    assert not queue.lead("poll", "b", 30, NOW + timedelta(seconds=29))
    assert queue.lead("poll", "a", 30, NOW + timedelta(seconds=29))
    assert queue.lead("poll", "b", 30, NOW + timedelta(seconds=60))


def _drain(address: str, results: multiprocessing.Queue[list[str]]) -> None:
    queue, done = Queue(address), []
    while lease := queue.claim("w"):
        queue.record(lease, MERGE)
        queue.record(lease, EVALUATION)
        queue.record(lease, Publication(f"bot/{lease.job_id}", "c" * 40, 0.0))
        done.append(lease.job_id)
    results.put(done)


def test_two_processes_drain_the_queue_and_no_job_is_done_twice(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path}/jobs.db"
    queue = Queue(address)
    wanted = {ask(queue, f"n{number}", f"p{number % 7}").id for number in range(40)}
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[list[str]] = context.Queue()
    workers = [context.Process(target=_drain, args=(address, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    done = [job for _ in workers for job in results.get(timeout=60)]
    for worker in workers:
        worker.join()
    assert sorted(done) == sorted(wanted)
    assert len(queue.published()) == 40


def test_a_passing_fault_after_the_commit_has_begun_leaves_no_room_for_a_cancel_or_a_failure(queue: Queue) -> None:
    job = ask(queue)
    for attempt in range(5):
        at = NOW + timedelta(hours=attempt)
        lease = queue.claim("w", at)
        assert lease is not None, "what may stand on the Hub is finished, however many attempts it takes"
        queue.begin_commit(lease)
        queue.record(lease, Failure(Stage.PUBLISHING, "HUB_UNAVAILABLE", "away.", "wait.", at), at)
        with pytest.raises(Refused, match="can no longer be cancelled"):
            queue.cancel(job.id, "alice")
        assert queue.sweep(at + timedelta(minutes=30)) == 0
    lease = queue.claim("w", NOW + timedelta(days=1))
    assert lease is not None
    queue.record(lease, Publication("bot/x", "c" * 40, 1.0), NOW)
    assert stage(queue.job(job.id), NOW) is Stage.PUBLISHED


def test_waiting_for_the_operator_uses_up_no_attempt(queue: Queue) -> None:
    job = ask(queue)
    for attempt in range(5):
        lease = queue.claim("w", NOW + timedelta(hours=attempt))
        assert lease is not None
        at = NOW + timedelta(hours=attempt, minutes=10)
        queue.record(lease, Failure(Stage.PUBLISHING, "PUBLISHING_PAUSED", "token.", "renew.", at), NOW)
    assert queue.job(job.id).attempts == 0


def test_a_job_stranded_by_a_lower_limit_ends_with_a_reason(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path}/jobs.db"
    queue = Queue(address, attempts=3)
    job = ask(queue)
    lease = queue.claim("w", NOW)
    assert lease is not None
    queue.record(lease, Failure(Stage.MERGING, "HUB_UNAVAILABLE", "away.", "wait.", NOW), NOW)
    strict = Queue(address, attempts=1)
    assert strict.sweep(NOW) == 1
    assert stage(strict.job(job.id), NOW) is Stage.FAILED
