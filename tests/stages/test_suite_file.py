"""What the operator may ask to be measured, and what a stranger may not."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bot.errors import Failed, MergebotError, Refused
from bot.jobs.request import EvaluateOptions, read_block
from bot.service import intake
from bot.stages import suite_file
from evaluators.harness.suites import ANY, SUITES, SuiteTask
from tests.evaluators import tiny_harness

WHOLE = """\
name: mine
version: 3
about: Two of lm-eval's and one of ours.
tasks:
- arc_easy
- {task: gsm8k, few_shot: 3, metric: exact_match, filter: flexible-extract}
- {task: which_animal, file: which_animal.yaml}
"""


def write(folder: Path, text: str) -> Path:
    tiny_harness.task(folder, "which_animal")
    file = folder / "mine.yml"
    file.write_text(text)
    return file


def test_a_suite_file_says_tasks_shots_metrics_and_files(tmp_path: Path) -> None:
    made = suite_file.chosen(str(write(tmp_path, WHOLE)))
    assert (made.name, made.version, made.about) == ("mine", 3, "Two of lm-eval's and one of ours.")
    assert made.tasks == (
        SuiteTask("arc_easy", "acc_norm"),
        SuiteTask("gsm8k", "exact_match", 3, "flexible-extract"),
        SuiteTask("which_animal", ANY, file=(tmp_path / "which_animal.yaml").resolve()),
    )
    before = made.digest
    (tmp_path / "which_animal.yaml").write_text((tmp_path / "which_animal.yaml").read_text() + "repeats: 2\n")
    assert suite_file.chosen(str(tmp_path / "mine.yml")).digest != before


@pytest.mark.parametrize(
    ("text", "code", "line", "words"),
    [
        ("name: mine\n", "SUITE_INVALID", 1, "no `tasks`"),
        ("tasks: [arc_easy]\n", "SUITE_INVALID", 1, "no `name`"),
        ("name: quick\ntasks: [arc_easy]\n", "SUITE_INVALID", 1, "of the bot's own"),
        ("name: mine\ntasks: [arc_easy, arc_easy]\n", "SUITE_INVALID", 2, "`arc_easy` twice"),
        ("name: mine\ntasks: []\n", "SUITE_INVALID", 2, "no task"),
        ("name: mine\ntasks: arc_easy\n", "SUITE_INVALID", 2, "`tasks` is `arc_easy`"),
        ("name: mine\ntasks:\n- {task: arc_easy, fewshot: 2}\n", "UNKNOWN_KEY", 3, "fewshot"),
        ("name: mine\ntasks:\n- {task: arc_easy, few_shot: -1}\n", "VALUE_OUT_OF_RANGE", 3, "few_shot"),
        ("name: mine\ntasks:\n- {task: arc_easy, chance: 0.25}\n- piqa\n", "SUITE_INVALID", 3, "chance"),
        ("name: mine\ntasks:\n- {task: other, file: none.yaml}\n", "SUITE_INVALID", 3, "no such task file"),
        ("name: mine\ntasks: [arc_eazy]\n", "UNKNOWN_TASK", None, "arc_eazy"),
        ("name: &a [*a]\n", "SUITE_INVALID", 1, ""),
        ("[" * 5000, "SUITE_INVALID", 1, "deep"),
        ("name: !!python/name:os.system\ntasks: []\n", "SUITE_INVALID", 1, "tag"),
    ],
)
def test_a_suite_file_with_a_mistake_is_refused_with_its_line(
    text: str, code: str, line: int | None, words: str, tmp_path: Path
) -> None:
    with pytest.raises(Refused) as caught:
        suite_file.chosen(str(write(tmp_path, text)))
    assert caught.value.code == code and words in caught.value.message
    assert caught.value.where is not None and caught.value.where.line == line
    assert caught.value.next_step


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(Failed) as caught:
        suite_file.chosen(str(tmp_path / "absent.yml"))
    assert caught.value.code == "FILE_NOT_FOUND"


@given(st.text(max_size=200))
def test_no_text_of_a_suite_file_makes_a_traceback(text: str) -> None:
    try:
        suite_file._suite(text, Path("mine.yml"))
    except MergebotError as error:
        assert str(error)


def test_the_operator_may_name_any_task_of_lm_eval_and_files(tmp_path: Path) -> None:
    tiny_harness.task(tmp_path, "which_animal")
    file = str(tmp_path / "which_animal.yaml")
    assert suite_file.chosen("quick", ["lambada_openai"]).tasks == (SuiteTask("lambada_openai", ANY),)
    both = suite_file.chosen("quick", [file, "arc_easy"])
    assert both.name == "which_animal+arc_easy" and both.tasks[0].file == Path(file).resolve()
    with pytest.raises(Refused) as caught:
        suite_file.chosen("quick", [str(tmp_path / "absent.yaml")])
    assert caught.value.code == "UNKNOWN_TASK"


@pytest.mark.parametrize(
    "asked",
    [
        EvaluateOptions(suite="mine.yml"),
        EvaluateOptions(suite="../mine"),
        EvaluateOptions(tasks=("lambada_openai",)),
        EvaluateOptions(tasks=("task.yaml",)),
    ],
)
def test_a_stranger_can_name_nothing_but_what_is_on_the_list(asked: EvaluateOptions) -> None:
    with pytest.raises(Refused) as caught:
        intake.check_evaluation(asked)
    assert caught.value.code == "UNKNOWN_TASK"


def test_a_card_cannot_name_tasks_or_files() -> None:
    for key in ("tasks: [arc_easy]", "file: x.yaml", "backend: vllm"):
        with pytest.raises(Refused) as caught:
            read_block(f"---\nmergebot:\n  version: 1\n  evaluate: {{{key}}}\n---\n")
        assert caught.value.code == "UNKNOWN_KEY"


def test_every_suite_says_what_it_is_and_its_name_is_its_key() -> None:
    for name, suite in SUITES.items():
        assert suite.name == name and suite.about.endswith(".") and suite.tasks
        assert len({task.chance is None for task in suite.tasks}) == 1
    assert len({suite.digest for suite in SUITES.values()}) == len(SUITES)
