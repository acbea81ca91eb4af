"""Scheduler: polls for tagged repos, runs jobs, sweeps dead leases, updates the board and the replies.

APScheduler only triggers the ticks, in memory; the work is in the queue. One scheduler leads at a time (a leader row).
Jobs are claimed by lease, so two leaders would not run a job twice.

`walk` is the life of a job: it produces and records the first missing fact until none is missing. A restart continues
there.
"""

from __future__ import annotations

import logging
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from apscheduler.schedulers.background import BackgroundScheduler

from bot.errors import Cancelled, Failed, LeaseLost, MergebotError, PublishingPaused, Transient
from bot.hub import Hub
from bot.jobs.job import Evaluation, Failure, Job, Lease, Merge, Progress, Publication, missing
from bot.jobs.queue import Queue, open_queue
from bot.jobs.request import MergeRequest
from bot.jobs.specs import BoardSpec, EvaluateSpec, MergeSpec, PublishSpec, ReplySpec, decode
from bot.publishing import card, leaderboard
from bot.service import intake
from bot.service.executors import Executor
from bot.service.executors.local import LocalExecutor
from bot.settings import Settings, Zone, failpoint

log = logging.getLogger(__name__)
logging.getLogger("apscheduler").setLevel(logging.ERROR)  # a tick that is still at work is no news
Fact = TypeVar("Fact", Merge, Evaluation, Publication)
SEED = 0
RENEW_EVERY_S = 1.0
UNREACHABLE = "unreachable"
JOB_ID = re.compile(r"[0-9a-f]{12}")


class Stopping(Exception):
    """The scheduler is being stopped: running stages end, and their jobs go back into the queue."""


