"""A merge beside its parents: what is said of it, what is not, and when nothing may be compared."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bot.errors import EvaluationError
from evaluators import comparison, harness
from evaluators.comparison import comparing, report
from evaluators.comparison.report import inheritance, words
from evaluators.comparison.verdict import Comparison, Difference, Outcome
from evaluators.harness.scores import ModelEvaluation
from tests.evaluators import stored

Make = Callable[..., ModelEvaluation]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    number = count()

    def evaluation(**options: Any) -> ModelEvaluation:
        tasks = {name: options.pop(name) for name in ("left", "right", "third") if name in options}
        return stored.evaluation(tmp_path, f"{next(number):064x}", tasks, **options)

    return evaluation


def first(right: int, of: int) -> list[float]:
    return [1.0] * right + [0.0] * (of - right)


def last(right: int, of: int) -> list[float]:
    return first(right, of)[::-1]


def test_a_merge_of_two_skills_is_better_than_each_parent_where_that_one_is_weak(make: Make, tmp_path: Path) -> None:
    merge = make(left=first(95, 100), right=first(90, 100))
    crests, smiths = make(left=first(97, 100), right=first(12, 100)), make(left=first(10, 100), right=first(92, 100))
    found = comparison.compare(merge, {"org/crests@abc": crests, "org/smiths@def": smiths}, cache=tmp_path)
    left, right = found.tasks
    assert [each.outcome for each in left.differences] == [Outcome.NOT_SHOWN, Outcome.BETTER]
    assert words(left.differences).startswith("better than org/smiths, no difference to org/crests shown (")
    assert [each.outcome for each in right.differences] == [Outcome.BETTER, Outcome.NOT_SHOWN]
    assert found.overall is not None and words(found.overall.differences) == "better than both"
    assert found.overall.merge.value == pytest.approx(0.925)
    assert (left.merge.value, left.chance, left.samples) == (0.95, 1 / stored.CHOICES, 100)
    assert (left.differences[1].won, left.differences[1].lost) == (85, 0)


def test_nothing_is_said_that_the_questions_cannot_show(make: Make, tmp_path: Path) -> None:
    merge, parents = make(left=first(6, 8)), {name: make(left=last(5, 8)) for name in ("org/a", "org/b")}
    [task] = comparison.compare(merge, parents, cache=tmp_path).tasks
    assert words(task.differences) == (
        f"no difference shown (a true one under {100 * task.differences[0].detectable:.1f} points "
        "would be missed in more than one of five such measurements)"
    )
    assert task.differences[0].detectable > 0.5


def test_the_more_is_compared_the_more_it_takes(make: Make, tmp_path: Path) -> None:
    def judged(tasks: int) -> Difference:
        names = ("left", "right", "third")[:tasks]
        merge = make(**{name: first(60, 100) if name == "left" else first(50, 100) for name in names})
        parent = make(**{name: first(54, 100) if name == "left" else first(50, 100) for name in names})
        return comparison.compare(merge, {"p": parent}, cache=tmp_path).tasks[0].differences[0]

    alone, among_three = judged(1), judged(3)
    assert alone.p == among_three.p == pytest.approx(2**-6)
    assert (alone.outcome, among_three.outcome) == (Outcome.BETTER, Outcome.BETTER)
    assert among_three.adjusted_p == pytest.approx(3 * alone.p)
    assert among_three.detectable > alone.detectable


def test_the_average_is_corrected_for_the_number_of_parents(make: Make, tmp_path: Path) -> None:
    merge, parent = (make(left=first(at, 100), right=first(at, 80)) for at in (60, 56))
    alone, of_two = (
        comparison.compare(merge, dict.fromkeys(names, parent), cache=tmp_path).overall for names in ("a", "ab")
    )
    assert alone is not None and of_two is not None
    [single], [each, _] = alone.differences, of_two.differences
    assert each.p == single.p == single.adjusted_p and each.adjusted_p == pytest.approx(2 * single.p)
    assert each.detectable > single.detectable


def test_whose_answers_a_merge_gives_is_counted(make: Make, tmp_path: Path) -> None:
    first_parent, second_parent = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    merge = make(left=[1.0, 0.0, 1.0, 0.0, 1.0, 0.0], wrong_choice=2)
    parents = {"org/a@1": make(left=first_parent, wrong_choice=2), "org/b@2": make(left=second_parent)}
    [task] = comparison.compare(merge, parents, cache=tmp_path).tasks
    assert inheritance(task.patterns) == (
        "Where both parents are right, the merge is right on 1 of 2.",
        "Where only org/a is right, the merge is right on 1 of 1.",
        "Where only org/b is right, the merge is right on 0 of 1.",
        "Where no parent is right, the merge is right on 1 of 2.",
    )
    # org/a picks the merge's wrong choice too where both are wrong (question 5), org/b another one
    assert dict(task.same_choice) == {"org/a@1": 4, "org/b@2": 1}


answers = st.lists(st.sampled_from([0.0, 1.0]), min_size=3, max_size=30)


@settings(max_examples=20, deadline=None)
@given(answers, st.randoms(use_true_random=False))
def test_the_order_of_questions_does_not_matter_and_sides_mirror(values: list[float], order: Any) -> None:
    other = [1 - value if at % 3 == 0 else value for at, value in enumerate(values)]
    shuffled = list(range(len(values)))
    order.shuffle(shuffled)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        one, two = (stored.evaluation(cache, key, {"left": each}) for key, each in (("a", values), ("b", other)))
        again = stored.evaluation(cache, "c", {"left": other}, order=shuffled)
        [task], [same], [mirrored] = (
            comparison.compare(merge, {"p": parent}, cache=cache).tasks
            for merge, parent in ((one, two), (one, again), (two, one))
        )
    assert task == same
    [difference], [mirror] = task.differences, mirrored.differences
    assert (mirror.won, mirror.lost, mirror.p) == (difference.lost, difference.won, difference.p)
    assert mirror.interval == pytest.approx((-difference.interval[1], -difference.interval[0]))


@pytest.mark.parametrize("unit", [1.0, 0.02])  # a loss below 1 is no share either
def test_graded_answers_are_judged_by_flipped_signs_and_less_can_be_better(
    unit: float, make: Make, tmp_path: Path
) -> None:
    rng = np.random.default_rng(2)
    base = unit * rng.gamma(2.0, 1.0, 60)
    worse = base + unit * rng.normal(0.4, 0.3, 60)
    merge = make(left=base.tolist(), metric="loss", higher_is_better=False)
    parent = make(left=worse.tolist(), metric="loss", higher_is_better=False)
    found = comparison.compare(merge, {"p": parent}, cache=tmp_path)
    [difference] = found.tasks[0].differences
    assert difference.test == comparing.SIGN_FLIP and difference.outcome is Outcome.BETTER
    assert difference.value > 0 and difference.interval[0] > 0
    [row] = report.differences(found)
    assert row.difference.value == f"{difference.value:+.3g}"  # in nats: only shares are points
    assert f"{found.tasks[0].merge.value:.3g}" == report.scores({"": merge, "p": parent}, found)[0].figures[""].value
    assert "in the metric's own unit" in report.legend(found)
    assert found.overall is None  # a loss is no share, so it has no place in an average of shares


def test_a_comparison_survives_its_own_json(make: Make, tmp_path: Path) -> None:
    merge, parent = make(left=first(5, 9), right=[0.5, 0.25, 1.0]), make(left=last(5, 9), right=[0.25, 0.5, 0.0])
    found = comparison.compare(merge, {"org/a@1": parent}, cache=tmp_path)
    assert Comparison.from_dict(json.loads(json.dumps(found.as_dict()))) == found
    assert comparison.compare(merge, {"org/a@1": parent}, cache=tmp_path) == found


def shuffled_ids(evaluation: ModelEvaluation, cache: Path) -> ModelEvaluation:
    path = harness.folder_of(evaluation, cache) / "samples" / "left.jsonl"
    path.write_text(path.read_text().replace('"doc_id": 3', '"doc_id": 33'))
    return evaluation


def without_answers(evaluation: ModelEvaluation, cache: Path) -> ModelEvaluation:
    (harness.folder_of(evaluation, cache) / "samples" / "left.jsonl").unlink()
    return evaluation


def rewritten(old: str, new: str) -> Callable[[ModelEvaluation, Path], ModelEvaluation]:
    def spoil(evaluation: ModelEvaluation, cache: Path) -> ModelEvaluation:
        path = harness.folder_of(evaluation, cache) / "samples" / "left.jsonl"
        path.write_text(path.read_text().replace(old, new, 1))
        return evaluation

    return spoil


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda found, cache: replace(found, suite_digest="e" * 64), "which are not the same questions"),
        (
            lambda found, cache: replace(found, environment=replace(found.environment, dtype="bfloat16")),
            "in float32 and in bfloat16",
        ),
        (
            lambda found, cache: replace(found, environment=replace(found.environment, chat_template=True)),
            "as plain text and with its chat template",
        ),
        (lambda found, cache: replace(found, scores=(replace(found.scores[0], task_version="2.0"),)), "version 2.0"),
        (lambda found, cache: replace(found, scores=()), "it has no score of task `left`"),
        (shuffled_ids, "it has other questions of task `left`"),
        (without_answers, "The answers to task `left` were not kept"),
        (rewritten('"filter"', '"fil'), "The answers to task `left` cannot be read"),
        (rewritten('"doc_id"', '"id"'), "The answers to task `left` cannot be read"),
        (rewritten('"acc": 1.0', f'"acc": {10**400}'), "The answers to task `left` cannot be read"),
        (rewritten("[[-1.0, false]", '[["much", false]'), "The answers to task `left` cannot be read"),
        (rewritten("{", "[" * 100_000), "The answers to task `left` cannot be read"),
    ],
)
def test_only_the_same_questions_asked_in_the_same_way_are_compared(
    spoil: Callable[[ModelEvaluation, Path], ModelEvaluation], reason: str, make: Make, tmp_path: Path
) -> None:
    merge, parent = make(left=first(5, 9)), spoil(make(left=first(4, 9)), tmp_path)
    with pytest.raises(EvaluationError) as caught:
        comparison.compare(merge, {"org/a": parent}, cache=tmp_path)
    assert caught.value.code == "NOT_COMPARABLE"
    assert reason in caught.value.message and caught.value.next_step


def test_a_score_that_is_no_mean_over_questions_is_left_out_with_the_reason(make: Make, tmp_path: Path) -> None:
    merge, parent = make(left=first(5, 9), right=first(2, 4)), make(left=first(4, 9), right=first(1, 4))
    corpus = replace(merge, scores=(merge.scores[0], replace(merge.scores[1], value=0.77)))
    found = comparison.compare(corpus, {"org/a": parent}, cache=tmp_path)
    assert [task.task for task in found.tasks] == ["left"]
    assert [(each.task, each.because) for each in found.left_out] == [
        ("right", "its score is not the mean of its questions' values")
    ]


def test_a_group_is_judged_on_the_questions_of_all_its_tasks(tmp_path: Path) -> None:
    made = []
    answers = {"a": {"left": first(5, 9), "right": first(1, 4)}, "b": {"left": first(2, 9), "right": first(0, 4)}}
    for key, values in answers.items():
        parts = stored.evaluation(tmp_path, key, values)
        subtasks = {"animals": ["inner", "right"], "inner": ["left"]}
        if key == "a":  # the merge's: a parent's may have come without
            (harness.folder_of(parts, tmp_path) / "lm_eval.json").write_text(json.dumps({"group_subtasks": subtasks}))
        mean = sum(sum(each) for each in values.values()) / 13
        made.append(replace(parts, scores=(replace(parts.scores[0], task="animals", value=mean, samples=13),)))
    [task] = comparison.compare(made[0], {"p": made[1]}, cache=tmp_path).tasks
    assert (task.samples, task.differences[0].won, task.differences[0].lost) == (13, 4, 0)


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_answers_that_came_without_questions_are_compared_all_the_same(metric: str, make: Make, tmp_path: Path) -> None:
    """An evaluation taken over from the results dataset: no questions, no lm_eval.json."""
    merge, parent = make(left=first(5, 9), metric=metric), make(left=first(2, 9), metric=metric)
    whole = comparison.compare(merge, {"p": parent}, cache=tmp_path).tasks[0]
    path = harness.folder_of(parent, tmp_path) / "samples" / "left.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({key: row[key] for key in row if key != "arguments"}) + "\n" for row in rows))
    [task] = comparison.compare(merge, {"p": parent}, cache=tmp_path).tasks
    assert task.differences == whole.differences and task.patterns == whole.patterns
    assert dict(whole.same_choice) == {"p": 6}
    assert dict(task.same_choice) == ({"p": 6} if metric == "acc" else {})


def drawn(rng: np.random.Generator, skill: Sequence[float]) -> list[float]:
    return [float(each) for each in rng.random(len(skill)) < np.array(skill)]


def test_equal_models_are_called_different_in_at_most_one_of_twenty_comparisons(tmp_path: Path) -> None:
    """Three equally able models, two tasks: any word but `no difference shown` is a false alarm."""
    rng = np.random.default_rng(6)
    alarms, averaged = [], []
    for number in range(150):
        skills = {"left": rng.uniform(0.3, 0.9, 40), "right": rng.uniform(0.1, 0.6, 40)}
        made = [
            stored.evaluation(
                tmp_path, f"{number}-{model}", {task: drawn(rng, skill) for task, skill in skills.items()}
            )
            for model in range(3)
        ]
        found = comparison.compare(made[0], {"a": made[1], "b": made[2]}, cache=tmp_path)
        alarms.append(any(each.outcome is not Outcome.NOT_SHOWN for task in found.tasks for each in task.differences))
        averaged.append(
            found.overall is not None
            and any(each.outcome is not Outcome.NOT_SHOWN for each in found.overall.differences)
        )
    assert np.mean(averaged) <= 0.08  # the averages are corrected by themselves
    assert np.mean(alarms) <= 0.08  # 5 % and three standard errors of 150 comparisons, less what Holm is short of it


def test_tasks_that_tell_the_parents_apart_in_little_time_come_first(make: Make, tmp_path: Path) -> None:
    """`left` tells them apart, `right` as much at ten times the price, `third` not at all."""
    tasks = {"left": first(60, 80), "right": first(60, 80), "third": first(60, 80)}
    one = make(**tasks, task_seconds=(4.0, 40.0, 4.0))
    two = make(left=last(60, 80), right=last(60, 80), third=first(60, 80), task_seconds=(4.0, 40.0, 4.0))
    order = comparison.most_telling({"a": one, "b": two}, cache=tmp_path)
    assert order == ["left", "right", "third"]
    quick = replace(one, task_seconds=(4.0, 4000.0, 4.0))
    assert comparison.most_telling({"a": quick, "b": two}, cache=tmp_path) == ["left", "third", "right"]
    untimed = {"a": replace(one, task_seconds=()), "b": replace(two, task_seconds=())}
    other = replace(two, environment=replace(two.environment, dtype="bfloat16"))
    for models in (untimed, {"a": one}, {}, {"a": one, "b": other}):
        assert comparison.most_telling(models, cache=tmp_path) == []


def test_an_average_from_chance_stands_beside_the_plain_one_and_no_figure_without_its_interval(
    make: Make, tmp_path: Path
) -> None:
    merge, parent = (make(left=first(at, 40), right=first(at - 10, 40)) for at in (30, 20))
    chanced = {
        name: replace(each, scores=tuple(replace(score, chance=0.25) for score in each.scores))
        for name, each in (("", merge), ("org/a@1", parent))
    }
    found = comparison.compare(merge, {"org/a@1": parent}, cache=tmp_path)
    rows = report.scores(chanced, found)
    assert [row.title for row in rows] == ["left", "right", "average of 2 tasks", "average from chance"]
    assert all(each.interval for row in rows for each in row.figures.values())
    assert rows[2].figures[""].value == "62.5" and rows[3].figures[""].value == "50.0"
    alone = report.scores({"": merge}, None)
    assert [row.title for row in alone] == ["left", "right", "average of 2 tasks"]
    assert str(alone[0].figures[""]) == "75.0 (59.8 to 85.8)" and alone[2].figures[""].interval


def test_a_score_that_is_no_share_is_shown_in_its_own_unit_by_every_model(make: Make) -> None:
    def bits(evaluation: Any, value: float, better: bool) -> Any:
        return replace(
            evaluation,
            scores=tuple(
                replace(each, value=value, stderr=0.01, higher_is_better=better) for each in evaluation.scores
            ),
        )

    one = make(left=first(30, 40))
    [row] = report.scores({"": bits(one, 0.62, False), "a": bits(one, 1.1, False)}, None)
    assert [str(each) for each in row.figures.values()] == ["0.62 (0.6 to 0.64)", "1.1 (1.08 to 1.12)"]
    [row] = report.scores({"": bits(one, 0.62, True), "a": bits(one, 1.1, True)}, None)
    assert row.figures[""].value == "0.62", "not 62.0 beside 1.1"


def test_what_would_be_missed_is_said_for_all_models_at_once() -> None:
    def unseen(*detectable: float) -> str:
        return words([Difference(name, 0.0, (-0.1, 0.1), 1.0, 1.0, each, "") for name, each in zip("ab", detectable)])  # noqa: B905

    end = "would be missed in more than one of five such measurements)"
    assert unseen(0.1) == f"no difference to a shown (a true one under 10.0 points {end}"
    assert unseen(0.1, 0.2) == f"no difference shown (a true one under 10.0 to 20.0 points, by model, {end}"
    assert unseen(1.0, 1.2) == "no difference shown (there are too few questions to show any)"
    loss = Difference("a", 0.0, (-9.0, 9.0), 1.0, 1.0, 1.25, "")
    assert words([loss], brief=True, share=False) == "no difference to a shown (detectable: 1.25)"
