"""The named endpoints, for programs: JSON in, JSON out. Their names and keys are stable.

    /submit       recipe, name, suite, tasks, limit, speed -> {"job": ...}
    /check        recipe                                   -> {"plan": ..., "sources": ..., "licence": ...}
    /jobs         mine                                     -> {"jobs": [...]}
    /job          job_id                                   -> {"job": ...}
    /cancel       job_id                                   -> {"job": ...}
    /leaderboard                                           -> {"rows": [...]}

Where something was refused the answer is {"refused": {code, message, value, where, next, request_id}}.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from typing import Any

import gradio as gr
from pydantic import TypeAdapter

from bot.jobs.job import ENDED, Evaluation, Failure, Job, Source, Stage, stage
from bot.publishing.leaderboard import Row
from bot.service.intake import Checked
from evaluators.harness.scores import ModelEvaluation
from evaluators.medusa.speed.report import Report
from space import login
from space.desk import Desk, Refusal, attempt, now

_SOURCES = TypeAdapter(tuple[Source, ...])
_MODEL = TypeAdapter(ModelEvaluation | None)
_ROWS = TypeAdapter(tuple[Row, ...])


def publish(desk: Desk) -> None:
    """Name the endpoints; to be called inside the Blocks."""

    def submit(
        recipe: str,
        name: str,
        request: gr.Request,
        suite: str = "quick",
        tasks: list[str] = [],  # noqa: B006 - Gradio reads the default into the API's description and never changes it
        limit: int | None = None,
        speed: str = "off",
    ) -> dict[str, Any]:
        """Ask for a merge; `tasks` replaces the suite, `limit` is per task, `speed` is off or medusa."""
        visitor = login.visitor(request, desk.settings)
        form = {"recipe": recipe, "name": name, "suite": suite, "tasks": tasks, "limit": limit, "speed": speed}
        return _answer(lambda: {"job": facts(desk, desk.submit(visitor, **form))})

    def check(recipe: str, request: gr.Request) -> dict[str, Any]:
        """Plan of a merge from headers alone: sources pinned to commits, tensors, bytes, memory."""
        visitor = login.visitor(request, desk.settings)
        return _answer(lambda: planned(desk.check(visitor, recipe)))

    def jobs(request: gr.Request, mine: bool = False) -> dict[str, Any]:
        """The newest jobs first; only your own with `mine`."""
        visitor = login.visitor(request, desk.settings) if mine is True else None
        return _answer(lambda: {"jobs": [facts(desk, job) for job in desk.jobs(visitor)]})

    def job(job_id: str) -> dict[str, Any]:
        """One job with its facts."""
        return _answer(lambda: {"job": facts(desk, desk.job(job_id))})

    def cancel(job_id: str, request: gr.Request) -> dict[str, Any]:
        """Cancel a job of the visitor, unless it is already being published."""
        visitor = login.visitor(request, desk.settings)
        return _answer(lambda: {"job": facts(desk, desk.cancel(visitor, job_id))})

    def board() -> dict[str, Any]:
        """The published merges, newest first."""
        return _answer(lambda: {"rows": _ROWS.dump_python(desk.board().rows, mode="json")})

    gr.api(submit, api_name="submit", concurrency_limit=4, concurrency_id="hub")
    gr.api(check, api_name="check", concurrency_limit=4, concurrency_id="hub")
    gr.api(jobs, api_name="jobs", concurrency_limit=8, queue=False)
    gr.api(job, api_name="job", concurrency_limit=8, queue=False)
    gr.api(cancel, api_name="cancel", concurrency_limit=4)
    gr.api(board, api_name="leaderboard", concurrency_limit=8, queue=False)


def facts(desk: Desk, job: Job) -> dict[str, Any]:
    """A job as JSON: its stage and all facts recorded so far."""
    at = now()
    stands = stage(job, at)
    waiting = stands is Stage.QUEUED
    return {
        "id": job.id,
        "name": job.request.name,
        "requester": job.request.requester,
        "origin": job.request.origin.value,
        "stage": stands.value,
        "ended": stands in ENDED,
        "position": desk.queue.position(job.id) if waiting else None,
        "attempts": job.attempts,
        "submitted_at": _iso(job.submitted_at),
        "ended_at": _iso(job.ended_at),
        "method": job.plan.get("method"),
        "sources": _SOURCES.dump_python(job.sources, mode="json"),
        "evaluate": asdict(job.request.evaluate),
        "progress": None if job.progress is None else asdict(job.progress),
        "merge": job.merge
        and {
            "bytes": job.merge.bytes,
            "seconds": job.merge.seconds,
            "parameters": job.merge.parameters,
            "manifest": job.merge.manifest,
        },
        "evaluation": _measured(job.evaluation),
        "publication": job.publication
        and {
            "repo": job.publication.repo,
            "commit": job.publication.commit,
            "url": f"{desk.settings.hub}/{job.publication.repo}",
        },
        "failures": [_failure(each) for each in job.failures],
    }


def _failure(failure: Failure) -> dict[str, Any]:
    return {
        "stage": failure.stage.value,
        "code": failure.code,
        "message": failure.sentence,
        "next": failure.next_step,
        "retry_at": _iso(failure.retry_at),
    }


def planned(checked: Checked) -> dict[str, Any]:
    """A checked recipe as JSON."""
    return {
        "plan": dict(checked.plan),
        "sources": _SOURCES.dump_python(checked.sources, mode="json"),
        "licence": checked.licence,
    }


def _measured(found: Evaluation | None) -> dict[str, Any] | None:
    """Scores of the merge and its sources, and the result of the speed test."""
    if found is None:
        return None
    speed = Report.from_dict(found.decode_speed or {})
    heads = speed.heads
    return {
        "manifest": found.manifest,
        "merged": _MODEL.dump_python(found.merged, mode="json"),
        "sources": {name: _MODEL.dump_python(each, mode="json") for name, each in found.sources.items()},
        "decode_speed": found.decode_speed
        and {
            "sentence": speed.sentence,
            "tokens_per_step": None if heads is None else heads.tokens_per_step.measured,
            "speedup": None if heads is None else heads.speedup.ratio,
            "speedup_ci95": None if heads is None else heads.speedup.interval,
        },
        "seconds": found.seconds,
    }


def _answer(deed: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    done = attempt(deed)
    return {"refused": done.as_dict()} if isinstance(done, Refusal) else done


def _iso(at: datetime | None) -> str | None:
    return None if at is None else at.strftime("%Y-%m-%dT%H:%M:%SZ")
