"""lm-eval's tasks for one evaluation: loaded from just the folders that define them, and written down afterwards."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bot.errors import EvaluationError
from evaluators.harness.results import finish, no_such_metric

# What lm-eval's results say of the machine and its folders rather than of the model (hub.md 8.4).
_PRIVATE = frozenset(
    {"pretty_env_info", "git_hash", "upper_git_hash", "config_source", "dataset_kwargs", "model_args", "use_cache"}
)


@dataclass(slots=True)
class Prepared:
    """One loaded task or group of the suite; it replaces lm-eval's TaskManager in the evaluation.

    lm-eval seeds, loads and evaluates. Loading ahead, for the estimate, restores the random numbers to their state
    after loading in lm-eval's own command line. `folder` is the working folder, the base of relative paths.
    """

    name: str
    key: str
    folder: str
    few_shot: int | None
    loaded: Mapping[str, Any]
    drawn: tuple[Any, ...]
    task_index: Mapping[str, Any] = field(default_factory=dict)

    def load(self, _names: Any) -> Mapping[str, Any]:
        os.chdir(self.folder)
        _set_random_state(self.drawn)
        return self.loaded

    @property
    def leaves(self) -> list[Any]:
        """The tasks themselves, those within groups included."""
        return list(self.loaded["tasks"].values())


def prepare(request: Mapping[str, Any], seeds: Mapping[str, int], *, offline: bool) -> Prepared:
    """Load one task of the job. Raises EvaluationError DATASET_UNAVAILABLE, DATASET_GATED, EVALUATION_FAILED."""
    os.chdir(request["folder"])
    try:
        loaded = _loaded(request, seeds)
    except Exception as error:
        raise _unloaded(request["name"], error, offline) from error
    return Prepared(request["name"], request["key"], request["folder"], request["few_shot"], loaded, _random_state())


def require_metric(task: Prepared, metric: str | None, kind: str) -> None:
    """Raises EvaluationError EVALUATION_FAILED if a task lacks this metric or filter.

    The metrics of a group are known only from its results.
    """
    names = [leaf.config.task for leaf in task.leaves]
    if metric is None or names != [task.name]:
        return
    [leaf] = task.leaves
    known = [f"{name},{each.name}" for each in leaf._filters for name in leaf.aggregation()]
    if f"{metric},{kind}" not in known:
        raise no_such_metric(task.name, f"{metric},{kind}", known)


def _loaded(request: Mapping[str, Any], seeds: Mapping[str, int]) -> Mapping[str, Any]:
    """The task from its file; only the needed part of lm-eval's index is built, since all of it takes 13 s."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry, Kind, TaskIndex

    manager = TaskManager(include_defaults=False)
    for name, file in request["files"].items():
        entry = TaskIndex.entry_from_path(Path(file))
        if entry is not None:
            manager.task_index[name] = replace(entry, name=name)  # the name of a group's entry is a list of tasks
    for tag, names in request["tags"].items():
        manager.task_index[tag] = Entry(tag, Kind.TAG, None, tags=set(names))
    _seed(seeds)
    return dict(manager.load([request["name"]]))


def _seed(seeds: Mapping[str, int]) -> None:
    """Seed as `lm_eval.simple_evaluate` does before it loads tasks."""
    import numpy as np
    from lm_eval.utils import set_torch_seed

    random.seed(seeds["random_seed"])
    np.random.seed(seeds["numpy_random_seed"])
    set_torch_seed(seeds["torch_random_seed"])


def _random_state() -> tuple[Any, ...]:
    import numpy as np
    import torch

    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_random_state(state: tuple[Any, ...]) -> None:
    import numpy as np
    import torch

    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


def write(results: Mapping[str, Any], task: Prepared, job: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write the samples of a task, its results and `facts`; this marks the task as finished."""
    from lm_eval.utils import handle_non_serializable

    samples = {
        name: (json.dumps(each, default=handle_non_serializable, ensure_ascii=False) + "\n" for each in found)
        for name, found in results["samples"].items()
    }
    kept = cleaned({key: value for key, value in results.items() if key != "samples"}, job["private_paths"])
    data = {leaf.config.task: _data(leaf, Path(job["hub_cache"])) for leaf in task.leaves}
    text = json.dumps(
        {"results": kept, "data": data, **facts}, default=lambda value: type(value).__name__, ensure_ascii=False
    )
    finish(Path(job["cache"]), task.key, text, samples)


def cleaned(value: Any, private_paths: Iterable[str]) -> Any:
    """`value` without descriptions of this machine; `private_paths` are cut out of every string."""
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
        return None  # a file format such as "json": the data are local files
    if Path(repo).exists():
        return None  # a local folder
    main = hub_cache / f"datasets--{repo.replace('/', '--')}" / "refs" / "main"
    return {
        "repo": repo,
        "config": task.config.dataset_name,
        "split": task.config.test_split or task.config.validation_split,
        "revision": main.read_text(encoding="utf-8").strip() if main.is_file() else None,
    }


def _unloaded(name: str, error: Exception, offline: bool) -> EvaluationError:
    """Error for a task whose data is unavailable or whose file lm-eval rejects."""
    chain = list(_causes(error))
    if any(type(cause).__name__ == "GatedRepoError" or "is a gated dataset" in str(cause) for cause in chain):
        return EvaluationError(
            "DATASET_GATED",
            f"The data of task `{name}` are gated: access requires accepting the terms of their owner.",
            "Choose other tasks, or put an accepted copy into the dataset cache.",
        )
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
