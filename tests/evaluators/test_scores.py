"""What may be compared, how sure a share is, and where a suite counts from."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bot.errors import EvaluationError
from evaluators.harness.scores import Environment, ModelEvaluation, Score, TaskData, differences, require_comparable
from evaluators.paired import quantile

ENVIRONMENT = Environment("cpu", "float32", "16", False, 0, "0.4.13", "5.23.0", "2.13.0")


def share(right: int, samples: int, **changed: object) -> Score:
    """Of `samples` answers, as lm-eval gives it: the standard error is that of the sample."""
    value = right / samples
    stderr = math.sqrt(value * (1 - value) / (samples - 1))
    return replace(Score("arc", "acc", value, stderr, samples, 0, True, "1.0"), **changed)  # type: ignore[arg-type]


EVALUATION = ModelEvaluation("quick", "d1", (share(3, 9, data=TaskData("a/b", None, "test", "c0")),), ENVIRONMENT, 1.0)


@given(st.integers(2, 400), st.data())
def test_the_interval_of_a_share_is_the_one_that_score_tests_do_not_reject(samples: int, data: st.DataObject) -> None:
    """Wilson's interval holds exactly the shares p with |x - p| <= z sqrt(p (1 - p) / n)."""
    right = data.draw(st.integers(0, samples))
    found = share(right, samples).interval95
    assert found is not None
    low, high = found
    assert 0 <= low <= right / samples <= high <= 1 and high - low > 0
    for edge in (low, high):
        distance = abs(right / samples - edge)
        limit = quantile(0.975) * math.sqrt(edge * (1 - edge) / samples)
        assert distance <= limit + 1e-9
        assert distance >= limit - 1e-9 or edge in (0.0, 1.0) or math.isclose(edge, right / samples)


def test_a_score_that_is_no_share_keeps_its_own_standard_error() -> None:
    assert replace(share(3, 9), value=12.5, stderr=2.0).interval95 == pytest.approx((8.580072, 16.419928))
    assert replace(share(3, 9), stderr=None).interval95 is None
    assert replace(share(3, 9), stderr=float("nan")).interval95 is None


@given(st.floats(0, 1), st.floats(0, 0.95))
def test_an_average_from_chance_is_zero_at_chance_and_one_at_the_best(value: float, chance: float) -> None:
    score = share(1, 2, value=value, chance=chance)
    assert 0 <= score.normalised <= 1
    assert share(1, 2, value=chance, chance=chance).normalised == 0
    assert share(1, 2, value=1.0, chance=chance).normalised == pytest.approx(1)
    assume(value > chance + 1e-6)
    assert score.normalised > 0


CHANGES = {
    "dtype": ("bfloat16", "in float32 and in bfloat16"),
    "device": ("cuda:0", "on cpu and on cuda"),
    "batch_size": ("auto", "in batches of 16 and in batches of auto"),
    "chat_template": (True, "as plain text and with its chat template"),
    "seed": (1, "with seed 0 and with seed 1"),
    "limit": (10, "with all samples per task and with 10 samples per task"),
    "lm_eval": ("0.4.12", "with lm_eval 0.4.13 and with lm_eval 0.4.12"),
    "transformers": ("5.0", "with transformers 5.23.0 and with transformers 5.0"),
    "torch": ("2.0", "with torch 2.13.0 and with torch 2.0"),
    "backend": ("vllm", "by hf and by vllm"),
    "softmax_dtype": ("float32", "with a softmax in the model's type and with a softmax in float32"),
    "generation": ("neutral", "under the model's own generation settings and under neutral generation settings"),
}


def test_every_part_of_the_environment_keeps_models_apart() -> None:
    # `reading` counts in 16 bits only: test_shared_prefixes.py
    assert {*CHANGES, "reading"} == set(Environment.__dataclass_fields__)
    for name, (value, words) in CHANGES.items():
        other = replace(EVALUATION, environment=replace(ENVIRONMENT, **{name: value}))  # type: ignore[arg-type]
        assert differences(EVALUATION, other) == (words,)


def test_other_questions_and_other_data_keep_models_apart() -> None:
    assert "not the same questions" in differences(EVALUATION, replace(EVALUATION, suite_digest="d2"))[0]
    moved = replace(EVALUATION.scores[0], data=TaskData("a/b", None, "test", "c1"))
    assert differences(EVALUATION, replace(EVALUATION, scores=(moved,))) == (
        "on different versions of the data of arc",
    )
    with pytest.raises(EvaluationError) as caught:
        require_comparable(
            {"a": replace(EVALUATION, key="1" * 64), "b": replace(EVALUATION, scores=(moved,), key="2" * 64)}
        )
    assert "results/111111111111… and results/222222222222…" in caught.value.next_step
    assert differences(EVALUATION, replace(EVALUATION, seconds=9.0, key="other", smallest_batch=1)) == ()


def test_a_ranking_holds_equal_questions_whatever_the_machine() -> None:
    same = replace(EVALUATION, environment=replace(ENVIRONMENT, device="cuda:1", torch="2.14", batch_size="auto"))
    assert same.board == EVALUATION.board
    for name in ("dtype", "chat_template", "seed", "limit", "lm_eval", "backend", "softmax_dtype", "generation"):
        changed = replace(ENVIRONMENT, **{name: CHANGES[name][0]})  # type: ignore[arg-type]
        assert replace(EVALUATION, environment=changed).board != EVALUATION.board
    assert replace(EVALUATION, suite_digest="d2").board != EVALUATION.board
