"""Evaluations on disk: those that are whole, and the finished tasks of those that are not yet.

cache/results/<key>/evaluation.json       the scores (ModelEvaluation)
cache/results/<key>/lm_eval.json          lm-eval's results, without paths and names of this machine
cache/results/<key>/samples/<task>.jsonl  every question with the model's answers, as lm-eval logs them
cache/partial/<key>/                      an evaluation under way: one that was interrupted goes on from here
    tasks/<number>.json                   a finished task: lm-eval's results, its data, the environment
    samples/<task>.jsonl                  its samples
    answers/<number>.jsonl                the model's answers to a task at work, whole batches
cache/partial/<key>.lock                  held by the process that evaluates
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evaluators.errors import EvaluationError
from evaluators.harness.scores import Environment, ModelEvaluation, Score, TaskData
from evaluators.harness.suites import ANY, Suite, SuiteTask

# The parts of lm-eval's results that have an entry a task; the others are the same in every task of an evaluation.
_BY_TASK = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
_LOOK_EVERY_S = 0.2


def folder_of(evaluation: ModelEvaluation, cache: Path) -> Path:
    """Where `lm_eval.json` and `samples/` of a stored evaluation lie."""
    return cache / "results" / evaluation.key


def stored(cache: Path, key: str) -> ModelEvaluation | None:
    """The evaluation of this key, if it was ever finished here."""
    try:
        text = (cache / "results" / key / "evaluation.json").read_text(encoding="utf-8")
        return ModelEvaluation.from_dict(json.loads(text))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        # Not what we wrote, or written by another version: measured again and replaced.
        shutil.rmtree(cache / "results" / key, ignore_errors=True)
        return None


@contextmanager
def under_way(cache: Path, key: str, deadline: float) -> Iterator[Path]:
    """The folder of an evaluation under way, for this process alone; waits for another one's. Raises TIME_LIMIT."""
    folder = cache / "partial" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = cache / "partial" / f"{key}.lock"
    with _locked(lock, deadline):
        for name in ("tasks", "samples", "answers"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        yield folder
        if stored(cache, key) is not None:  # by another process, or just now
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path, deadline: float) -> Iterator[None]:
    """Hold the lock file at `path`, which its holder may remove. Raises TIME_LIMIT."""
    while True:
        with path.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise EvaluationError(
                        "TIME_LIMIT", "Another process evaluates the same model and is not done.", "Try again later."
                    ) from None
                time.sleep(_LOOK_EVERY_S)
                continue
            if not _is_at(lock.fileno(), path):
                continue  # the file was removed while it was waited for, and another one may be held by now
            yield
            return


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def samples_file(folder: Path, task: str) -> Path:
    """Where the samples of a task stand, by its name, whatever letters that holds."""
    return folder / "samples" / f"{task.replace('/', '_')}.jsonl"


def task_file(folder: Path, number: int) -> Path:
    """Where the results of the suite's task `number` stand once it is finished."""
    return folder / "tasks" / f"{number:03}.json"


def answers_file(folder: Path, number: int) -> Path:
    """Where the answers to the task at work are kept."""
    return folder / "answers" / f"{number:03}.jsonl"


def unfinished(folder: Path, suite: Suite) -> list[int]:
    """The numbers of the suite's tasks that have no results yet, or none that a disk has kept whole."""
    return [number for number in range(len(suite.tasks)) if not _is_whole(task_file(folder, number))]


def _is_whole(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError, RecursionError):
        return False


def no_such_metric(task: str, asked: str, known: Iterable[str]) -> EvaluationError:
    """The error for a suite that ranks a task by `asked`, METRIC,FILTER, which is none of those it has."""
    return EvaluationError(
        "EVALUATION_FAILED",
        f"Task `{task}` has no metric `{asked}`.",
        f"Name one of the task's own metrics in the suite: {', '.join(sorted(known))}.",
    )


