"""A parent's evaluation in the results dataset is taken for what it is, and for nothing else."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bot.hub import Hub
from bot.jobs import shared_evaluations
from bot.jobs.request import EvaluateOptions
from bot.localhub import seed
from bot.settings import Settings
from bot.stages import evaluation
from evaluators.harness import results
from evaluators.harness.eval_config import LIBRARIES, Question
from evaluators.harness.scores import Environment, ModelEvaluation, Score
from tests.localhub.server import RunningHub, running_hub

MODEL = "alice/parent@" + "a" * 40
REPO = "mergebot/mergebot-results"
RIGHT = {"offline_capitals": 3, "offline_sums": 2, "offline_echo": 4}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[RunningHub]:
    with running_hub(tmp_path / "hub") as running:
        yield running


def asked(settings: Settings) -> Question:
    return evaluation.question_of(EvaluateOptions(suite="offline", limit=5), settings)


def settings_of(hub: RunningHub, home: Path) -> Settings:
    return Settings(home=home, hub=hub.url)


def stored(settings: Settings) -> ModelEvaluation:
    """An evaluation as the harness leaves it, in the cache of `settings`."""
    put, scores, samples = asked(settings), [], {}
    for task in put.suite.tasks:
        values = [float(place < RIGHT[task.name]) for place in range(5)]
        share = sum(values) / 5
        stderr = math.sqrt(share * (1 - share) / 4)
        scores.append(Score(task.name, task.metric, share, stderr, 5, task.few_shot or 0, True, "1.0"))
        shown = {"target": 0, "filtered_resps": ["a\u2028b"], "filter": "none", "metrics": [task.metric]}
        hidden = {"doc": {"secret": 1}, "arguments": [["the question", "b"]], "resps": [[[0.0, True]]]}
        rows = ({"doc_id": place, **hidden, **shown, task.metric: value} for place, value in enumerate(values))
        samples[task.name] = "".join(json.dumps(row) + "\n" for row in rows)
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    environment = Environment("cpu", "float32", "auto", False, 0, **versions, limit=5)
    key = put.key(MODEL)
    made = ModelEvaluation("offline", put.suite.digest, tuple(scores), environment, 1.0, key=key, smallest_batch=16)
    results.adopt(made, samples, settings.evaluations)
    return made


def publish(folder: Path, files: dict[str, str], hub: RunningHub) -> None:
    for path, text in files.items():
        target = folder / "datasets" / REPO / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    seed(hub.root, folder)


def told(files: dict[str, str]) -> dict[str, Any]:
    return dict(json.loads(next(text for path, text in files.items() if path.endswith("evaluation.json"))))


def test_what_one_machine_measured_another_one_takes_with_its_samples(hub: RunningHub, tmp_path: Path) -> None:
    here, there = settings_of(hub, tmp_path / "here"), settings_of(hub, tmp_path / "there")
    made = stored(here)
    files = shared_evaluations._files_of(MODEL, made, here)
    assert len(files) == 4 and not any("secret" in text or "the question" in text for text in files.values())
    publish(tmp_path / "content", files, hub)
    assert shared_evaluations.take(Hub(hub.url), REPO, asked(there), MODEL, there)
    assert results.stored(there.evaluations, made.key) == made
    lines = (results.folder_of(made, there.evaluations) / "samples" / "offline_sums.jsonl").read_text().split("\n")[:-1]
    assert [json.loads(line)["acc"] for line in lines] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert shared_evaluations._files_of(MODEL, made, there) == files


def _scores_raised(evaluation: dict[str, Any]) -> None:
    evaluation["evaluation"]["scores"][0]["value"] = 0.8


def _of_another_model(evaluation: dict[str, Any]) -> None:
    evaluation["model"] = "bob/parent@" + "a" * 40


def _of_other_versions(evaluation: dict[str, Any]) -> None:
    evaluation["evaluation"]["environment"]["torch"] = "1.0"


def _of_another_limit(evaluation: dict[str, Any]) -> None:
    evaluation["evaluation"]["environment"]["limit"] = 4


def _without_a_task(evaluation: dict[str, Any]) -> None:
    evaluation["evaluation"]["scores"].pop()


def _not_a_number(evaluation: dict[str, Any]) -> None:
    evaluation["evaluation"]["scores"][0]["value"] = float("nan")


def _of_another_kind(evaluation: dict[str, Any]) -> None:
    evaluation["evaluation"]["scores"] = "all"


def _out_of_its_folder(evaluation: dict[str, Any]) -> None:
    evaluation["samples"] = {"../../evaluation": "0" * 64}


def _without_samples(evaluation: dict[str, Any]) -> None:
    evaluation["samples"] = {}


def _beyond_the_whole(evaluation: dict[str, Any]) -> None:
    evaluation["evaluation"]["scores"][0]["value"] = 60.0


def _of_another_metric(evaluation: dict[str, Any]) -> None:
    evaluation["evaluation"]["scores"][0]["metric"] = "acc_norm"


def _with_other_shots(evaluation: dict[str, Any]) -> None:
    evaluation["evaluation"]["scores"][1]["few_shot"] = 0


def _without_the_samples_of_a_task(evaluation: dict[str, Any]) -> None:
    del evaluation["samples"]["offline_echo"]


def _as_a_group_of_nothing(evaluation: dict[str, Any]) -> None:
    del evaluation["samples"]["offline_echo"]
    evaluation["structure"] = {"group_subtasks": {"offline_echo": ["offline_echo", "inner"], "inner": ["offline_echo"]}}


def _of_another_device(evaluation: dict[str, Any]) -> None:
    evaluation["evaluation"]["environment"]["device"] = "cuda:0"


def _of_another_type(evaluation: dict[str, Any]) -> None:
    evaluation["evaluation"]["environment"]["dtype"] = "bfloat16"


def _too_large_for_a_number(evaluation: dict[str, Any]) -> None:
    evaluation["evaluation"]["scores"][0]["value"] = 10**400


@pytest.mark.parametrize(
    "spoil",
    [_beyond_the_whole, _of_another_metric, _with_other_shots, _without_the_samples_of_a_task, _as_a_group_of_nothing,
     _of_another_device, _of_another_type, _too_large_for_a_number, _scores_raised, _of_another_model,
     _of_other_versions, _of_another_limit, _without_a_task, _not_a_number, _of_another_kind, _out_of_its_folder,
     _without_samples],
)  # fmt: skip
def test_an_evaluation_that_does_not_hold_good_is_left(
    spoil: Callable[[dict[str, Any]], None], hub: RunningHub, tmp_path: Path
) -> None:
    here, there = settings_of(hub, tmp_path / "here"), settings_of(hub, tmp_path / "there")
    files = shared_evaluations._files_of(MODEL, stored(here), here)
    evaluation = told(files)
    spoil(evaluation)
    files = {path: json.dumps(evaluation) if path.endswith("n.json") else text for path, text in files.items()}
    publish(tmp_path / "content", files, hub)
    assert not shared_evaluations.take(Hub(hub.url), REPO, asked(there), MODEL, there)
    assert not (there.evaluations / "results").exists()


def test_samples_that_were_changed_or_are_gone_are_not_taken(hub: RunningHub, tmp_path: Path) -> None:
    here, there = settings_of(hub, tmp_path / "here"), settings_of(hub, tmp_path / "there")
    files = shared_evaluations._files_of(MODEL, stored(here), here)
    path = next(path for path in files if path.endswith("offline_sums.jsonl"))
    publish(tmp_path / "changed", files | {path: files[path].replace('"doc_id": 0', '"doc_id": 7')}, hub)
    assert not shared_evaluations.take(Hub(hub.url), REPO, asked(there), MODEL, there)


@pytest.mark.parametrize("value", [f"{10**400}", "1e999", "NaN", '"much"', "[1]"])
def test_samples_that_are_no_numbers_are_not_taken(value: str, hub: RunningHub, tmp_path: Path) -> None:
    """Their digest is right: whoever wrote them wrote it, too."""
    here, there = settings_of(hub, tmp_path / "here"), settings_of(hub, tmp_path / "there")
    files = shared_evaluations._files_of(MODEL, stored(here), here)
    path = next(path for path in files if path.endswith("offline_sums.jsonl"))
    text = files[path].replace('"acc": 1.0', f'"acc": {value}', 1)
    assert text != files[path]
    evaluation = told(files)
    evaluation["samples"]["offline_sums"] = hashlib.sha256(text.encode()).hexdigest()
    whole = next(path for path in files if path.endswith("evaluation.json"))
    publish(tmp_path / "content", files | {path: text, whole: json.dumps(evaluation)}, hub)
    assert not shared_evaluations.take(Hub(hub.url), REPO, asked(there), MODEL, there)


def test_without_a_dataset_or_a_hub_the_parent_is_measured(hub: RunningHub, tmp_path: Path) -> None:
    settings = settings_of(hub, tmp_path / "home")
    assert not shared_evaluations.take(Hub(hub.url), REPO, asked(settings), MODEL, settings)
    away = Hub("http://127.0.0.1:9", deadline_s=0.5)
    assert not shared_evaluations.take(away, REPO, asked(settings), MODEL, settings)


def test_an_evaluation_of_another_suite_has_another_name(hub: RunningHub, tmp_path: Path) -> None:
    settings = settings_of(hub, tmp_path / "home")
    put = asked(settings)
    other = replace(put, suite=replace(put.suite, version=2))
    assert put.key(MODEL) != other.key(MODEL)
