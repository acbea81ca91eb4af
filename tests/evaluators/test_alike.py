"""The check before a comparison: other prompts or shortened ones allow no verdict, and the result says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bot.errors import EvaluationError
from evaluators import comparison
from evaluators.comparison import report
from evaluators.comparison.remarks import remarks
from evaluators.comparison.verdict import Comparison
from evaluators.harness.scores import Cut, Environment, Loaded, ModelEvaluation, differences
from tests.evaluators import stored

GOOD, BAD = [1.0] * 40, [0.0] * 40


def evaluation(cache: Path, number: int, **options: object) -> ModelEvaluation:
    tasks = {"left": GOOD, "right": GOOD} if number == 0 else {"left": BAD, "right": BAD}
    return stored.evaluation(cache, f"{number:064x}", tasks, **options)  # type: ignore[arg-type]


def test_a_parent_with_other_prompts_gets_no_verdict_and_the_others_keep_theirs(tmp_path: Path) -> None:
    merge, alike = evaluation(tmp_path, 0), evaluation(tmp_path, 1)
    other = evaluation(tmp_path, 2, prompts={"left": "described", "right": "described"})
    found = comparison.compare(merge, {"org/alike@c": alike, "org/other@c": other}, cache=tmp_path)
    assert found.parents == ("org/alike@c",)
    assert report.headline(found) == "Against its parents, on average over 2 tasks: better than org/alike."
    assert report.left_out(found) == ["org/other is not compared: it had other prompts for 40 of 40 questions."]
    assert found == Comparison.from_dict(json.loads(json.dumps(found.as_dict())))
    rows = report.scores({"": merge, "org/alike@c": alike, "org/other@c": other}, found)
    assert [str(row.figures["org/other@c"]) for row in rows] == ["0.0 (0.0 to 8.8)"] * 2 + ["–"]


def test_without_a_parent_asked_alike_nothing_is_claimed(tmp_path: Path) -> None:
    merge, other = evaluation(tmp_path, 0), evaluation(tmp_path, 1, prompts={"left": "a", "right": "a"})
    with pytest.raises(
        EvaluationError, match="because their prompts differ: org/b had other prompts for 40 of 40"
    ) as caught:
        comparison.compare(merge, {"org/b@c": other}, cache=tmp_path)
    assert caught.value.code == "NOT_COMPARABLE"
    assert comparison.differences(merge, {"org/b@c": other}, cache=tmp_path) == {}


def test_a_single_task_with_other_prompts_is_left_out(tmp_path: Path) -> None:
    merge, parent = evaluation(tmp_path, 0), evaluation(tmp_path, 1, prompts={"left": "described"})
    found = comparison.compare(merge, {"org/b@c": parent}, cache=tmp_path)
    assert [task.task for task in found.tasks] == ["right"]
    assert report.left_out(found) == ["left is not compared: org/b had other prompts for 40 of 40 questions."]


@pytest.mark.parametrize("both", [True, False])
def test_prompts_that_only_one_model_reads_whole_are_not_compared(both: bool, tmp_path: Path) -> None:
    cut = [Cut("left", 12, 40, 375, 128)]
    merge = evaluation(tmp_path, 0, cut=cut if both else ())
    parent = evaluation(tmp_path, 1, cut=cut)
    found = comparison.compare(merge, {"org/b@c": parent}, cache=tmp_path)
    assert len(found.tasks) == 1 + both
    said = ["left is not compared: org/b read 12 prompts without their start, and the merge 0."]
    assert report.left_out(found) == ([] if both else said)
    names = "the merge and org/b" if both else "org/b"
    assert remarks({"": merge, "org/b@c": parent}, lambda name: report.short(name) or "the merge") == [
        f"{names}: 12 of 40 prompts of left were cut at their start, the longest from 375 to 128 tokens."
    ]


@pytest.mark.parametrize(
    ("merge", "parent", "said"),
    [
        (Loaded(64), Loaded(64, begins_with=("<s>",)), "begins every text with <s>, and the merge with none"),
        (Loaded(64, ends_with=("</s>",)), Loaded(64), "ends every text with no token, and the merge with </s>"),
        (Loaded(64, begins_with=("<s>",)), Loaded(64, begins_with=("<bos>",)), None),
    ],
)
def test_a_token_that_only_one_tokenizer_puts_around_texts_allows_no_verdict(
    merge: Loaded, parent: Loaded, said: str | None, tmp_path: Path
) -> None:
    models = [
        replace(evaluation(tmp_path, number), loaded=each) for number, each in ((0, merge), (1, parent), (2, merge))
    ]
    found = comparison.compare(models[0], {"org/b@c": models[1], "org/c@d": models[2]}, cache=tmp_path)
    assert found.parents == (("org/c@d",) if said else ("org/b@c", "org/c@d"))
    assert report.left_out(found) == ([f"org/b is not compared: it {said}."] if said else [])


def test_answers_that_were_kept_without_prompts_are_compared(tmp_path: Path) -> None:
    models = [evaluation(tmp_path, 0), evaluation(tmp_path, 1, prompts={"left": "a", "right": "a"})]
    for file in (tmp_path / "results" / models[1].key / "samples").iterdir():
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps({**each, "prompt_hash": None}) + "\n" for each in samples))
    assert len(comparison.compare(models[0], {"org/b@c": models[1]}, cache=tmp_path).tasks) == 2


def test_settings_of_single_models_are_said() -> None:
    made = ModelEvaluation("animals", "d" * 64, (), stored.ENVIRONMENT, 1.0)
    first = replace(made, loaded=Loaded(64, ("lm_head.weight",), ("repetition_penalty=5.0",), (2,), (), ("</s>",)))
    second = replace(made, loaded=Loaded(64, ends=(2, 5), begins_with=("<s>",), cleans_spaces=True))
    assert remarks({"a": first, "b": second}) == [
        "a: config.json ties lm_head.weight, the files hold other values, and these were measured, as transformers "
        "loads them.",
        "a: generation_config.json sets repetition_penalty=5.0, which was not applied.",
        "a: the tokenizer appends </s> to every text, which was left out.",
        "Written answers end at different tokens: 2 for a; 2 and 5 for b.",
        "Texts begin with different tokens: none for a; <s> for b.",
        "Spaces before punctuation in answers: kept for a; left out for b.",
    ]
    assert remarks({"a": second, "b": second}) == remarks({"a": made}) == []


def test_other_tokens_lengths_and_attention_are_said() -> None:
    made = ModelEvaluation("animals", "d" * 64, (), stored.ENVIRONMENT, 1.0)
    first = Loaded(64, before_whole=("<s>",), splits="12ab", attention="sdpa")
    second = Loaded(32, ends_with=("</s>",), before_whole=("</s>",), splits="34cd", starts=(0,), attention="eager")
    assert remarks({"a": replace(made, loaded=first), "b": replace(made, loaded=second)}) == [
        "Texts end with different tokens: none for a; </s> for b.",
        "Whole texts are scored after different tokens: <s> for a; </s> for b.",
        "The same text is split into different tokens: tokens 12ab for a; tokens 34cd for b.",
        "Decoders start with different tokens: none for a; 0 for b.",
        "Longest input: 64 tokens for a; 32 tokens for b.",
        "Implementation of attention: sdpa for a; eager for b.",
    ]


def test_an_older_result_is_readable_and_never_compared_with_a_new_one(tmp_path: Path) -> None:
    new = evaluation(
        tmp_path, 0, environment=replace(stored.ENVIRONMENT, softmax_dtype="float32", generation="neutral")
    )
    new = replace(new, loaded=Loaded(64, ends=(2,)), cut=(Cut("left", 1, 40, 99, 64),))
    assert ModelEvaluation.from_dict(json.loads(json.dumps(new.as_dict()))) == new
    told = new.as_dict()
    del told["loaded"], told["cut"], told["environment"]["softmax_dtype"], told["environment"]["generation"]
    old = ModelEvaluation.from_dict(told)
    assert old.environment == Environment(**told["environment"]) and old.board != new.board
    assert differences(old, new) == (
        "with a softmax in the model's type and with a softmax in float32",
        "under the model's own generation settings and under neutral generation settings",
    )