def read(folder: Path, suite: Suite, key: str) -> ModelEvaluation:
    """The evaluation that the finished tasks in `folder` make up. Raises EVALUATION_FAILED for a metric that is not."""
    parts = [json.loads(task_file(folder, number).read_text(encoding="utf-8")) for number in range(len(suite.tasks))]
    scores: list[Score] = []
    others: list[Score] = []
    for task, part in zip(suite.tasks, parts, strict=True):
        found = _scores(task, part["results"], part["data"])
        ranked = next((score for score in _by_rank(found) if _ranks(task, score)), None)
        if ranked is None:
            known = {f"{score.metric},{score.filter}" for score in found}
            raise no_such_metric(task.name, f"{task.metric},{task.filter}", known)
        scores.append(ranked)
        others += [score for score in found if score is not ranked]
    return ModelEvaluation(
        suite.name,
        suite.digest,
        tuple(scores),
        Environment(**parts[-1]["environment"]),
        sum(part["seconds"] for part in parts),
        others=tuple(others),
        key=key,
        task_seconds=tuple(part["seconds"] for part in parts),
        smallest_batch=min((part["batch"] for part in parts if part["batch"] is not None), default=None),
    )


def keep(folder: Path, found: ModelEvaluation, cache: Path) -> None:
    """Make the folder of an evaluation whole, then give it its name."""
    parts = [json.loads(path.read_text(encoding="utf-8"))["results"] for path in sorted(folder.glob("tasks/*.json"))]
    (folder / "lm_eval.json").write_text(
        json.dumps(_together(parts), indent=1, ensure_ascii=False, default=str), encoding="utf-8"
    )
    (folder / "evaluation.json").write_text(json.dumps(found.as_dict(), indent=1), encoding="utf-8")
    for path in folder.rglob("*.json*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    whole = cache / "results" / found.key
    whole.parent.mkdir(exist_ok=True)
    if stored(cache, found.key) is None:  # else another machine's was adopted meanwhile
        shutil.rmtree(whole, ignore_errors=True)
        folder.rename(whole)
        # Last: a process that is killed before has every finished task still where it is looked for.
        for name in ("tasks", "answers"):
            shutil.rmtree(whole / name, ignore_errors=True)


_SHOWN = ("doc_id", "target", "filtered_resps", "filter", "metrics", "doc_hash", "prompt_hash", "target_hash")


def short_samples(evaluation: ModelEvaluation, cache: Path) -> dict[str, str]:
    """The samples of a stored evaluation without questions and raw answers, JSON lines by task: who was right where,
    for others to compare with, and nothing of a dataset that its owner does not show himself."""
    found = {}
    for path in sorted((folder_of(evaluation, cache) / "samples").glob("*.jsonl")):
        lines = []
        with path.open(encoding="utf-8") as file:
            for line in file:
                sample = json.loads(line)
                kept = {key: sample[key] for key in (*_SHOWN, *sample.get("metrics", ())) if key in sample}
                # Of each request its answer: how long it is decides what a normalised score picks.
                kept["arguments"] = [["", *each[1:2]] for each in sample.get("arguments", ())]
                lines.append(json.dumps(kept, ensure_ascii=False) + "\n")
        found[path.stem] = "".join(lines)
    return found


def agrees(evaluation: ModelEvaluation, samples: Mapping[str, str], groups: Mapping[str, Sequence[str]]) -> bool:
    """Whether the samples, by the stem of their file, are those the scores were taken from: as many, and with their
    mean where it is one. Of a group, one of `groups`, they stand under the names of its tasks.

    Raises ValueError, KeyError, TypeError or ArithmeticError for what are no samples.
    """
    for score in evaluation.scores:
        name = samples_file(Path(), score.task).stem
        if name not in samples:
            if not _has_samples(score.task, samples, groups, {score.task}):
                return False
            continue
        rows = [json.loads(line) for line in samples[name].split("\n") if line]
        values = [float(row[score.metric]) for row in rows if row["filter"] == score.filter]
        if len(values) != score.samples:
            return False
        share = 0 <= score.value <= 1 or all(0 <= each <= 1 for each in values)
        if share and not math.isclose(sum(values) / len(values), score.value, abs_tol=1e-9):
            return False
    return True


def _has_samples(task: str, samples: Mapping[str, str], groups: Mapping[str, Sequence[str]], seen: set[str]) -> bool:
    """Whether those of a task, or of every task within a group, are there."""
    if samples_file(Path(), task).stem in samples:
        return True
    within = [each for each in groups.get(task, ()) if each not in seen]
    seen.update(within)
    return bool(within) and all(_has_samples(each, samples, groups, seen) for each in within)


def structure(evaluation: ModelEvaluation, cache: Path) -> dict[str, Any]:
    """Which tasks a group's score was made of, and how many questions each has: what lm_eval.json says of them."""
    try:
        told = json.loads((folder_of(evaluation, cache) / "lm_eval.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return {name: told[name] for name in ("group_subtasks", "n-samples") if name in told}


def adopt(
    evaluation: ModelEvaluation, samples: Mapping[str, str], cache: Path, structure: Mapping[str, Any] | None = None
) -> None:
    """Store an evaluation that was made elsewhere."""
    (cache / "results").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".adopted-", dir=cache) as made:
        folder = Path(made) / evaluation.key
        (folder / "samples").mkdir(parents=True)
        for task, text in samples.items():
            (folder / "samples" / f"{task}.jsonl").write_text(text, encoding="utf-8")
        (folder / "lm_eval.json").write_text(json.dumps(dict(structure or {}), indent=1), encoding="utf-8")
        (folder / "evaluation.json").write_text(json.dumps(evaluation.as_dict(), indent=1), encoding="utf-8")
        with contextlib.suppress(OSError):  # somebody was faster
            folder.rename(cache / "results" / evaluation.key)


def _together(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """lm-eval's results of single tasks as it gives them for all at once."""
    made: dict[str, Any] = dict(parts[-1]) if parts else {}
    for name in _BY_TASK:
        entries = {key: value for part in parts for key, value in part.get(name, {}).items()}
        if entries:
            made[name] = entries
    return made


def _by_rank(found: Sequence[Score]) -> list[Score]:
    """Scores that grow with the model's ability come first, each kind in lm-eval's order."""
    return sorted(found, key=lambda score: not score.higher_is_better)


def _ranks(task: SuiteTask, score: Score) -> bool:
    return task.metric == ANY or (score.metric, score.filter) == (task.metric, task.filter)


def _scores(task: SuiteTask, results: Mapping[str, Any], data: Mapping[str, Any]) -> list[Score]:
    found = results["results"][task.name]
    samples = results.get("n-samples", {}).get(task.name, {}).get("effective") or found.get("sample_len") or 0
    its_data, made = _data(task.name, data), []
    for label, value in found.items():
        metric, comma, kind = label.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = found.get(f"{metric}_stderr,{kind}")
        made.append(
            Score(
                task=task.name,
                metric=metric,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
                samples=int(samples),
                few_shot=int(results.get("n-shot", {}).get(task.name) or 0),
                higher_is_better=results.get("higher_is_better", {}).get(task.name, {}).get(metric) is not False,
                task_version=str(results.get("versions", {}).get(task.name)),
                filter=kind,
                data=its_data,
                chance=task.chance if metric == task.metric else None,
            )
        )
    return made


def _data(task: str, data: Mapping[str, Any]) -> TaskData | None:
    """A task's data; of a group, what the data of all its tasks have in common."""
    if task in data:
        return None if data[task] is None else TaskData(**data[task])
    parts = list(data.values())
    if not parts or None in parts or len({part["repo"] for part in parts}) > 1:
        return None
    common = {name: value for name, value in parts[0].items() if all(part[name] == value for part in parts)}
    return TaskData(**{"config": None, "split": None, "revision": None, **common})
