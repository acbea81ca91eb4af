"""Real content for a Space: models and a leaderboard on the local Hub, and jobs of every stage in a real queue."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from bot.jobs.job import Evaluation, Failure, Lease, Merge, Progress, Publication, PublishedFile, Source, Stage
from bot.jobs.queue import Queue
from bot.jobs.request import EvaluateOptions, MergeRequest, Origin
from bot.publishing.leaderboard import BOARD, BOARD_FILE, Measured, Row
from evaluators import comparison
from evaluators.harness.scores import Environment, ModelEvaluation
from evaluators.paired import proportion_interval
from evaluators.sanity_check import SanityCheck
from tests.evaluators import stored
from tests.merge.tiny_checkpoints import llama_tensors, save

NAMESPACE = "mergebot"
BASE, POET, SMITH = "smol/base-135m", "smol/crests-135m", "smol/smiths-135m"
TASKS = ("invented_crests", "invented_smiths")
RECIPE = f"""\
# Both skills, added to the base model.
merge_method: task_arithmetic
base_model: {BASE}
models:
  - model: {POET}
    parameters:
      weight: 1.0
  - model: {SMITH}
    parameters:
      weight: 1.0
dtype: float32
"""
CARD = "---\nlicense: apache-2.0\n---\nA tiny model for tests.\n"
PARENT_SCORES = {BASE: (0.031, 0.23), POET: (0.98, 0.2), SMITH: (0.13, 0.75)}
ENVIRONMENT = Environment("cpu", "float32", "8", False, 0, "0.4.13", "5.23.0", "2.13.0")
VITALS = SanityCheck(True, 1.43, 31.0, 49152, 0, 4, 0.72, 0, 22, 22, 21.4, "cpu", "float32")


def hub_content(folder: Path, rows: tuple[Row, ...]) -> Path:
    """A folder for `bot.localhub.seed`: three tiny models and, when there are rows, the board's dataset."""
    for seed, repo in enumerate((BASE, POET, SMITH)):
        model = save(folder / "models" / repo, llama_tensors(seed))
        (model / "README.md").write_text(CARD)
    if rows:
        file = folder / "datasets" / NAMESPACE / BOARD / BOARD_FILE
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(asdict(row)) + "\n" for row in reversed(rows)))
    return folder


def board_rows(hub: str) -> tuple[Row, ...]:
    """Merges as a week of the bot would leave them."""
    found = [
        _row(hub, "alice-both-skills", "task_arithmetic", (0.83, 0.58), 2.06, (1.98, 2.14), 2.31, 0),
        _row(hub, "bob-both-skills-07", "task_arithmetic", (0.73, 0.33), 1.71, (1.6, 1.83), 2.12, 9),
        _row(hub, "alice-average", "linear", (0.48, 0.28), 0.94, (0.9, 0.99), 1.77, 20),
        _row(hub, "carol-ties-density-05", "ties", (0.79, 0.61), 1.83, (1.75, 1.92), 2.2, 31),
        _row(hub, "bob-between", "slerp", (0.55, 0.41), 1.02, (0.96, 1.09), 1.83, 44),
        _row(hub, "carol-ties-density-02", "ties", (0.69, 0.52), None, None, None, 60),
        _row(hub, "dana-weighted-early-layers", "linear", (0.41, 0.5), 1.33, (1.22, 1.45), 1.95, 80, licence="mit"),
        _row(hub, "dana-untested", "slerp", None, 1.12, (1.05, 1.2), 1.86, 100, licence="mit"),
    ]
    return tuple(found)


