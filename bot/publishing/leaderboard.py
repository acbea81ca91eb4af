"""Leaderboard: rows from published jobs, and the datasets that hold them.

    {namespace}/mergebot-leaderboard   README.md, data/leaderboard.jsonl          one line per published merge
    {namespace}/mergebot-results       {owner}/{model}/results_{time}.json        the layout that public boards parse
                                       evaluations/...                            of the sources (shared_evaluations.py)

Both are exports of the facts: the same facts give the same bytes, so a repeated refresh changes nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter

from bot.errors import Refused
from bot.hub import Hub
from bot.jobs import policy, shared_evaluations
from bot.jobs.job import Job
from bot.jobs.specs import BoardSpec
from bot.settings import Settings
from evaluators.comparison import report
from evaluators.comparison.verdict import Comparison
from evaluators.harness.scores import ModelEvaluation
from evaluators.medusa.speed.report import Report

BOARD = "mergebot-leaderboard"
BOARD_FILE = "data/leaderboard.jsonl"
BOARD_LIMIT_BYTES = 64 * 1024 * 1024

BOARD_CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/leaderboard.jsonl
tags:
- made-with-mergebot
- leaderboard
---
# Merges published by mergebot

One line per merge: its sources, its lm-eval scores with 95 % intervals, its decoding speed with Medusa heads, and the
commit with exactly the measured files. Only rows with equal `ranking` are comparable: the same questions under the
same conditions with the same version of lm-eval.
"""


@dataclass(frozen=True, slots=True)
class Measured:
    """Primary score of one model on one task, as a fraction, with standard error and 95 % interval if known."""

    model: str
    task: str
    metric: str
    value: float
    stderr: float | None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One published merge, as the board shows it."""

    model: str
    repo_url: str
    commit: str
    requester: str
    method: str
    sources: tuple[str, ...]
    licence: str
    parameters: int
    suite: str | None
    suite_digest: str | None
    device: str | None
    average: float | None
    average_stderr: float | None
    results: tuple[Measured, ...]  # the merge's own first, then its sources'
    tokens_per_step: float | None
    plain_tokens_per_s: float | None
    speedup: float | None
    speedup_ci: tuple[float, float] | None
    published_at: str
    verdict: str | None = None  # comparison of the merge with its parents, in words
    ranking: str | None = None  # `ModelEvaluation.board`; rows without it are ranked by suite
    asked: str | None = None  # suite and settings, in words
    average_interval: tuple[float, float] | None = None  # 95 %
    speed_verdict: str | None = None  # the speed test's own: an interval from too few questions has none

    @property
    def ranked_in(self) -> str | None:
        """Key of the rows that are compared with this one; None without scores."""
        return self.ranking or self.suite_digest

    @property
    def scores(self) -> dict[str, tuple[float, float | None]]:
        """The merge's own scores by task."""
        return {each.task: (each.value, each.stderr) for each in self.results if each.model == self.model}

    @property
    def intervals(self) -> dict[tuple[str, str], tuple[float, float]]:
        """The 95 % intervals by model and task, if known."""
        return {(each.model, each.task): each.interval for each in self.results if each.interval is not None}

    @property
    def source_scores(self) -> dict[str, dict[str, tuple[float, float | None]]]:
        """The sources' scores, by source and task."""
        by_source: dict[str, dict[str, tuple[float, float | None]]] = {}
        for each in self.results:
            if each.model != self.model:
                by_source.setdefault(each.model, {})[each.task] = (each.value, each.stderr)
        return by_source


_ROW = TypeAdapter(Row)


def row(job: Job, settings: Settings) -> Row:
    """The row of a published job."""
    assert job.publication is not None and job.evaluation is not None and job.merge is not None
    merged, speed = job.evaluation.merged, Report.from_dict(job.evaluation.decode_speed or {})
    comparison = job.evaluation.comparison
    measured = [] if merged is None else list(_measured(job.publication.repo, merged, _intervals(comparison, "")))
    for name, evaluation in job.evaluation.sources.items():
        measured += _measured(name.partition("@")[0], evaluation, _intervals(comparison, name))
    average, stderr = (None, None) if merged is None else _average(merged)
    heads = speed.heads
    return Row(
        model=job.publication.repo,
        repo_url=f"{settings.hub}/{job.publication.repo}",
        commit=job.publication.commit,
        requester=job.request.requester,
        method=str(job.plan["method"]),
        sources=tuple(source.repo for source in job.sources),
        licence=policy.result_licence(job.sources),
        parameters=job.merge.parameters,
        suite=None if merged is None else merged.suite,
        suite_digest=None if merged is None else merged.suite_digest,
        device=None if merged is None else merged.environment.device,
        average=average,
        average_stderr=stderr,
        results=tuple(measured),
        tokens_per_step=None if heads is None else heads.tokens_per_step.measured,
        plain_tokens_per_s=speed.plain.tokens_per_s,
        speedup=None if heads is None else heads.speedup.ratio,
        speedup_ci=None if heads is None else heads.speedup.interval,
        published_at="" if job.ended_at is None else job.ended_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
        verdict=None if comparison is None else report.headline(comparison) or None,
        ranking=None if merged is None else merged.board,
        asked=None if merged is None else _asked(merged),
        average_interval=None if merged is None else merged.average_interval95,
        speed_verdict=None if heads is None else heads.speedup.verdict,
    )


