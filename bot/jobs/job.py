"""A job and the facts about it.

    accepted -> QUEUED -> MERGING -> EVALUATING -> PUBLISHING -> PUBLISHED
                  ^          |            |             |
                  +-- transient fault, attempts left ---+      otherwise -> FAILED
    QUEUED | MERGING | EVALUATING -- cancel -> CANCELLED

Facts (Merge, Evaluation, Publication, Failure) are recorded when they happen and never changed. The status is not
stored: `stage` derives it from the facts and the lease.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from bot.jobs.request import MergeRequest
from evaluators.comparison.verdict import Comparison
from evaluators.harness.scores import ModelEvaluation
from evaluators.sanity_check import SanityCheck


class Stage(StrEnum):
    QUEUED = "queued"
    MERGING = "merging"
    EVALUATING = "evaluating"
    PUBLISHING = "publishing"
    PUBLISHED = "published"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = frozenset({Stage.PUBLISHED, Stage.FAILED, Stage.CANCELLED})


@dataclass(frozen=True, slots=True)
class Source:
    """A model pinned to a commit, with the bytes of its weights and the license of its card at that commit.

    An `adapter` is merged and named like a model, but cannot be evaluated alone.
    """

    repo: str
    revision: str
    licence: str | None
    bytes: int
    adapter: bool = False

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}"


@dataclass(frozen=True, slots=True)
class PublishedFile:
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Merge:
    """Fact 1: the weights exist. `manifest` is the sha256 of the manifest that lists `files`."""

    files: Mapping[str, PublishedFile]
    manifest: str
    bytes: int
    seconds: float
    parameters: int
    notices: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Fact 2: measurements of the files of `manifest`; `sources` holds those of each source by `repo@revision`.

    `comparison` compares the merge with its sources; without one, `not_compared` may give the reason. `vitals` holds
    the sanity checks by `repo@revision`, with "" for the merge. Facts recorded by older versions lack these fields.
    """

    manifest: str
    merged: ModelEvaluation | None
    sources: Mapping[str, ModelEvaluation]
    decode_speed: Mapping[str, Any] | None
    seconds: float
    heads: Mapping[str, PublishedFile] = field(default_factory=dict)  # what the repo carries besides the weights
    comparison: Comparison | None = None
    not_compared: str = ""
    vitals: Mapping[str, SanityCheck] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Publication:
    """Fact 3: the files are in `repo` at `commit`."""

    repo: str
    commit: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Failure:
    """One attempt ended badly in `stage`; final unless `retry_at` is set."""

    stage: Stage
    code: str
    sentence: str
    next_step: str
    retry_at: datetime | None = None


Fact = Merge | Evaluation | Publication | Failure


@dataclass(frozen=True, slots=True)
class Lease:
    """Proof that its holder alone may record facts about a job. `token` changes with every claim."""

    job_id: str
    owner: str
    token: str
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of the running stage, for display only."""

    text: str
    done: float
    total: float


@dataclass(frozen=True, slots=True)
class Job:
    """One piece of work; several requests with the same digest share it."""

    id: str
    digest: str
    request: MergeRequest
    recipe: str  # canonical JSON, sources pinned
    sources: tuple[Source, ...]
    plan: Mapping[str, Any]
    submitted_at: datetime
    attempts: int = 0
    committing: bool = False  # the one commit may already stand on the Hub
    lease: Lease | None = None
    merge: Merge | None = None
    evaluation: Evaluation | None = None
    publication: Publication | None = None
    failures: tuple[Failure, ...] = ()
    cancelled_at: datetime | None = None
    ended_at: datetime | None = None
    progress: Progress | None = None


def stage(job: Job, now: datetime) -> Stage:
    """Stage of a job, derived from its facts and its lease."""
    if job.publication is not None:
        return Stage.PUBLISHED
    if job.cancelled_at is not None:
        return Stage.CANCELLED
    if job.failures and job.failures[-1].retry_at is None:
        return Stage.FAILED
    if job.lease is None or job.lease.expires_at <= now:
        return Stage.QUEUED
    return missing(job)


def missing(job: Job) -> Stage:
    """The first fact the job still lacks, as the stage that produces it."""
    if job.merge is None:
        return Stage.MERGING
    if job.evaluation is None:
        return Stage.EVALUATING
    if job.publication is None:
        return Stage.PUBLISHING
    return Stage.PUBLISHED
