"""Evaluations of parents in the results dataset, shared by all merges and machines.

    {namespace}/mergebot-results
        evaluations/<key>/evaluation.json       {model: repo@commit, evaluation, structure, samples: {task: sha256}}
        evaluations/<key>/samples/<task>.jsonl  correct answers per sample, without the questions

`<key>` is the key of the local cache. The dataset is read as untrusted: an evaluation must answer exactly the requested
question, and its scores must be those of its samples. Otherwise the parent is measured again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from bot.errors import MergebotError
from bot.jobs.job import Job
from bot.settings import Settings
from evaluators.harness import results
from evaluators.harness.eval_config import LIBRARIES
from evaluators.harness.scores import ModelEvaluation, Score
from evaluators.harness.suites import ANY, SuiteTask

if TYPE_CHECKING:
    from bot.hub import Hub
    from evaluators.harness.eval_config import Question

RESULTS = "mergebot-results"  # name of the results dataset
RECENT_JOBS = 20  # older ones were written by earlier refreshes
LIMIT_BYTES = 32 * 1024 * 1024
_EVALUATION = TypeAdapter(ModelEvaluation)
_STRUCTURE = TypeAdapter(dict[str, dict[str, list[str] | dict[str, int]]])
_GROUPS = TypeAdapter(dict[str, list[str]])
_TASK = re.compile(r"[A-Za-z0-9][\w.\-]{0,127}", re.ASCII)


def files(published: Iterable[Job], settings: Settings) -> dict[str, str]:
    """Path in the dataset -> text, for the parents of the jobs that were published last."""
    found: dict[str, str] = {}
    recent = sorted((job for job in published if job.ended_at is not None), key=lambda job: str(job.ended_at))
    for job in recent[-RECENT_JOBS:]:
        for model, evaluation in (job.evaluation.sources if job.evaluation else {}).items():
            found |= _files_of(model, evaluation, settings)
    return found


def _files_of(model: str, evaluation: ModelEvaluation, settings: Settings) -> dict[str, str]:
    """Files of an evaluation; empty if its samples are missing or too many to publish."""
    samples = results.short_samples(evaluation, settings.evaluations) if evaluation.key else {}
    size = sum(len(text) for text in samples.values())
    if not samples or size > LIMIT_BYTES or not all(_TASK.fullmatch(task) for task in samples):
        return {}
    told = {
        "model": model,
        "evaluation": evaluation.as_dict(),
        "structure": results.structure(evaluation, settings.evaluations),
        "samples": {task: _sha256(text) for task, text in samples.items()},
    }
    folder = f"evaluations/{evaluation.key}"
    made = {f"{folder}/samples/{task}.jsonl": text for task, text in samples.items()}
    return {f"{folder}/evaluation.json": json.dumps(told, indent=1) + "\n", **made}


def take(hub: Hub, repo: str, question: Question, model: str, settings: Settings) -> bool:
    """Copy the evaluation of `model` (repo@commit) from the dataset `repo` into the local cache, if it is valid.

    Never raises: without it the model is measured.
    """
    key = question.key(model)
    if results.stored(settings.evaluations, key) is not None:
        return True
    folder = f"evaluations/{key}"
    try:
        revision = hub.resolve(repo, repo_type="dataset").revision

        def read(path: str) -> str:
            text = hub.read_text(repo, revision, f"{folder}/{path}", limit_bytes=LIMIT_BYTES, repo_type="dataset")
            if text is None:
                raise ValueError(f"{path} is not there")
            return text

        told = json.loads(read("evaluation.json"))
        found = _EVALUATION.validate_python(told["evaluation"])
        structure = _STRUCTURE.validate_python(told["structure"])
        if told["model"] != model or not _answers(found, question, key):
            return False
        samples = {}
        for task, digest in told["samples"].items():
            if not _TASK.fullmatch(task):
                return False
            samples[task] = read(f"samples/{task}.jsonl")
            if _sha256(samples[task]) != digest:
                return False
        if not results.agrees(found, samples, _GROUPS.validate_python(structure.get("group_subtasks", {}))):
            return False
    except (MergebotError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ArithmeticError):
        return False
    results.adopt(found, samples, settings.evaluations, {**structure})
    return True


def _answers(found: ModelEvaluation, question: Question, key: str) -> bool:
    """Return whether an evaluation answers exactly this question, with these versions of the libraries."""
    here, conditions = found.environment, asdict(question.conditions)
    same = ("limit", "seed", "batch_size", "chat_template", "backend")
    return (
        found.key == key
        and found.suite_digest == question.suite.digest
        and len(found.scores) == len(question.suite.tasks)
        and all(map(_ranked, question.suite.tasks, found.scores))
        and all(getattr(here, name) == conditions[name] for name in same)
        and question.conditions.fits(here.device, here.dtype)
        and all(getattr(here, name) == importlib.metadata.version(name) for name in LIBRARIES)
        and all(math.isfinite(score.value) for score in found.scores)
    )


def _ranked(task: SuiteTask, score: Score) -> bool:
    """Return whether the suite ranks the task by this score."""
    asked = ANY if task.metric == ANY else (task.metric, task.filter)
    shots = task.few_shot in (None, score.few_shot)
    return score.task == task.name and asked in (ANY, (score.metric, score.filter)) and shots


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
