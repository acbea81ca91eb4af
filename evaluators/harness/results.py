"""Evaluations on disk, and the finished tasks that evaluations are made of.

cache/results/<key>/evaluation.json       the scores (ModelEvaluation)
cache/results/<key>/lm_eval.json          lm-eval's results, without paths and names of this machine
cache/results/<key>/samples/<task>.jsonl  every question with the model's answers, as lm-eval logs them
cache/tasks/<task key>/                   a finished task, for every suite that asks it under the same conditions
    result.json                           lm-eval's results, its data, the environment
    samples/<task>.jsonl                  its samples
cache/partial/<key>/<task key>.jsonl      the model's answers to a task at work, whole batches
cache/partial/<key>.lock                  held by the process that evaluates
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bot.errors import EvaluationError
from bot.storage import sync_file, try_lock
from evaluators.harness.scores import Cut, Environment, Loaded, ModelEvaluation, Score, TaskData
from evaluators.harness.suites import ANY, Suite, SuiteTask

# Parts of lm-eval's results with one entry per task; the others are equal in every task of an evaluation.
_BY_TASK = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
_LOOK_EVERY_S = 0.2
_RESULT = "result.json"


def folder_of(evaluation: ModelEvaluation, cache: Path) -> Path:
    """Folder with `lm_eval.json` and `samples/` of a stored evaluation."""
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
        folder.mkdir(exist_ok=True)
        yield folder
        if stored(cache, key) is not None:  # by another process, or just now
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path, deadline: float) -> Iterator[None]:
    """Hold the lock file at `path`, which its holder may remove. Raises TIME_LIMIT."""
    while True:
        with path.open("a") as lock:
            if not try_lock(lock.fileno()):
                if time.monotonic() > deadline:
                    raise EvaluationError(
                        "TIME_LIMIT", "Another process evaluates the same model and is not done.", "Try again later."
                    )
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
    """File of the samples of a task, for any characters in its name."""
    return folder / "samples" / f"{task.replace('/', '_')}.jsonl"


def task_folder(cache: Path, task_key: str) -> Path:
    """The folder with the results and samples of a finished task."""
    return cache / "tasks" / task_key


def answers_file(folder: Path, task_key: str) -> Path:
    """The file with the answers to an unfinished task, in the folder of an evaluation under way."""
    return folder / f"{task_key}.jsonl"


def finished(cache: Path, task_key: str) -> dict[str, Any] | None:
    """Results of a finished task; None if missing or damaged."""
    try:
        values = json.loads((task_folder(cache, task_key) / _RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def finish(cache: Path, task_key: str, text: str, samples: Mapping[str, Iterable[str]]) -> None:
    """Write the results of a task, as JSON, and its samples as lines by task, completely or not at all."""
    with _new_folder(task_folder(cache, task_key), lambda: finished(cache, task_key)) as folder:
        for task, lines in samples.items():
            _write(samples_file(folder, task), lines)
        _write(folder / _RESULT, [text])


@contextmanager
def _new_folder(final: Path, existing: Callable[[], object | None]) -> Iterator[Path]:
    """A temporary folder that becomes `final` when the block ends; a valid `existing` result stays."""
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=final.parent) as parent:
        folder = Path(parent) / final.name
        (folder / "samples").mkdir(parents=True)
        yield folder
        if existing() is None:
            shutil.rmtree(final, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process wrote it in the meantime
                folder.rename(final)


def _write(file: Path, lines: Iterable[str]) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.writelines(lines)
    sync_file(file)


def no_such_metric(task: str, asked: str, known: Iterable[str]) -> EvaluationError:
    """Error for a suite that ranks a task by the missing metric `asked` (METRIC,FILTER)."""
    return EvaluationError(
        "EVALUATION_FAILED",
        f"Task `{task}` has no metric `{asked}`.",
        f"Name one of the task's own metrics in the suite: {', '.join(sorted(known))}.",
    )


def read(cache: Path, suite: Suite, task_keys: Sequence[str], key: str) -> ModelEvaluation:
    """Assemble the evaluation from its finished tasks. Raises EVALUATION_FAILED for a metric that a task lacks."""
    scores: list[Score] = []
    others: list[Score] = []
    parts = _parts(cache, task_keys)
    measured = [
        (each, part, part["seconds"] / len(members))
        for task, part in zip(suite.tasks, parts, strict=True)
        if (members := _measured(task, part["results"]))
        for each in members
    ]
    for task, part, _ in measured:
        found = _scores(task, part["results"], part["data"])
        # Without a named metric, higher-is-better metrics come first, each kind in lm-eval's order.
        candidates = sorted(found, key=lambda score: not score.higher_is_better)
        wanted = (task.metric, task.filter)
        ranked = next((each for each in candidates if task.metric == ANY or (each.metric, each.filter) == wanted), None)
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
        task_seconds=tuple(seconds for *_, seconds in measured),
        smallest_batch=min((part["batch"] for part in parts if part["batch"] is not None), default=None),
        loaded=Loaded.from_dict(parts[-1]["loaded"]) if parts[-1].get("loaded") else None,
        cut=tuple(
            Cut(task.name, **part["cut"]) for task, part in zip(suite.tasks, parts, strict=True) if part.get("cut")
        ),
    )


def _measured(task: SuiteTask, results: Mapping[str, Any]) -> list[SuiteTask]:
    """The task itself, or the scored tasks and groups within a group that has no `aggregate_metric_list`."""
    within = results.get("group_subtasks", {}).get(task.name, ())
    if not within or any("," in label for label in results["results"].get(task.name, ())):
        return [task]
    return [each for name in within for each in _measured(replace(task, name=name), results)]


def _parts(cache: Path, task_keys: Sequence[str]) -> list[dict[str, Any]]:
    found = [finished(cache, task_key) for task_key in task_keys]
    return [part for part in found if part is not None]


def keep(cache: Path, found: ModelEvaluation, task_keys: Sequence[str]) -> None:
    """Store an evaluation with the results and samples of its tasks; the tasks stay in the cache."""
    results = _together([part["results"] for part in _parts(cache, task_keys)])
    with _stored_whole(cache, found, results) as folder:
        for samples in (file for key in task_keys for file in task_folder(cache, key).glob("samples/*.jsonl")):
            _link(samples, folder / "samples" / samples.name)


def _link(file: Path, to: Path) -> None:
    """Link a finished file under a second name, or copy it where the disk has no hard links."""
    to.unlink(missing_ok=True)
    try:
        to.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, to)


@contextmanager
def _stored_whole(cache: Path, evaluation: ModelEvaluation, results: Mapping[str, Any]) -> Iterator[Path]:
    """Store an evaluation; the block adds its samples to the folder."""
    with _new_folder(cache / "results" / evaluation.key, lambda: stored(cache, evaluation.key)) as folder:
        yield folder
        _write(folder / "lm_eval.json", [json.dumps(results, indent=1, ensure_ascii=False, default=str)])
        _write(folder / "evaluation.json", [json.dumps(evaluation.as_dict(), indent=1)])


_SHOWN = ("doc_id", "target", "filtered_resps", "filter", "metrics", "doc_hash", "prompt_hash", "target_hash")


def short_samples(evaluation: ModelEvaluation, cache: Path) -> dict[str, str]:
    """Samples of a stored evaluation without questions and raw answers, as JSON lines by task.

    They show which questions were answered right, for comparisons, and reveal nothing of the dataset.
    """
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
    """Return whether the samples, by the stem of their file, fit the scores: as many, and with their mean if it is one.

    The samples of a group, one of `groups`, are under the names of its tasks. Raises ValueError, KeyError, TypeError or
    ArithmeticError for malformed samples.
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
    """Return whether the samples of a task, or of every task within a group, exist."""
    if samples_file(Path(), task).stem in samples:
        return True
    within = [each for each in groups.get(task, ()) if each not in seen]
    seen.update(within)
    return bool(within) and all(_has_samples(each, samples, groups, seen) for each in within)


