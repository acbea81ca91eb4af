"""The suite that needs no download: the same questions everywhere, each with one right answer."""

from __future__ import annotations

import pytest

from evaluators.tasks import offline


@pytest.mark.parametrize("made", [offline.capitals, offline.sums])
def test_each_question_has_four_different_answers_and_no_place_is_preferred(made: object) -> None:
    rows = list(made()["test"])  # type: ignore[operator]
    assert len({row["prompt"] for row in rows}) >= len(rows) - 2
    assert all(len(set(row["choices"])) == 4 for row in rows)
    counts = [sum(row["answer"] == place for row in rows) for place in range(4)]
    assert min(counts) > len(rows) / 8


def test_sums_are_right_and_examples_are_no_questions() -> None:
    data = offline.sums()
    for row in (*data["test"], *data["train"]):
        first, second = (int(word) for word in row["prompt"].rstrip(" =").split(" + "))
        assert int(row["choices"][row["answer"]]) == first + second
    assert {row["prompt"] for row in data["train"]}.isdisjoint(row["prompt"] for row in data["test"])


def test_capitals_of_several_words_are_whole() -> None:
    answers = {row["prompt"]: row["choices"][row["answer"]] for row in offline.capitals()["test"]}
    assert answers["The capital of South Korea is"] == "Seoul"
    assert answers["The capital of Mexico is"] == "Mexico City"
    assert answers["The capital of the Netherlands is"] == "Amsterdam"
    assert len(answers) == len(set(answers.values()))


def test_the_same_seed_makes_the_same_questions() -> None:
    assert list(offline.echo()["test"]) == list(offline.echo()["test"])
    assert len({row["words"] for row in offline.echo()["test"]}) == offline.ECHOES