def _asked(merged: ModelEvaluation) -> str:
    """`quick, 100 samples per task, chat template, bfloat16`."""
    here = merged.environment
    limit = [f"{here.limit} samples per task"] if here.limit else []
    return ", ".join([merged.suite, *limit, *(["chat template"] if here.chat_template else []), here.dtype])


def _intervals(comparison: Comparison | None, model: str) -> dict[str, tuple[float, float]]:
    """Intervals by task of the model with this name in the comparison ("" is the merge)."""
    tasks = comparison.tasks if comparison else ()
    return {task.task: each.interval for task in tasks for each in (task.merge, *task.parents) if each.model == model}


def _measured(
    model: str, evaluation: ModelEvaluation, intervals: Mapping[str, tuple[float, float]]
) -> Iterable[Measured]:
    for score in evaluation.scores:
        interval = intervals.get(score.task, score.interval95)
        yield Measured(model, score.task, score.metric, score.value, score.stderr, interval)


def _average(evaluation: ModelEvaluation) -> tuple[float | None, float | None]:
    """Mean of the scores, above chance if the suite counts so, and its standard error for independent tasks."""
    scores = [score for score in evaluation.scores if score.higher_is_better]
    errors = [None if score.stderr is None else score.stderr / (1 - (score.chance or 0.0)) for score in scores]
    stderr = None
    if scores and all(error is not None for error in errors):
        stderr = math.sqrt(sum(error**2 for error in errors if error is not None)) / len(scores)
    return evaluation.average, stderr


def board_spec(published: list[Job], settings: Settings) -> BoardSpec:
    """The datasets of board and results with every published job."""
    rows = [row(job, settings) for job in published]
    lines = "".join(_ROW.dump_json(each).decode() + "\n" for each in rows)
    results = {_results_path(job): json.dumps(_results(job), indent=1) for job in published}
    return BoardSpec(
        datasets={
            f"{settings.namespace}/{shared_evaluations.RESULTS}": {
                **results,
                **shared_evaluations.files(published, settings),
            },
            f"{settings.namespace}/{BOARD}": {"README.md": BOARD_CARD, BOARD_FILE: lines},
        },
        message=f"mergebot: {len(rows)} published merges",
    )


def _results_path(job: Job) -> str:
    assert job.publication is not None and job.ended_at is not None
    return f"{job.publication.repo}/results_{job.ended_at.strftime('%Y-%m-%dT%H-%M-%S.%f')}.json"


def _results(job: Job) -> dict[str, Any]:
    """One merge in the results layout that public leaderboards parse (hub.md 1.6)."""
    assert job.publication is not None and job.evaluation is not None and job.ended_at is not None
    merged = job.evaluation.merged
    results: dict[str, dict[str, float | None]] = {}
    for score in merged.scores if merged else ():
        results.setdefault(score.task, {}).update({score.metric: score.value, f"{score.metric}_stderr": score.stderr})
    return {
        "config": {
            "model_name": job.publication.repo,
            "model_dtype": f"torch.{merged.environment.dtype}" if merged else None,
            "model_sha": job.publication.commit,
            "submission_date": job.submitted_at.strftime("%Y-%m-%d"),
        },
        "results": results,
        "versions": {score.task: score.task_version for score in (merged.scores if merged else ())},
        "n-shot": {score.task: score.few_shot for score in (merged.scores if merged else ())},
        "decode_speed": job.evaluation.decode_speed,
        "mergebot": {
            "digest": job.digest,
            "manifest": job.evaluation.manifest,
            "environment": None if merged is None else asdict(merged.environment),
            "suite": None if merged is None else merged.suite,
            "suite_digest": None if merged is None else merged.suite_digest,
        },
    }


def read(hub: Hub, settings: Settings) -> tuple[Row, ...]:
    """The public board, newest merge first. Empty before the first merge. Raises Transient when the Hub is away."""
    repo = f"{settings.namespace}/{BOARD}"
    try:
        pinned = hub.resolve(repo, repo_type="dataset")
    except Refused:
        return ()
    text = hub.read_text(repo, pinned.revision, BOARD_FILE, limit_bytes=BOARD_LIMIT_BYTES, repo_type="dataset")
    return tuple(_ROW.validate_json(line) for line in reversed((text or "").splitlines()))