def structure(evaluation: ModelEvaluation, cache: Path) -> dict[str, Any]:
    """Tasks within each group and their numbers of questions, from lm_eval.json."""
    try:
        values = json.loads((folder_of(evaluation, cache) / "lm_eval.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return {name: values[name] for name in ("group_subtasks", "n-samples") if name in values}


def adopt(
    evaluation: ModelEvaluation, samples: Mapping[str, str], cache: Path, structure: Mapping[str, Any] | None = None
) -> None:
    """Store an evaluation that was made elsewhere."""
    with _stored_whole(cache, evaluation, dict(structure or {})) as folder:
        for task, text in samples.items():
            _write(folder / "samples" / f"{task}.jsonl", [text])


def _together(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """lm-eval's results of single tasks as it gives them for all at once."""
    made: dict[str, Any] = dict(parts[-1]) if parts else {}
    for name in _BY_TASK:
        entries = {key: value for part in parts for key, value in part.get(name, {}).items()}
        if entries:
            made[name] = entries
    return made


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
    """Data of a task; for a group, the data that all its tasks share."""
    if task in data:
        return None if data[task] is None else TaskData(**data[task])
    parts = list(data.values())
    if not parts or None in parts or len({part["repo"] for part in parts}) > 1:
        return None
    common = {name: value for name, value in parts[0].items() if all(part[name] == value for part in parts)}
    return TaskData(**{"config": None, "split": None, "revision": None, **common})
