"""The tables behind the queue.

    requests   key | requester received_at request | job_id or refusal | answered
    jobs       id | digest requester request_key recipe sources plan submitted_at | attempts claimed_at not_before |
               lease_owner lease_token lease_expires_at | cancelled_at committing progress ended_at
    facts      job_id kind number | body recorded_at      kind: merge evaluation publication (once), failure (many)
    leaders    name | owner expires_at                    of each tick but the claiming one, one scheduler does it

A fact is inserted and never changed. Every write of an attempt carries the lease's token in its WHERE clause, so a
process that wakes up after its job was claimed by another is refused and nothing it does has an effect.

SQLite (one host, local disk) runs in WAL mode with `synchronous=FULL`; several hosts need Postgres by address, where
a claim that another scheduler won updates no row.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

METADATA = sa.MetaData()

REQUESTS = sa.Table(
    "requests",
    METADATA,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("requester", sa.String(96), nullable=False, index=True),
    sa.Column("received_at", sa.Float, nullable=False, index=True),
    sa.Column("request", sa.Text, nullable=False),
    sa.Column("job_id", sa.String(32), sa.ForeignKey("jobs.id"), nullable=True, index=True),
    sa.Column("refusal", sa.Text, nullable=True),
    sa.Column("answered", sa.String(32), nullable=True),
)
JOBS = sa.Table(
    "jobs",
    METADATA,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("digest", sa.String(64), nullable=False, index=True),
    sa.Column("requester", sa.String(96), nullable=False, index=True),
    sa.Column("request_key", sa.String(64), nullable=False),
    sa.Column("recipe", sa.Text, nullable=False),
    sa.Column("sources", sa.Text, nullable=False),
    sa.Column("plan", sa.Text, nullable=False),
    sa.Column("submitted_at", sa.Float, nullable=False, index=True),
    sa.Column("attempts", sa.Integer, nullable=False, default=0),
    sa.Column("claimed_at", sa.Float, nullable=True),
    sa.Column("not_before", sa.Float, nullable=True),
    sa.Column("lease_owner", sa.String(128), nullable=True),
    sa.Column("lease_token", sa.String(32), nullable=True),
    sa.Column("lease_expires_at", sa.Float, nullable=True),
    sa.Column("cancelled_at", sa.Float, nullable=True),
    sa.Column("committing", sa.Boolean, nullable=False, default=False),
    sa.Column("progress", sa.Text, nullable=True),
    sa.Column("ended_at", sa.Float, nullable=True, index=True),
)
FACTS = sa.Table(
    "facts",
    METADATA,
    sa.Column("job_id", sa.String(32), sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("kind", sa.String(16), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, default=0),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("recorded_at", sa.Float, nullable=False),
)
LEADERS = sa.Table(
    "leaders",
    METADATA,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("owner", sa.String(128), nullable=False),
    sa.Column("expires_at", sa.Float, nullable=False),
)


def connect(url: str) -> tuple[sa.Engine, sa.Engine]:
    """Open the database at `url` and make its tables: an engine to read with, and one whose transactions write."""
    engine = sa.create_engine(url, connect_args={"timeout": 30} if url.startswith("sqlite") else {})
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", _configure_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    writing = engine.execution_options(writes=True)
    METADATA.create_all(writing)
    return engine, writing


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves: the driver would start transactions too late
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    # A read that later writes cannot be upgraded while another writes; take the write lock at the start instead.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