def _row(
    hub: str,
    name: str,
    method: str,
    scores: tuple[float, float] | None,
    speedup: float | None,
    interval: tuple[float, float] | None,
    tokens_per_step: float | None,
    hours_ago: int,
    licence: str = "apache-2.0",
) -> Row:
    model = f"{NAMESPACE}/{name}"
    sources = (BASE, POET, SMITH) if method in ("task_arithmetic", "ties") else (POET, SMITH)
    results = [*_measured(model, scores)] if scores else []
    if scores:
        for source in sources:
            results += _measured(source, PARENT_SCORES[source])
    at = datetime(2026, 11, 23, 17, 0, tzinfo=UTC) - timedelta(hours=hours_ago)
    return Row(
        model=model,
        repo_url=f"{hub}/{model}",
        commit=f"{abs(hash(name)) % 16**8:08x}" * 5,
        requester=name.partition("-")[0],
        method=method,
        sources=sources,
        licence=licence,
        parameters=134_515_008,
        suite="demo-skills" if scores else None,
        suite_digest="5d" * 32 if scores else None,
        device="cpu" if scores else None,
        average=sum(scores) / 2 if scores else None,
        average_stderr=0.035 if scores else None,
        average_interval=(sum(scores) / 2 - 0.07, sum(scores) / 2 + 0.06) if scores else None,
        results=tuple(results),
        tokens_per_step=tokens_per_step,
        plain_tokens_per_s=21.4 if speedup else None,
        speedup=speedup,
        speedup_ci=interval,
        speed_verdict=None
        if interval is None
        else "faster"
        if interval[0] > 1
        else "slower"
        if interval[1] < 1
        else "same",
        published_at=at.strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def _measured(model: str, scores: tuple[float, float]) -> list[Measured]:
    return [
        Measured(
            model,
            task,
            "acc",
            value,
            round((value * (1 - value) / 80) ** 0.5, 4),
            proportion_interval(round(80 * value), 80),
        )
        for task, value in zip(TASKS, scores, strict=True)
    ]


def fill_queue(queue: Queue, now: datetime) -> dict[str, str]:
    """A job of every stage; returns the stage's name -> the job's id."""
    ids: dict[str, str] = {}
    for place, (stage, requester, name) in enumerate(
        (
            ("published", "alice", "both-skills"),
            ("failed", "bob", "far-apart"),
            ("cancelled", "carol", "second-thoughts"),
            ("publishing", "dana", "weighted-early-layers"),
            ("evaluating", "visitor", "both-skills-07"),
            ("merging", "bob", "between"),
            ("again", "alice", "unlucky"),
            ("queued", "visitor", "ties-density-05"),
        )
    ):
        at = now - timedelta(minutes=7 * (8 - place))
        job = submit(queue, requester, name, at)
        ids[stage] = job
        if stage not in ("queued", "cancelled"):
            lease = _claim(queue, job, now)
            _walk(queue, lease, stage, now)
        if stage == "cancelled":
            queue.cancel(job, requester)
    return ids


def submit(queue: Queue, requester: str, name: str, at: datetime) -> str:
    request = MergeRequest(requester, Origin.FORM, RECIPE, name, EvaluateOptions(suite="demo-skills", speed="medusa"))
    sources = tuple(
        Source(repo, f"{place}a4c" * 10, "apache-2.0", 269_000_000) for place, repo in enumerate((BASE, POET, SMITH))
    )
    return queue.submit(
        request, digest=(name.encode().hex() * 64)[:64], recipe="{}", sources=sources, plan=_plan(sources), now=at
    ).id


def _claim(queue: Queue, job: str, now: datetime) -> Lease:
    """A lease of exactly this job: it is the only one that waits, or the others are on lease."""
    lease = queue.claim("worker-1", now)
    assert lease is not None and lease.job_id == job
    return lease


def _walk(queue: Queue, lease: Lease, stage: str, now: datetime) -> None:
    if stage == "merging":
        queue.renew(lease, Progress("model.layers.17.mlp.up_proj.weight", 161, 272), now)
        return
    if stage == "again":
        later = now + timedelta(hours=2)
        step = "Nothing to do; the job is tried again."
        failure = Failure(Stage.MERGING, "HUB_UNAVAILABLE", "The Hub is answering slowly.", step, later)
        queue.record(lease, failure, now)
        return
    if stage == "failed":
        sentence = "layers.3.mlp.up_proj.weight has 12 NaN values in smol/smiths-135m."
        queue.record(lease, Failure(Stage.MERGING, "NOT_FINITE", sentence, "Ask its author for a sound file."), now)
        return
    files = {"model.safetensors": PublishedFile(269_000_000, "c0" * 32)}
    queue.record(lease, Merge(files, "9e" * 32, 269_000_000, 41.7, 134_515_008), now)
    if stage == "evaluating":
        queue.renew(lease, Progress("lm-eval: invented_smiths, crests-135m", 62, 160), now)
        return
    queue.record(lease, evaluation(), now)
    if stage == "published":
        queue.record(lease, Publication(f"{NAMESPACE}/alice-both-skills", "7f" * 20, 6.2), now)
    else:
        queue.renew(lease, Progress("uploading model.safetensors", 201, 269), now)


def evaluation() -> Evaluation:
    """Real answers of invented models: the first questions of each task are answered right."""
    with tempfile.TemporaryDirectory() as folder:
        merged = _answered(Path(folder), "merge", (0.83, 0.58))
        sources = {f"{repo}@{'1a' * 20}": _answered(Path(folder), repo, PARENT_SCORES[repo]) for repo in PARENT_SCORES}
        compared = comparison.compare(merged, sources, cache=Path(folder))
    signs = dict.fromkeys(("", *sources), VITALS)
    return Evaluation("9e" * 32, merged, sources, speed_report(), 171.0, {}, compared, "", signs)


def _answered(cache: Path, model: str, shares: tuple[float, float]) -> ModelEvaluation:
    right = (round(80 * share) for share in shares)
    answers = {task: [1.0] * count + [0.0] * (80 - count) for task, count in zip(TASKS, right, strict=True)}
    return stored.evaluation(cache, model.replace("/", "-"), answers, environment=ENVIRONMENT)


def speed_report() -> dict[str, Any]:
    told = (
        "Medusa heads trained in 41 s on 9216 tokens of the model's own text bring 2.31 tokens per step; on this CPU "
        "(2 threads) decoding with them runs at 0.87 x plain speed (95 % interval 0.84 to 0.90): decoding with them is "
        "slower here."
    )
    candidates = [_timed("none", 1.0, (0.99, 1.01), 1.0), _timed("fresh", 0.87, (0.84, 0.9), 2.31)]
    return {
        "chosen": "none",
        "refusal": None,
        "sentence": told,
        "plain": {"tokens_per_s": 21.4},
        "candidates": candidates,
    }


def _timed(way: str, speed: float, interval: tuple[float, float], tokens_per_step: float) -> dict[str, Any]:
    speeds = {"wall": speed, "wall_ci95": [*interval], "cpu": speed, "cpu_ci95": [*interval], "clock_used": "wall"}
    return {
        "id": way,
        "origin": way,
        "absent_because": None,
        "tokens_per_step": {"measured": tokens_per_step},
        "speedup": speeds,
    }


def _plan(sources: tuple[Source, ...]) -> dict[str, Any]:
    return {
        "method": "task_arithmetic",
        "sources": [
            {"model": str(each), "roles": ["base" if place == 0 else "model"], "bytes": each.bytes}
            for place, each in enumerate(sources)
        ],
        "tensors": 272,
        "parameters": 134_515_008,
        "dtypes": {"float32": 538_060_032},
        "bytes_in": 807_000_000,
        "bytes_out": 538_060_032,
        "peak_memory_bytes": 1_020_000_000,
        "disk_bytes": 1_180_000_000,
        "notices": [],
    }
