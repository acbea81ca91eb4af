"""A job and the facts about it.

    accepted -> QUEUED -> MERGING -> EVALUATING -> PUBLISHING -> PUBLISHED
                  ^          |            |             |
                  +-- transient fault, attempts left ---+      otherwise -> FAILED
    QUEUED | MERGING | EVALUATING -- cancel -> CANCELLED

Facts (Merge, Evaluation, Publication, Failure) are recorded when they happen and never changed. Nobody sets a status:
`stage` derives it from the facts and the lease, and nothing else does.
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
from evaluators.vitals import Vitals


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
    """A model pinned to a commit; `bytes` of weights; `licence` as its card at that commit says.

    An `adapter` is no model by itself: it is merged and named, and cannot be evaluated.
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
    """Fact 2: the files of `manifest` were measured; `sources` holds the same suite for `repo@revision`.

    `comparison` judges the merge against its sources; where there is none, `not_compared` may say why. `vitals` are by
    `repo@revision`, too, "" is the merge. Facts from before these were taken have none of them.
    """

    manifest: str
    merged: ModelEvaluation | None
    sources: Mapping[str, ModelEvaluation]
    decode_speed: Mapping[str, Any] | None
    seconds: float
    heads: Mapping[str, PublishedFile] = field(default_factory=dict)  # what the repo carries besides the weights
    comparison: Comparison | None = None
    not_compared: str = ""
    vitals: Mapping[str, Vitals] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Publication:
    """Fact 3: the files stand in `repo` at `commit`."""

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
    """Proof that its holder, and nobody else, may record facts about a job. `token` changes with every claim."""

    job_id: str
    owner: str
    token: str
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Progress:
    """What the running stage says of itself: for people to look at, never for decisions."""

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
    """Where the job stands, from its facts alone."""
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
