"""Conversion between the rows of `schema` and jobs, requests and facts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from pydantic import TypeAdapter
from sqlalchemy.engine import Connection

from bot.errors import Failed, Refused
from bot.jobs.job import Evaluation, Fact, Failure, Job, Lease, Merge, Progress, Publication, Source
from bot.jobs.queue.schema import FACTS, JOBS, REQUESTS
from bot.jobs.request import MergeRequest

REQUEST = TypeAdapter(MergeRequest)
SOURCES = TypeAdapter(tuple[Source, ...])
PROGRESS = TypeAdapter(Progress)
KINDS: dict[type[Any], str] = {Merge: "merge", Evaluation: "evaluation", Publication: "publication", Failure: "failure"}
ADAPTERS: dict[str, TypeAdapter[Any]] = {kind: TypeAdapter(fact) for fact, kind in KINDS.items()}


def seconds(at: datetime | None) -> float:
    """Unix seconds of `at`, of now without one."""
    return (at or datetime.now(UTC)).timestamp()


def time(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)


def read_job(connection: Connection, job_id: str) -> Job:
    """The job with all its facts. Raises Refused JOB_NOT_FOUND."""
    row = connection.execute(sa.select(JOBS).where(JOBS.c.id == job_id)).mappings().first()
    if row is None:
        raise Refused("JOB_NOT_FOUND", "There is no job with this id.", "See the list of jobs.", value=job_id)
    request = connection.execute(sa.select(REQUESTS.c.request).where(REQUESTS.c.key == row["request_key"])).scalar_one()
    facts = connection.execute(sa.select(FACTS).where(FACTS.c.job_id == job_id).order_by(FACTS.c.number)).mappings()
    found: dict[str, list[Any]] = {kind: [] for kind in ADAPTERS}
    for fact in facts:
        found[fact["kind"]].append(ADAPTERS[fact["kind"]].validate_json(fact["body"]))
    lease = None
    if row["lease_token"] and row["lease_expires_at"] is not None:
        lease = Lease(job_id, row["lease_owner"], row["lease_token"], time(row["lease_expires_at"]))
    return Job(
        id=job_id,
        digest=row["digest"],
        request=REQUEST.validate_json(request),
        recipe=row["recipe"],
        sources=SOURCES.validate_json(row["sources"]),
        plan=json.loads(row["plan"]),
        submitted_at=time(row["submitted_at"]),
        attempts=row["attempts"],
        committing=row["committing"],
        lease=lease,
        merge=next(iter(found["merge"]), None),
        evaluation=next(iter(found["evaluation"]), None),
        publication=next(iter(found["publication"]), None),
        failures=tuple(found["failure"]),
        cancelled_at=None if row["cancelled_at"] is None else time(row["cancelled_at"]),
        ended_at=None if row["ended_at"] is None else time(row["ended_at"]),
        progress=PROGRESS.validate_json(row["progress"]) if row["progress"] else None,
    )


def insert_request(
    connection: Connection, request: MergeRequest, at: float, *, job_id: str | None, refusal: Mapping[str, Any] | None
) -> None:
    connection.execute(
        sa.insert(REQUESTS).values(
            key=request.key,
            requester=request.requester,
            received_at=at,
            request=REQUEST.dump_json(request).decode(),
            job_id=job_id,
            refusal=None if refusal is None else json.dumps(refusal),
            answered=None if request.reply == "discussion" else "none",
        )
    )


def insert_fact(connection: Connection, job_id: str, fact: Fact, at: float) -> None:
    kind = KINDS[type(fact)]
    number = 0
    if kind == "failure":
        counted = sa.select(sa.func.count()).where(FACTS.c.job_id == job_id, FACTS.c.kind == kind)
        number = connection.execute(counted).scalar_one()
    body = ADAPTERS[kind].dump_json(fact).decode()
    connection.execute(sa.insert(FACTS).values(job_id=job_id, kind=kind, number=number, body=body, recorded_at=at))


def update_held(connection: Connection, lease: Lease, values: Mapping[str, Any]) -> None:
    """Update the job while `lease` holds it. Raises Failed CANCELLED or LEASE_LOST and then changes nothing."""
    held = (JOBS.c.id == lease.job_id, JOBS.c.lease_token == lease.token)
    if connection.execute(sa.update(JOBS).where(*held).values(**values)).rowcount:
        return
    cancelled = sa.select(JOBS.c.cancelled_at).where(JOBS.c.id == lease.job_id)
    if connection.execute(cancelled).scalar() is not None:
        raise Failed("CANCELLED", f"Job {lease.job_id} was cancelled by its owner.", "Nothing more happens.")
    raise Failed("LEASE_LOST", f"Job {lease.job_id} was claimed by another worker.", "Stopping without effect.")
