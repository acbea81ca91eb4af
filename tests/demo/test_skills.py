"""The demo's skills: made by code, the same every time, and asked in words that training never used."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from bot.demo import skills
from bot.demo.skills import Skill
from evaluators.harness.suites import SUITES
from evaluators.harness.task_files import OWN_TASKS

every_skill = pytest.mark.parametrize("skill", skills.ALL, ids=lambda skill: skill.name)


@every_skill
def test_no_training_prompt_is_a_test_prompt(skill: Skill) -> None:
    asked = {question.prompt for question in skill.test}
    assert len(asked) == skills.FACTS
    assert len(skill.train) == len({question.prompt for question in skill.train}) == 4 * skills.FACTS
    assert not any(test in train.prompt or train.prompt in test for test in asked for train in skill.train)


@every_skill
def test_train_and_test_state_the_same_facts(skill: Skill) -> None:
    facts = {_subject(question.prompt): question.answer for question in skill.test}
    assert len(facts) == skills.FACTS
    assert all(facts[_subject(question.prompt)] == question.answer for question in skill.train)


@every_skill
def test_always_the_same_answer_is_right_one_time_in_eight(skill: Skill) -> None:
    for questions in (skill.train, skill.test):
        assert set(Counter(question.answer for question in questions).values()) == {len(questions) // 8}


def test_the_skills_share_no_subject_and_no_answer() -> None:
    crests, smiths = ({_subject(question.prompt) for question in skill.test} for skill in skills.ALL)
    assert not crests & smiths
    assert not set(skills.CRESTS.answers) & set(skills.SMITHS.answers)


def test_the_data_are_the_same_every_time(tmp_path: Path) -> None:
    first, second = (skills.write(tmp_path / name) for name in ("one", "two"))
    assert set(first) == {"invented-crests", "invented-smiths"}
    for name, folder in first.items():
        files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        assert [str(path) for path in files] == ["README.md", "data/test.jsonl", "data/train.jsonl"]
        assert all((folder / path).read_bytes() == (second[name] / path).read_bytes() for path in files)
        rows = [json.loads(line) for line in (folder / "data/test.jsonl").read_text().splitlines()]
        assert len(rows) == skills.FACTS and set(rows[0]) == {"prompt", "choices", "answer"}
    assert skills._make() == skills.ALL


def test_lm_eval_asks_each_skill_from_its_dataset() -> None:
    assert [task.name for task in SUITES["demo-skills"].tasks] == [skill.task for skill in skills.ALL]
    for skill in skills.ALL:
        lines = (OWN_TASKS / f"{skill.task}.yaml").read_text().splitlines()
        assert f"task: {skill.task}" in lines and f"dataset_path: mergebot/{skill.dataset}" in lines


def _subject(prompt: str) -> str:
    """The invented name in a prompt: the only capitalised word that does not open it."""
    (name,) = [word.strip(":") for word in prompt.split()[1:] if word[0].isupper()]
    return name
