"""What the worker does around the tasks: it looks whether a merge speaks, and may stop one that cannot win."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from bot.errors import Failed
from bot.jobs.job import Source
from bot.jobs.request import EvaluateOptions
from bot.settings import Settings
from bot.stages import early_stopping, sanity_check
from evaluators.harness.scores import ModelEvaluation
from tests import family
from tests.evaluators import stored

ASKED = EvaluateOptions(suite="demo-skills", limit=8)
SOURCES = tuple(Source(f"alice/{name}", number * 40, "mit", 10) for name, number in (("left", "a"), ("right", "b")))


def quiet(_text: str, _done: float, _total: float) -> None:
    """Nobody watches."""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = Settings(home=tmp_path / "bot", hub="http://127.0.0.1:1", device="cpu")
    made.evaluations.mkdir(parents=True)
    return made


@pytest.fixture
def merged(settings: Settings, tmp_path: Path) -> Path:
    """A merge in a folder, its sources where the bot keeps them."""
    folders = family.make(tmp_path / "family")
    for source in SOURCES:
        shutil.copytree(folders[source.repo.partition("/")[2]], settings.source_folder(source.repo, source.revision))
    return folders["base"]


def test_a_merge_that_talks_nonsense_fails_before_any_task(merged: Path, settings: Settings) -> None:
    found = sanity_check.sanity_checks(merged, "m" * 64, SOURCES, ASKED, settings, quiet)
    assert list(found) == ["", *map(str, SOURCES)]
    tensors = {name: tensor * 60 for name, tensor in load_file(merged / "model.safetensors").items()}
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Failed) as caught:
        sanity_check.sanity_checks(merged, "n" * 64, SOURCES, ASKED, settings, quiet)
    assert caught.value.code == "MODEL_NONSENSE" and "its worst parent" in caught.value.message


def test_a_source_is_looked_at_once_and_one_that_is_gone_is_no_obstacle(merged: Path, settings: Settings) -> None:
    first = sanity_check.sanity_checks(merged, "m" * 64, SOURCES[:1], ASKED, settings, quiet)
    for source in SOURCES:
        shutil.rmtree(settings.source_folder(source.repo, source.revision))
    again = sanity_check.sanity_checks(merged, "m" * 64, SOURCES, ASKED, settings, quiet)
    assert again == first  # the second source was never seen


def test_where_nothing_is_measured_nothing_is_looked_at(settings: Settings, tmp_path: Path) -> None:
    assert sanity_check.sanity_checks(tmp_path, "m", SOURCES, EvaluateOptions(suite="none"), settings, quiet) == {}
    assert sanity_check.compared(None, {}, settings) == (None, "")


def test_evaluations_that_cannot_be_compared_cost_nobody_the_evaluation(settings: Settings) -> None:
    merge, parent = (stored.evaluation(settings.evaluations, key, {"left": [1.0, 0.0]}) for key in ("m", "p"))
    other = replace(parent, environment=replace(parent.environment, dtype="bfloat16"))
    found, reason = sanity_check.compared(merge, {"org/a": other}, settings)
    assert found is None and "bfloat16" in reason
    assert sanity_check.compared(merge, {"org/a": parent}, settings)[0] is not None


# -- the first stage -------------------------------------------------------------------------------------------------

Answers = Mapping[str, Mapping[str, np.ndarray]]


def asking(
    answers: Answers, cache: Path, asked: list[int]
) -> tuple[Callable[[int], ModelEvaluation], dict[str, ModelEvaluation]]:
    """Measures a merge whose answers to every question are known, on the first of each task; its sources in full."""

    def evaluation(name: str, limit: int | None) -> ModelEvaluation:
        some = {task: values[:limit].tolist() for task, values in answers[name].items()}
        key = f"{id(asked)} {name or 'merge'} {limit}".replace("/", "-")
        return stored.evaluation(cache, key, some, environment=replace(stored.ENVIRONMENT, limit=limit))

    def ask(limit: int) -> ModelEvaluation:
        asked.append(limit)
        return evaluation("", limit)

    return ask, {name: evaluation(name, None) for name in answers if name}


def models(merge: float, parent: float, sizes: Mapping[str, int]) -> Answers:
    rng = np.random.default_rng(4)
    drawn = {name: {task: rng.random(size) < skill for task, size in sizes.items()}
             for name, skill in (("", merge), ("org/a@1", parent), ("org/b@2", 0.2))}  # fmt: skip
    return {name: {task: values.astype(float) for task, values in tasks.items()} for name, tasks in drawn.items()}


def test_a_hopeless_merge_is_stopped_and_a_good_one_measured_on(settings: Settings) -> None:
    sizes, few, many = {"left": 800, "right": 900}, list[int](), list[int]()
    chosen = settings.model_copy(update={"first_stage": 100})
    with pytest.raises(Failed) as caught:
        early_stopping.require_hope(*asking(models(0.3, 0.8, sizes), chosen.evaluations, few), chosen)
    assert few == [100] and caught.value.code == "NOT_BETTER" and caught.value.next_step
    assert caught.value.message == (
        "After 100 questions per task the merge cannot end better than org/a any more (error rate 5%)."
    )
    early_stopping.require_hope(*asking(models(0.8, 0.5, sizes), chosen.evaluations, many), chosen)
    assert many == [100, 200, 400]  # a look at more than half would not be worth it


def test_the_first_stage_is_off_unless_it_is_asked_for_and_never_asks_for_more_than_half(settings: Settings) -> None:
    asked: list[int] = []
    ask, sources = asking(models(0.1, 0.9, {"left": 50}), settings.evaluations, asked)
    early_stopping.require_hope(ask, sources, settings)
    early_stopping.require_hope(ask, sources, settings.model_copy(update={"first_stage": 30}))
    early_stopping.require_hope(ask, {}, settings.model_copy(update={"first_stage": 5}))
    assert asked == []