class Scheduler:
    """Runs the bot under `settings`. `start` returns at once; `stop` waits for running stages to be ended."""

    def __init__(self, settings: Settings, *, queue: Queue | None = None, executor: Executor | None = None) -> None:
        self.settings = settings
        self.queue = queue or open_queue(settings)
        self.executor = executor or LocalExecutor(settings)
        self.hub = Hub(settings.hub)
        self.owner = f"{socket.gethostname()}-{id(self):x}"
        self._walkers = ThreadPoolExecutor(settings.slots, thread_name_prefix="walk")
        self._walking: set[str] = set()
        self._stopping = threading.Event()
        self._seen: set[tuple[str, str]] = set()
        self._telling = threading.Lock()
        self._on_board = 0  # unknown after a start, so the board is looked at once
        self._ticks = BackgroundScheduler(
            timezone=UTC, job_defaults={"coalesce": True, "misfire_grace_time": None, "max_instances": 1}
        )

    def start(self) -> None:
        token = self.settings.publish_token_file
        if token is None or not token.is_file():
            where = "MERGEBOT_PUBLISH_TOKEN_FILE is not set" if token is None else f"there is no file {token}"
            log.warning("Nothing can be published: %s. Name a file with a write token there, and start again.", where)
        self._clear_scratch()
        every: tuple[tuple[Callable[[], None], float], ...] = (
            (self.dispatch, self.settings.tick_s),
            (self.poll, self.settings.poll_s),
            (self.tell, self.settings.tick_s * 2),
        )
        for tick, seconds in every:
            self._ticks.add_job(self._guarded(tick), "interval", seconds=seconds, next_run_time=datetime.now(UTC))
        self._ticks.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._ticks.running:
            self._ticks.shutdown(wait=True)
        self._walkers.shutdown(wait=True)

    # -- ticks ---------------------------------------------------------------------------------------------------

    def dispatch(self) -> None:
        """Claim jobs while slots are free; each is walked in a thread that waits for child processes."""
        self.queue.sweep()
        self._clear_scratch()
        while not self._stopping.is_set() and len(self._walking) < self.settings.slots:
            lease = self.queue.claim(self.owner)
            if lease is None:
                return
            failpoint("claim.after_commit")
            self._walking.add(lease.job_id)
            self._walkers.submit(self._walk_and_free, lease)

    def poll(self) -> None:
        """Take the requests of tagged repos. A refusal is remembered, so it is answered once."""
        for repo in intake.changed(self.hub, self.settings, self._seen):
            try:
                intake.take_tagged(repo, self.hub, self.queue, self.settings)
            except Transient as error:
                log.warning("%s waits: %s", repo.repo, error)  # not marked as seen, so the next poll asks again
                continue
            except Exception:  # one stranger's repo must not shut the door for the others
                log.exception("%s could not be looked at", repo.repo)
            self._seen.add((repo.repo, repo.revision))

    def tell(self) -> None:
        """Update the public board and the replies on requesting repos."""
        with self._telling:
            published = self.queue.count_published()
            if published != self._on_board:
                spec = leaderboard.board_spec(self.queue.published(), self.settings)
                self._publisher("board", spec, self.settings.scratch / "_board")
                self._on_board = published
            for request, job, refusal in self.queue.unanswered():
                self._answer(request, job, refusal)

    def _answer(self, request: MergeRequest, job: Job | None, refusal: Mapping[str, Any] | None) -> None:
        """One repo that cannot be answered must not keep the others waiting."""
        spec = card.reply_spec(request, job, refusal, self.settings)
        try:
            self._publisher("reply", spec, self.settings.scratch / "_reply")
        except Transient as error:
            log.warning("the answer to %s waits: %s", request.repo, error)
            return
        except MergebotError as error:
            log.warning("%s cannot be answered: %s", request.repo, error)
            self.queue.answered(request.key, UNREACHABLE)
            return
        self.queue.answered(request.key, spec.event)

    def _guarded(self, tick: Callable[[], None]) -> Callable[[], None]:
        """A tick that only the leading scheduler runs; its failure is logged and repeated at the next tick."""

        def run() -> None:
            name = tick.__name__
            try:
                if name == "dispatch" or self.queue.lead(name, self.owner, for_s=max(30.0, self.settings.poll_s * 2)):
                    tick()
            except MergebotError as error:
                log.warning("%s: %s", name, error)
            except Exception:
                log.exception("%s stopped on a defect", name)

        run.__name__ = tick.__name__
        return run

    # -- the walk ------------------------------------------------------------------------------------------------

    def walk(self, lease: Lease) -> None:
        """Produce and record the missing facts of one job, in order."""
        job = self.queue.job(lease.job_id)
        if not job.merge:
            job = self._record(lease, self._merge(job, lease))
            failpoint("merge.after_fact")
        if not job.evaluation:
            job = self._record(lease, self._evaluate(job, lease))
            failpoint("eval.after_fact")
        if not job.publication:
            job = self._record(lease, self._publish(job, lease))
            failpoint("publish.after_fact")

    def _walk_and_free(self, lease: Lease) -> None:
        try:
            self.walk(lease)
        except Stopping:
            self.queue.release(lease)
        except MergebotError as error:
            self._fail(lease, error)
        except Exception:
            log.exception("job %s stopped on a defect", lease.job_id)
            self._fail(
                lease,
                Failed("INTERNAL", "The job stopped on a defect of mergebot.", "The operator finds it in the log."),
            )
        finally:
            self._walking.discard(lease.job_id)

    def _record(self, lease: Lease, fact: Merge | Evaluation | Publication) -> Job:
        self.queue.record(lease, fact)
        return self.queue.job(lease.job_id)

    def _fail(self, lease: Lease, error: MergebotError) -> None:
        if isinstance(error, LeaseLost | Cancelled):
            log.info("job %s: %s", lease.job_id, error)
            return
        job = self.queue.job(lease.job_id)
        retry_at = None
        # A paused publisher is the operator's affair and fails nobody's job, however often it is met.
        endless = job.committing or isinstance(error, PublishingPaused)
        if isinstance(error, Transient) and (endless or job.attempts < self.settings.attempts):
            retry_at = datetime.now(UTC) + timedelta(seconds=error.retry_after_s)
        failure = Failure(missing(job), error.code, error.message, error.next_step, retry_at)
        try:
            self.queue.record(lease, failure)
        except Failed as lost:
            log.info("job %s: %s", lease.job_id, lost)

    # -- stages --------------------------------------------------------------------------------------------------

    def _merge(self, job: Job, lease: Lease) -> Merge:
        spec = MergeSpec(job.recipe, self._out(job), SEED, job.sources, job.request.evaluate)
        return self._worker("merge", spec, job, lease, self.settings.merge_timeout_s, Merge)

    def _evaluate(self, job: Job, lease: Lease) -> Evaluation:
        assert job.merge is not None
        out, scratch = self._out(job), self._scratch(job)
        spec = EvaluateSpec(out, scratch, job.merge.manifest, job.sources, job.request.evaluate)
        return self._worker("evaluate", spec, job, lease, self.settings.evaluate_timeout_s, Evaluation)

    def _publish(self, job: Job, lease: Lease) -> Publication:
        content = card.publication_content(job, self.settings)
        spec = PublishSpec(lease, self._out(job), self._scratch(job) / "carried", content)
        result = self._run("publish", spec, self._scratch(job), lease, "publisher", self.settings.publish_timeout_s)
        return decode(Publication, result)

    def _worker(
        self, name: str, spec: MergeSpec | EvaluateSpec, job: Job, lease: Lease, timeout_s: float, fact: type[Fact]
    ) -> Fact:
        return decode(fact, self._run(name, spec, self._scratch(job), lease, "worker", timeout_s))

    def _publisher(self, name: str, spec: BoardSpec | ReplySpec, scratch: Path) -> None:
        self._run(name, spec, scratch, None, "publisher", self.settings.publish_timeout_s)

    def _run(self, name: str, spec: Any, scratch: Path, lease: Lease | None, zone: Zone, timeout_s: float) -> Any:
        renewed = 0.0

        def beat(progress: Progress | None) -> None:
            nonlocal renewed
            if self._stopping.is_set():
                raise Stopping
            if lease is not None and time.monotonic() - renewed >= RENEW_EVERY_S:
                self.queue.renew(lease, progress)
                renewed = time.monotonic()

        return self.executor.run(name, spec, scratch, zone=zone, timeout_s=timeout_s, beat=beat)

    # -- scratch -------------------------------------------------------------------------------------------------

    def _scratch(self, job: Job) -> Path:
        return (self.settings.scratch / job.id).resolve()

    def _out(self, job: Job) -> Path:
        return self._scratch(job) / "model"

    def _clear_scratch(self) -> None:
        """Remove the scratch folders of ended jobs; other folders stay."""
        folders = [folder for folder in self.settings.scratch.glob("*") if JOB_ID.fullmatch(folder.name)]
        if not folders:
            return
        keep = self.queue.unfinished() | self._walking
        for folder in folders:
            if folder.name not in keep:
                shutil.rmtree(folder, ignore_errors=True)
