"""Prompts: never trained on the test, read from MT-bench's layout, with a template or without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_causal_lms as tiny
import torch
from tokenizers import processors

from bot.errors import EvaluationError
from evaluators import repetition
from evaluators.medusa.decoding.decode import Limits, baseline
from evaluators.medusa.decoding.runners import EagerRunner
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.speed import bench
from evaluators.medusa.training import distillation, prompt_sets, prompts
from evaluators.prompt_tokens import prompt_tokens
from tests import family

LONG = "Describe in a few words how the old harbour of the town looks when the first ships come home in spring"


def test_training_prompts_that_are_or_nearly_are_test_prompts_are_dropped_and_named() -> None:
    test = [prompt_sets.Prompt("81", "writing", ("Write a poem.", LONG))]
    train = [
        prompt_sets.Prompt("same", "x", ("write  a POEM.",)),
        prompt_sets.Prompt("second turn", "x", ("Something else.", LONG.upper())),
        prompt_sets.Prompt("near", "x", (LONG + " again",)),
        prompt_sets.Prompt("far", "x", ("Write a novel.",)),
    ]
    kept, dropped = prompt_sets.without_leaks(train, test)
    assert [prompt.id for prompt in kept] == ["far"]
    assert dropped == ["same", "second turn", "near"]


def test_the_built_in_splits_share_no_prompt_and_one_seed_gives_one_order() -> None:
    splits = {split: prompt_sets.builtin(split) for split in ("train", "calibration", "test")}
    texts = {split: {prompt.turns for prompt in asked} for split, asked in splits.items()}
    assert len(texts["train"]) == len(splits["train"]) > 500
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["calibration"]
    assert not texts["test"] & texts["calibration"]
    assert prompt_sets.without_leaks(splits["train"], splits["test"])[1] == []
    assert prompt_sets.builtin("train", 1) == prompt_sets.builtin("train", 1) != prompt_sets.builtin("train", 2)
    assert len({prompt.category for prompt in splits["test"][:8]}) == 8


def test_the_built_in_splits_share_neither_form_nor_topic_nor_passage() -> None:
    for words in (prompts.FORMS, prompts.TOPICS, prompts.PASSAGES, prompts.PEOPLE, prompts.ROLES, prompts.PLACES):
        parts = [
            {text for part in split.values() for text in part} if isinstance(split, dict) else set(split)
            for split in words.values()
        ]
        assert len(set().union(*parts)) == sum(map(len, parts))
    assert all(list(split) == list(prompts.FORMS["train"]) for split in prompts.FORMS.values())


def test_mt_bench_is_read_and_its_categories_take_turns(shared: Path) -> None:
    questions = prompt_sets.read(shared / "hub_seed" / "mt_bench" / "question.jsonl")
    assert len(questions) == 40 and all(len(prompt.turns) == 2 for prompt in questions)
    assert len({prompt.category for prompt in prompt_sets.in_turns(questions, 8)}) == 8
    assert prompt_sets.without_leaks(prompt_sets.builtin("train"), questions)[1] == []
    assert prompt_sets.without_leaks(prompt_sets.builtin("calibration"), questions)[1] == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"turns": ["a"]}\n{oops', "line 2 is not JSON"),
        ('{"turns": []}', "line 1 has no `turns`"),
        ('{"turns": [3]}', "line 1 has no `turns`"),
        ("[1]", "line 1 has no `turns`"),
        ("\n\n", "contains no prompt"),
    ],
)
def test_a_prompt_file_in_another_layout_is_refused_with_its_line(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(EvaluationError, match=says):
        prompt_sets.read(tmp_path / "p.jsonl")
    with pytest.raises(EvaluationError, match="There is no prompt file"):
        prompt_sets.read(tmp_path / "absent.jsonl")


def test_the_template_is_used_where_it_works_and_plain_text_elsewhere() -> None:
    with_template = tiny.base("gqa")
    text = with_template.tokenizer.decode(prompt_sets.encode(with_template, "Hi"))
    assert text == "[user] Hi\n[assistant] "
    assert prompt_sets.takes_turns(with_template)
    for template in (None, "{{ raise_exception('no') }}", "{% broken", "{{ '' }}"):
        base = Base(tiny.model("gqa"), tiny.tokenizer(template))
        assert base.tokenizer.decode(prompt_sets.encode(base, "Hi")) == "Hi"
        assert not prompt_sets.takes_turns(base), "a report would call plain text a chat"


def test_a_tokenizer_larger_than_the_model_is_refused() -> None:
    base = Base(tiny.model("gqa", vocab_size=20), tiny.tokenizer())
    with pytest.raises(EvaluationError, match="the model has only 20 tokens"):
        prompt_sets.encode(base, "zebra")


def test_a_prompt_is_shortened_only_where_it_and_its_answer_exceed_the_context() -> None:
    base = tiny.base("gpt2")  # 64 positions
    whole = prompt_sets.encode(base, "x" * 500)
    assert len(whole) > 500 and prompt_sets.shortened(base, whole, 48) == whole[-32:]
    assert prompt_sets.shortened(base, whole, 4) == whole[-60:]
    assert prompt_sets.shortened(base, whole[:60], 4) == whole[:60]
    assert prompt_sets.shortened(tiny.base("bloom"), whole, 48) == whole, "nothing bounds its positions"
    assert len(prompt_sets.shortened(tiny.base("dynamic"), whole, 48)) == 16, "beyond 32 a batch changes its answers"


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gqa"])
def test_where_the_context_ends_plain_decoding_and_generate_end_alike(kind: str) -> None:
    base = tiny.base(kind)
    most = base.max_positions or 0
    for length in (most - 4, most):
        question = bench.Question(prompt_sets.Prompt("p", "x", ("?",)), tuple(range(1, 200))[:length] * 2)
        question = replace(question, ids=question.ids[:length])
        limits = Limits(48, base.stop_ids)
        assert bench.native(base, question, limits)[0] == baseline(EagerRunner(base), question.ids, limits).tokens


@pytest.mark.parametrize("template", ["<s> $A </s>", "$A </s>", "<s> $A", "$A"])
def test_a_prompt_does_not_end_with_what_the_tokenizer_appends(template: str) -> None:
    made = family.byte_tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    plain_text = family.byte_tokenizer()("one two").input_ids
    begun = [256] if template.startswith("<s>") else []
    assert prompt_tokens(made, "one two") == [*begun, *plain_text]
    assert prompt_tokens(made, "one</s>") == [*begun, *plain_text[:3], 257], "what the user wrote stays"
    base = Base(tiny.model("gqa"), made)
    assert prompt_sets.encode(base, "one two") == [*begun, *plain_text]


def test_looping_text_is_told_from_plain_text() -> None:
    assert repetition.loops([1, 2, 3, 4] * 10)
    assert not repetition.loops(list(range(40)))
    assert not repetition.loops([1] * 5)


def test_answers_that_repeat_themselves_neither_teach_nor_choose_a_tree_unless_all_do() -> None:
    looping = distillation.Dialogue((1,), (1, 2, 3, 4) * 10, torch.zeros(40, 4))
    straight = distillation.Dialogue((1,), tuple(range(30)), torch.zeros(30, 4))
    assert [each is straight for each in distillation.drop_looping([looping, straight, looping])] == [True]
    assert len(distillation.drop_looping([looping, looping])) == 2
