"""lm-eval's tasks for one evaluation: loaded from just the folders that define them, and written down afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from evaluators.errors import EvaluationError

# What lm-eval's results say of the machine and its folders rather than of the model (hub.md 8.4).
_PRIVATE = frozenset(
    {"pretty_env_info", "git_hash", "upper_git_hash", "config_source", "dataset_kwargs", "model_args", "use_cache"}
)


def load(job: Mapping[str, Any]) -> list[Any]:
    """Task and Group objects of `job["tasks"]`, in order, each with its number of few-shot examples."""
    from lm_eval.tasks import TaskManager

    folders = sorted({str(Path(task["file"]).parent) for task in job["tasks"]})
    manager = TaskManager(include_path=folders, include_defaults=False)
    loaded = []
    for asked in job["tasks"]:
        try:
            found = manager.load([asked["name"]])
        except Exception as error:
            raise _unloaded(asked["name"], error, job["offline"]) from error
        for task in found["tasks"].values():
            # As lm-eval does: a task that is written for no examples at all keeps to that.
            if asked["few_shot"] is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=asked["few_shot"])
        groups = found.get("groups", {})
        loaded.append(groups[asked["name"]] if asked["name"] in groups else found["tasks"][asked["name"]])
    return loaded


def leaves(tasks: Iterable[Any]) -> Iterator[Any]:
    """The tasks themselves, those within groups included."""
    for task in tasks:
        if hasattr(task, "get_all_tasks"):
            yield from task.get_all_tasks()
        else:
            yield task


def write(results: Mapping[str, Any], tasks: list[Any], job: Mapping[str, Any]) -> dict[str, Any]:
    """Write samples and cleaned results into the job's folder; returns where each task's data came from."""
    from lm_eval.utils import handle_non_serializable

    folder = Path(job["folder"])
    (folder / "samples").mkdir()
    for name, samples in results["samples"].items():
        with (folder / "samples" / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps(sample, default=handle_non_serializable, ensure_ascii=False) + "\n")
    kept = cleaned({key: value for key, value in results.items() if key != "samples"}, job["private_paths"])
    (folder / "lm_eval.json").write_text(
        json.dumps(kept, default=lambda value: type(value).__name__, indent=1, ensure_ascii=False), encoding="utf-8"
    )
    return {task.config.task: _data(task, Path(job["hub_cache"])) for task in leaves(tasks)}


def cleaned(value: Any, private_paths: Iterable[str]) -> Any:
    """`value` without what describes this machine; `private_paths` are cut out of every string."""
    if isinstance(value, Mapping):
        return {str(key): cleaned(item, private_paths) for key, item in value.items() if key not in _PRIVATE}
    if isinstance(value, (list, tuple)):
        return [cleaned(item, private_paths) for item in value]
    if isinstance(value, str):
        for path in private_paths:
            value = value.replace(path, "")
    return value


def _data(task: Any, hub_cache: Path) -> dict[str, Any] | None:
    repo = task.config.dataset_path
    if not isinstance(repo, str) or "/" not in repo:
        return None  # a file format such as "json": the data are files of the operator
    main = hub_cache / f"datasets--{repo.replace('/', '--')}" / "refs" / "main"
    return {
        "repo": repo,
        "config": task.config.dataset_name,
        "split": task.config.test_split or task.config.validation_split,
        "revision": main.read_text(encoding="utf-8").strip() if main.is_file() else None,
    }


def _unloaded(name: str, error: Exception, offline: bool) -> EvaluationError:
    """A task whose data cannot be had, or whose file lm-eval does not understand."""
    chain = list(_causes(error))
    if any(_is_about_data(cause) for cause in chain):
        repos = [str(cause).splitlines()[0] for cause in chain if str(cause)]
        reason = "there is no Hub to load it from" if offline else repos[0].rstrip(".")[:300]
        return EvaluationError(
            "DATASET_UNAVAILABLE",
            f"The data of task `{name}` cannot be loaded: {reason}.",
            "Check that the Hub is reachable and that the dataset is public, or choose other tasks.",
        )
    return EvaluationError(
        "EVALUATION_FAILED",
        f"Task `{name}` cannot be set up: {(str(error).splitlines() or [type(error).__name__])[0][:300].rstrip('.')}.",
        "Look into the log of the evaluation.",
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_about_data(error: BaseException) -> bool:
    origin = type(error).__module__.split(".")[0]
    return origin in ("datasets", "huggingface_hub", "httpx", "httpx2", "httpcore", "requests") or isinstance(
        error, (ConnectionError, FileNotFoundError)
    )
