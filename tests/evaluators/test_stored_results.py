"""An evaluation stored by an earlier build opens, compares and is written back unchanged.

`stored_results` was written by a real evaluation of a tiny model, before the classes that read it were renamed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from evaluators import comparison
from evaluators.comparison import samples
from evaluators.harness import folder_of, results
from evaluators.harness.scores import WHOLE

KEY = "63a3b7657f9bfab66f05487a7c1cd69b77b6dd5fad4e67f765829a0ad35b845a"
TASK_KEY = "40f5078f263764a8d481646eeee15d4c337fef0d3cf5b9ced7467f77a49ed257"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A copy, as `results.stored` deletes what it cannot read."""
    return Path(shutil.copytree(Path(__file__).parent / "stored_results", tmp_path / "cache"))


def test_a_stored_evaluation_opens_and_is_written_back_unchanged(cache: Path) -> None:
    found = results.stored(cache, KEY)
    assert found is not None and found.key == KEY
    [score] = found.scores
    assert (score.task, score.metric, score.samples, score.value) == ("which_animal", "acc", 3, 1 / 3)
    assert found.loaded is not None and found.loaded.ends == (1,)
    text = (folder_of(found, cache) / "evaluation.json").read_text(encoding="utf-8")
    written = found.as_dict()
    assert written["environment"].pop("reading") == WHOLE  # since then recorded
    assert json.dumps(written, indent=1) == text
    assert found.board == "8bd7181a71b6e41e"


def test_its_samples_are_read_and_compared(cache: Path) -> None:
    found = results.stored(cache, KEY)
    assert found is not None
    answers = samples.read(folder_of(found, cache), found.scores[0], {})
    assert answers.values.tolist() == [0.0, 0.0, 1.0]
    assert answers.choices is not None and all(answers.prompts)
    compared = comparison.compare(found, {"parent": found}, cache=cache)
    assert compared.tasks[0].same_choice == {"parent": 3}
    assert results.agrees(found, results.short_samples(found, cache), {})


def test_a_finished_task_is_used_again(cache: Path) -> None:
    stored = results.finished(cache, TASK_KEY)
    assert stored is not None and stored["results"]["results"]["which_animal"]["acc,none"] == 1 / 3
