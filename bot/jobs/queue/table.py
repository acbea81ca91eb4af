"""Submit, claim under a lease, record facts, cancel. See `schema` for the tables and the rules."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.errors import MergebotError, Refused
from bot.jobs.job import ENDED, Fact, Failure, Job, Lease, Progress, Publication, Source, Stage, missing, stage
from bot.jobs.queue.rows import REQUEST, SOURCES, insert_fact, insert_request, read_job, seconds, time, update_held
from bot.jobs.queue.schema import FACTS, JOBS, LEADERS, REQUESTS, connect
from bot.jobs.request import MergeRequest

# A job nobody holds.
NO_LEASE = {"lease_owner": None, "lease_token": None, "lease_expires_at": None}
# Faults that are the operator's to mend: waiting for him uses up no attempt.
UNCOUNTED = frozenset({"PUBLISHING_PAUSED"})


class Queue:
    """The table behind `url` (an SQLAlchemy address). Safe to share between threads and processes."""

    def __init__(self, url: str, *, lease_s: float = 120.0, attempts: int = 3, limit: int = 1000) -> None:
        self.lease_s = lease_s
        self.attempts = attempts
        self.limit = limit
        self._reading, self._writing = connect(url)

    # -- requests ------------------------------------------------------------------------------------------------

    def known(self, key: str) -> Job | Mapping[str, Any] | None:
        """Result of an earlier request with this key: its job, its refusal (as_dict), or None for a new key."""
        with self._reading.connect() as connection:
            row = connection.execute(sa.select(REQUESTS).where(REQUESTS.c.key == key)).mappings().first()
        if row is None:
            return None
        return self.job(row["job_id"]) if row["job_id"] else json.loads(row["refusal"])

    def submit(
        self,
        request: MergeRequest,
        *,
        digest: str,
        recipe: str,
        sources: tuple[Source, ...],
        plan: Mapping[str, Any],
        now: datetime | None = None,
    ) -> Job:
        """Accept `request` and return the job that does the work: an existing one for the same work.

        A repeated request counts once. Failed and cancelled work is not reused: the same request then runs again.
        Raises Refused QUEUE_FULL.
        """
        at = seconds(now)
        with self._writing.begin() as connection:
            earlier = connection.execute(sa.select(REQUESTS.c.job_id).where(REQUESTS.c.key == request.key)).scalar()
            if earlier is not None:
                return read_job(connection, earlier)
            job_id = self._live_job(connection, digest, at)
            if job_id is None:
                waiting = connection.execute(sa.select(sa.func.count()).where(JOBS.c.ended_at.is_(None))).scalar_one()
                if waiting >= self.limit:
                    raise Refused("QUEUE_FULL", f"The queue holds {waiting} jobs, its limit.", "Try again in an hour.")
                job_id = secrets.token_hex(6)
                connection.execute(
                    sa.insert(JOBS).values(
                        id=job_id,
                        digest=digest,
                        requester=request.requester,
                        request_key=request.key,
                        recipe=recipe,
                        sources=SOURCES.dump_json(sources).decode(),
                        plan=json.dumps(plan),
                        submitted_at=at,
                        attempts=0,
                        committing=False,
                    )
                )
            insert_request(connection, request, at, job_id=job_id, refusal=None)
            return read_job(connection, job_id)

    def refuse(self, request: MergeRequest, refusal: MergebotError, now: datetime | None = None) -> None:
        """Record the refusal of `request`, so that it is answered once and not checked again."""
        if self.known(request.key) is not None:
            return
        with self._writing.begin() as connection:
            insert_request(connection, request, seconds(now), job_id=None, refusal=refusal.as_dict())

    def requests_since(self, requester: str, since: datetime) -> int:
        """Number of accepted requests of this user since then."""
        query = sa.select(sa.func.count()).where(
            REQUESTS.c.requester == requester, REQUESTS.c.received_at >= seconds(since), REQUESTS.c.job_id.is_not(None)
        )
        with self._reading.connect() as connection:
            return int(connection.execute(query).scalar_one())

    def open_jobs(self, requester: str) -> int:
        """Number of jobs of this user that have not ended."""
        query = sa.select(sa.func.count()).where(JOBS.c.requester == requester, JOBS.c.ended_at.is_(None))
        with self._reading.connect() as connection:
            return int(connection.execute(query).scalar_one())

    def unanswered(self) -> list[tuple[MergeRequest, Job | None, Mapping[str, Any] | None]]:
        """Requests by card that have ended (published, failed, cancelled, refused) and await their reply."""
        query = (
            sa.select(REQUESTS)
            .outerjoin(JOBS, REQUESTS.c.job_id == JOBS.c.id)
            .where(REQUESTS.c.answered.is_(None), sa.or_(REQUESTS.c.job_id.is_(None), JOBS.c.ended_at.is_not(None)))
        )
        with self._reading.connect() as connection:
            rows = connection.execute(query).mappings().all()
            found = []
            for row in rows:
                job = read_job(connection, row["job_id"]) if row["job_id"] else None
                refusal = json.loads(row["refusal"]) if row["refusal"] else None
                found.append((REQUEST.validate_json(row["request"]), job, refusal))
        return found

    def answered(self, key: str, event: str) -> None:
        """Record that the author of request `key` received the reply for `event`."""
        with self._writing.begin() as connection:
            connection.execute(sa.update(REQUESTS).where(REQUESTS.c.key == key).values(answered=event))

    # -- work ----------------------------------------------------------------------------------------------------

    def claim(self, owner: str, now: datetime | None = None) -> Lease | None:
        """Claim the next job: of the user served longest ago, in the order of submission. None if no job waits."""
        at = seconds(now)
        served = sa.select(JOBS.c.requester, sa.func.max(JOBS.c.claimed_at).label("at")).group_by(JOBS.c.requester)
        last = served.subquery()
        candidate = (
            sa.select(JOBS.c.id)
            .join(last, last.c.requester == JOBS.c.requester)
            .where(
                JOBS.c.ended_at.is_(None),
                sa.or_(JOBS.c.lease_expires_at.is_(None), JOBS.c.lease_expires_at <= at),
                sa.or_(JOBS.c.not_before.is_(None), JOBS.c.not_before <= at),
                sa.or_(JOBS.c.attempts < self.attempts, JOBS.c.committing.is_(True)),
            )
            .order_by(sa.func.coalesce(last.c.at, 0.0), JOBS.c.submitted_at, JOBS.c.id)
            .limit(1)
        )
        with self._writing.begin() as connection:
            job_id = connection.execute(candidate).scalar()
            if job_id is None:
                return None
            token, expires = secrets.token_hex(16), at + self.lease_s
            # Two schedulers on Postgres may read the same candidate: the second update finds the lease taken.
            taken = connection.execute(
                sa.update(JOBS)
                .where(
                    JOBS.c.id == job_id,
                    JOBS.c.ended_at.is_(None),
                    sa.or_(JOBS.c.lease_expires_at.is_(None), JOBS.c.lease_expires_at <= at),
                )
                .values(
                    lease_owner=owner,
                    lease_token=token,
                    lease_expires_at=expires,
                    attempts=JOBS.c.attempts + 1,
                    claimed_at=at,
                    not_before=None,
                    progress=None,
                )
            )
            return Lease(job_id, owner, token, time(expires)) if taken.rowcount else None

    def renew(self, lease: Lease, progress: Progress | None = None, now: datetime | None = None) -> Lease:
        """The holder lives: extend the lease and show `progress`. Raises Failed LEASE_LOST or CANCELLED."""
        expires = seconds(now) + self.lease_s
        values: dict[str, Any] = {"lease_expires_at": expires}
        if progress is not None:
            values["progress"] = json.dumps(asdict(progress))
        with self._writing.begin() as connection:
            update_held(connection, lease, values)
        return Lease(lease.job_id, lease.owner, lease.token, time(expires))

    def record(self, lease: Lease, fact: Fact, now: datetime | None = None) -> None:
        """Insert a fact under `lease`. A Failure also gives the lease back. Raises Failed LEASE_LOST."""
        at = seconds(now)
        values: dict[str, Any] = {"progress": None}
        if isinstance(fact, Failure):
            values |= NO_LEASE
            values |= {"not_before": seconds(fact.retry_at)} if fact.retry_at else {"ended_at": at}
            if fact.retry_at and fact.code in UNCOUNTED:
                values["attempts"] = JOBS.c.attempts - 1
        if isinstance(fact, Publication):
            values |= {**NO_LEASE, "ended_at": at}
        with self._writing.begin() as connection:
            update_held(connection, lease, values)
            insert_fact(connection, lease.job_id, fact, at)

    def release(self, lease: Lease) -> None:
        """Give the job back unfinished (the scheduler is stopping); the attempt does not count."""
        with self._writing.begin() as connection:
            connection.execute(
                sa.update(JOBS)
                .where(JOBS.c.id == lease.job_id, JOBS.c.lease_token == lease.token)
                .values(**NO_LEASE, attempts=JOBS.c.attempts - 1)
            )

    def begin_commit(self, lease: Lease) -> None:
        """Mark the point of no return before the commit. Raises Failed LEASE_LOST, CANCELLED.

        From here on a cancel is refused and transient errors are retried without using up attempts: the commit may
        already be on the Hub and has to be finished.
        """
        with self._writing.begin() as connection:
            update_held(connection, lease, {"committing": True})

    def cancel(self, job_id: str, by: str, now: datetime | None = None) -> Job:
        """Cancel a job for its owner. Raises Refused JOB_NOT_FOUND, NOT_YOURS, or CANCELLED when it is too late."""
        at = seconds(now)
        with self._writing.begin() as connection:
            job = read_job(connection, job_id)
            if job.request.requester != by:
                raise Refused("NOT_YOURS", f"Job {job_id} belongs to {job.request.requester}.", "Cancel your own jobs.")
            done = connection.execute(
                sa.update(JOBS)
                .where(JOBS.c.id == job_id, JOBS.c.ended_at.is_(None), JOBS.c.committing.is_(False))
                .values(**NO_LEASE, cancelled_at=at, ended_at=at)
            )
            if not done.rowcount:
                where = stage(job, time(at)).value
                raise Refused("CANCELLED", f"Job {job_id} is already {where}.", "It can no longer be cancelled.")
            return read_job(connection, job_id)

    def sweep(self, now: datetime | None = None) -> int:
        """Fail the jobs whose last attempt ended without a record; returns their number."""
        at = seconds(now)
        dead = sa.select(JOBS.c.id).where(
            JOBS.c.ended_at.is_(None),
            JOBS.c.attempts >= self.attempts,
            JOBS.c.committing.is_(False),
            sa.or_(JOBS.c.lease_expires_at.is_(None), JOBS.c.lease_expires_at <= at),
        )
        with self._writing.begin() as connection:
            ids = connection.execute(dead).scalars().all()
            for job_id in ids:
                lacking = read_job(connection, job_id)
                failure = Failure(
                    missing(lacking),
                    "WORKER_DIED",
                    f"The worker of job {job_id} died {self.attempts} times without a reason.",
                    "Ask for the merge again; if it happens again, tell the operator.",
                )
                insert_fact(connection, job_id, failure, at)
                connection.execute(sa.update(JOBS).where(JOBS.c.id == job_id).values(**NO_LEASE, ended_at=at))
        return len(ids)

    def lead(self, name: str, owner: str, for_s: float, now: datetime | None = None) -> bool:
        """Become or stay the one `owner` of `name` for `for_s` seconds; False while another holds it."""
        at = seconds(now)
        with self._writing.begin() as connection:
            row = connection.execute(sa.select(LEADERS).where(LEADERS.c.name == name)).mappings().first()
            if row is None:
                connection.execute(sa.insert(LEADERS).values(name=name, owner=owner, expires_at=at + for_s))
                return True
            if row["owner"] != owner and row["expires_at"] > at:
                return False
            connection.execute(
                sa.update(LEADERS).where(LEADERS.c.name == name).values(owner=owner, expires_at=at + for_s)
            )
            return True

    # -- looking -------------------------------------------------------------------------------------------------

    def job(self, job_id: str) -> Job:
        """The job, whole. Raises Refused JOB_NOT_FOUND."""
        with self._reading.connect() as connection:
            return read_job(connection, job_id)

    def jobs(self, *, requester: str | None = None, limit: int = 100) -> list[Job]:
        """The newest jobs first."""
        query = sa.select(JOBS.c.id).order_by(JOBS.c.submitted_at.desc(), JOBS.c.id).limit(limit)
        if requester is not None:
            query = query.where(JOBS.c.requester == requester)
        return self._all(query)

    def published(self) -> list[Job]:
        """All published jobs, oldest first."""
        query = (
            sa.select(JOBS.c.id)
            .join(FACTS, sa.and_(FACTS.c.job_id == JOBS.c.id, FACTS.c.kind == "publication"))
            .order_by(FACTS.c.recorded_at, JOBS.c.id)
        )
        return self._all(query)

    def count_published(self) -> int:
        """Number of published jobs, a cheap query."""
        query = sa.select(sa.func.count()).select_from(FACTS).where(FACTS.c.kind == "publication")
        with self._reading.connect() as connection:
            return int(connection.execute(query).scalar_one())

    def position(self, job_id: str) -> int:
        """Number of open jobs submitted before this one."""
        with self._reading.connect() as connection:
            at = connection.execute(sa.select(JOBS.c.submitted_at).where(JOBS.c.id == job_id)).scalar_one()
            query = sa.select(sa.func.count()).where(JOBS.c.ended_at.is_(None), JOBS.c.submitted_at < at)
            return int(connection.execute(query).scalar_one())

    def unfinished(self) -> set[str]:
        """Ids of the jobs that have not ended; only their scratch folders are kept."""
        with self._reading.connect() as connection:
            return set(connection.execute(sa.select(JOBS.c.id).where(JOBS.c.ended_at.is_(None))).scalars())

    def _all(self, query: sa.Select[Any]) -> list[Job]:
        with self._reading.connect() as connection:
            return [read_job(connection, job_id) for job_id in connection.execute(query).scalars()]

    def _live_job(self, connection: Connection, digest: str, at: float) -> str | None:
        query = sa.select(JOBS.c.id).where(JOBS.c.digest == digest).order_by(JOBS.c.submitted_at.desc())
        for job_id in connection.execute(query).scalars():
            if stage(read_job(connection, job_id), time(at)) not in ENDED - {Stage.PUBLISHED}:
                return str(job_id)
        return None
