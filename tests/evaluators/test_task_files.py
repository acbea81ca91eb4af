"""Tasks are found, and their files read, as lm-eval's command line does it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bot.errors import EvaluationError
from evaluators import harness
from evaluators.harness import suites, task_files
from evaluators.harness.suites import ANY, Suite, SuiteTask
from tests.evaluators import tiny_harness

TASK = """\
task: {name}
output_type: multiple_choice
test_split: {split}
doc_to_text: prompt
doc_to_choice: ["cat", "dog"]
doc_to_target: 0
metric_list:
  - metric: acc
"""


def rows(path: Path, name: str, count: int) -> Path:
    """Questions that tell which file they come from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": f"{name} {number}"}) + "\n" for number in range(count)))
    return path


def write(file: Path, name: str, source: str, split: str = "test") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(TASK.format(name=name, split=split) + source)
    return file


def data(path: object) -> str:
    return f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {path}\n"


@pytest.mark.slow
def test_names_tags_and_files_are_those_of_lm_evals_own_index() -> None:
    from lm_eval.tasks._index import Kind, TaskIndex

    here = task_files.official().files["arc_easy"].parent.parent
    for name in ("arc", "glue", "super_glue", "mmlu", "hellaswag", "gsm8k", "leaderboard", "ruler", "inverse_scaling"):
        theirs = TaskIndex.build([here / name])
        ours = task_files._index(here / name)
        assert {name: entry.yaml_path for name, entry in theirs.items() if entry.yaml_path} == ours.files
        assert {name for name, entry in theirs.items() if entry.kind is Kind.GROUP} == ours.groups
        assert {
            name: tuple(sorted(entry.tags)) for name, entry in theirs.items() if entry.kind is Kind.TAG
        } == ours.tags


def test_a_tag_a_group_and_a_pattern_stand_for_their_tasks() -> None:
    def names(text: str) -> list[str]:
        return [task.name for task in suites.named(text)]

    assert names("ai2_arc") == ["arc_challenge", "arc_easy"]
    assert names("glue")[:3] == ["cola", "mnli", "mnli_mismatch"]
    assert {SuiteTask("arc_easy", "acc_norm"), SuiteTask("arc_zh", ANY)} <= {*suites.named("arc_*")}
    assert suites.named("ar[c]_easy") == (SuiteTask("arc_easy", "acc_norm"),)
    assert names("mmlu") == ["mmlu"]
    assert {"mmlu_stem", "mmlu_astronomy_generative"} <= {*names("mmlu_stem*")}
    assert "mmlu_anatomy" in task_files.located("mmlu").files and "mmlu_anatomy" not in names("mmlu_*")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("arc_eazy", "Did you mean `arc_easy`?"),
        ("hellaswg", "Did you mean `hellaswag`?"),
        ("our_own_questions", "`lm-eval ls tasks` lists the names."),
        ("sums", "`lm-eval ls tasks` lists the names."),
        ("none_of_*", "`lm-eval ls tasks` lists the names."),
    ],
)
def test_another_name_is_suggested_only_for_a_typing_error(name: str, hint: str) -> None:
    with pytest.raises(EvaluationError) as caught:
        suites.named(name)
    assert (caught.value.code, caught.value.next_step) == ("UNKNOWN_TASK", hint)


@pytest.mark.parametrize("asked", [("mmlu", "mmlu_anatomy"), ("leaderboard", "leaderboard_bbh"), ("glue", "cola")])
def test_a_task_is_not_asked_twice(asked: tuple[str, str]) -> None:
    with pytest.raises(EvaluationError) as caught:
        suites.require_distinct([task for text in asked for task in suites.named(text)])
    assert caught.value.code == "SUITE_INVALID" and asked[1] in caught.value.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a list\n", "it is not a mapping of keys to values"),
        ("task: [\n", "up to line 2"),
        ("task: one\ninclude: bad.yaml\n", "it includes itself"),
        ("task: one\ninclude: absent.yaml\n", "No such file"),
        ("[" * 5000, ""),
        ("output_type: multiple_choice\n", "defines no task"),
    ],
)
def test_a_file_that_is_no_task_file_is_said_to_be_none(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(EvaluationError) as caught:
        suites.named(str(tmp_path / "bad.yaml"))
    assert caught.value.code == "UNKNOWN_TASK" and words in caught.value.message
    assert "task: its_name" in caught.value.next_step


def test_data_that_are_not_there_are_named_before_anything_starts(tmp_path: Path) -> None:
    file = write(tmp_path / "t.yaml", "lost", data("data/lost.jsonl"))
    with pytest.raises(EvaluationError) as caught:
        suites.find(suites.named(str(file)))
    assert caught.value.code == "DATASET_UNAVAILABLE"
    assert caught.value.message == "The data file data/lost.jsonl of task `lost` does not exist."


def test_data_of_a_task_within_a_groups_file_begin_beside_it(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("{}\n")
    file = tmp_path / "group.yaml"
    member = {"task": "ours_inline", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "data.jsonl"}}}
    file.write_text(json.dumps({"group": "ours_group", "task": [member]}))
    found = task_files.located("ours_group", file)
    assert (found.folder, found.data) == (tmp_path, (tmp_path / "data.jsonl",))
    before = task_files.content("ours_group", file)
    (tmp_path / "data.jsonl").write_text("{}\n{}\n")
    assert task_files.content("ours_group", file) != before


def test_a_folder_stands_for_its_tasks_and_groups(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        write(tmp_path / f"{name}.yml", name, data(rows(tmp_path / f"{name}.jsonl", name, 2)))
    (tmp_path / "base.yaml").write_text("output_type: multiple_choice\n")
    (tmp_path / "all.yaml").write_text("group: all\ntask: [one, {group: inner, task: [two]}]\n")
    assert [task.name for task in suites.named(str(tmp_path))] == ["all", "three"]
    assert [task.name for task in suites.named(f"{tmp_path}/t*.yml")] == ["three", "two"]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[str]]:
    """The questions that were asked, by task."""
    place = tmp_path_factory.mktemp("asked")
    rows(place / "work" / "data" / "first.jsonl", "working folder", 2)
    rows(place / "tasks" / "data" / "first.jsonl", "unused", 2)
    rows(place / "tasks" / "data" / "part 1.jsonl", "beside", 2)
    rows(place / "tasks" / "mine" / "test.jsonl", "folder", 2)
    sources = {
        "working": data("data/first.jsonl"),
        "beside": data("data/part*.jsonl"),
        "directory": "dataset_path: json\ndataset_kwargs:\n  data_dir: mine\n",
        "folder": "dataset_path: ./mine\n",
    }
    for name, source in sources.items():
        write(place / "tasks" / f"{name}.yml", name, source)
    write(place / "tasks" / "v1.yaml", "twin", data(rows(place / "v1.jsonl", "old", 2)))
    write(place / "tasks" / "v2.yaml", "twin", data(rows(place / "v2.jsonl", "new", 2)))
    group = place / "group"
    (group / "words.py").parent.mkdir()
    (group / "words.py").write_text("def asked(row):\n    return 'said ' + row['prompt']\n")
    write(group / "base.yml", "base", data(rows(place / "group.jsonl", "member", 2)))
    (group / "plain.yml").write_text("include: base.yml\ntask: plain\ndoc_to_text: !function words.asked\n")
    (group / "tagged.yaml").write_text("include: base.yml\ntask: tagged\ntag: [few]\n")
    (group / "pets.yml").write_text("group: pets\ntask:\n- plain\n- group: inner\n  task: [few]\n")
    asked = [*(f"tasks/{name}.yml" for name in sources), "tasks/v2.yaml", "group/pets.yml"]
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place / "work")
        tasks = [task for text in asked for task in suites.named(f"../{text}")]
        found = tiny_harness.evaluate(
            tiny_harness.model(place / "model"),
            Suite("all", 1, tuple(tasks)),
            cache=place / "cache",
            scratch=place / "scratch",
            timeout_s=240,
            batch_size="4",
            environment={"OMP_NUM_THREADS": "1"},
        )
    # The group has no score of its own, so its members have; local data are no dataset repo.
    names = ["working", "beside", "directory", "folder", "twin", "plain", "tagged"]
    assert [(score.task, score.data) for score in found.scores] == [(name, None) for name in names]
    assert len(found.task_seconds) == len(names)
    return {file.stem: _prompts(file) for file in (harness.folder_of(found, place / "cache") / "samples").iterdir()}


def _prompts(file: Path) -> list[str]:
    samples: list[Any] = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(sample["arguments"][0][0] for sample in samples)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "source"),
    [
        ("working", "working folder"),
        ("beside", "beside"),
        ("directory", "folder"),
        ("folder", "folder"),
        ("twin", "new"),
        ("plain", "said member"),
        ("tagged", "member"),
    ],
)
def test_a_task_file_is_asked_from_the_data_it_names(task: str, source: str, samples: Mapping[str, list[str]]) -> None:
    assert samples[task] == [f"{source} 0", f"{source} 1"]
    assert len(samples) == 7
