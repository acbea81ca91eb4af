"""A prefix of several requests is read once, and every answer is the one of lm-eval's own way."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance

from evaluators.harness.journal import Journal, resuming
from evaluators.harness.neutral_lm import NeutralLM
from evaluators.harness.prefix_lm import PrefixLM
from evaluators.harness.prefix_tree import MIN_CACHED, Chunk, PrefixTree, Segment
from evaluators.harness.scores import WHOLE, ModelEvaluation, differences
from tests.evaluators import stored
from tests.evaluators.medusa import tiny_causal_lms as tiny

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "red", "birds", "fly", "over", "hills", "at", "dawn"]
# why these families read each request whole
UNSHARED = {
    "mamba": "ended with",
    "window": "other logits",
    "gemma2": "other logits",
    "gemma3": "other logits",
    "gemma3n": "",
    "cohere2": "other logits",
    "qwen2-window": "other logits",
    "gpt-oss": "other logits",
    "chunked": "",
    "qwen3-next": "",
    "lfm2": "",
    "mpt": "",
    "bloom": "",
    "falcon-alibi": "",
}


def lm(kind: type[NeutralLM], family: str, batch: int = 4, **changes: Any) -> Any:
    made = kind(tiny.model(family, **changes).eval(), tiny.tokenizer())
    made.batch_size_per_gpu = batch
    return made


def text(words: int, seed: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words))


def choices(questions: int = 6, shared: int = 12) -> list[Instance]:
    """Multiple choice after shared examples, with answers of one and of several tokens, one of them a repeated one."""
    return [
        Instance("loglikelihood", {}, (f"{text(shared, 0)} {text(1 + number % 3, number)}", answer), 0)
        for number in range(questions)
        for answer in (" cat", " " + text(3, 50 + number), " c", " cat")
    ]


def questions(count: int = 5, shared: int = 10) -> list[Instance]:
    settings = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    prompts = [f"{text(shared, 0)} {text(1 + number % 2, number)}" for number in range(count)]
    return [Instance("generate_until", {}, (prompt, settings), 0) for prompt in [*prompts, prompts[0]]]


def equal(ours: Sequence[tuple[float, bool]], theirs: Sequence[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("family", [each for each in tiny.CONFIGS if each != "bert"])
def test_every_family_gives_the_answers_of_lm_eval(family: str) -> None:
    ours, theirs = lm(PrefixLM, family), lm(NeutralLM, family)
    assert (ours.unshared is not None) == (family in UNSHARED), ours.unshared
    assert UNSHARED.get(family, "") in (ours.unshared or "")
    equal(ours.loglikelihood(choices(), True), theirs.loglikelihood(choices(), True))
    if family not in ("mpt", "bloom", "falcon-alibi", "mamba"):
        assert ours.generate_until(questions(), True) == theirs.generate_until(questions(), True)


def test_shared_tokens_are_read_once() -> None:
    ours = lm(PrefixLM, "llama", batch=1)
    read = []
    ours.model.register_forward_hook(
        lambda _, __, options, ___: read.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    requests = choices(8, shared=20)
    ours.loglikelihood(requests, True)
    prompts = {request.args[0]: len(ours.tok_encode(request.args[0])) for request in requests}
    preamble = len(ours.tok_encode(text(20, 0)))
    assert preamble > MIN_CACHED
    assert sum(read) < preamble + 1.6 * sum(size - preamble + 12 for size in prompts.values())
    assert sum(read) < 0.5 * sum(prompts.values())


def test_logits_are_computed_for_scored_tokens_only() -> None:
    ours = lm(PrefixLM, "llama")
    rows = []
    head = ours.model.get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[1]))
    ours.loglikelihood(choices(4), True)
    answers = sum(len(ours.tok_encode(request.args[1])) for request in choices(4))
    assert 0 < sum(rows) <= answers + len(rows)


def test_requests_longer_than_a_window_are_read_whole() -> None:
    ours, theirs = (lm(kind, "window", sliding_window=60) for kind in (PrefixLM, NeutralLM))
    assert ours.unshared is None and ours.longest == 60 and "at most 60 tokens" in ours.reading
    for shared in (4, 40):
        equal(ours.loglikelihood(choices(3, shared), True), theirs.loglikelihood(choices(3, shared), True))


def test_a_text_scored_as_a_whole_is_lm_evals_own() -> None:
    requests = [Instance("loglikelihood_rolling", {}, (text(60, 3),), 0)]
    ours, theirs = lm(PrefixLM, "llama"), lm(NeutralLM, "llama")
    assert ours.loglikelihood_rolling(requests, True) == theirs.loglikelihood_rolling(requests, True)


@pytest.mark.parametrize("method", ["loglikelihood", "generate_until"])
def test_an_interrupted_evaluation_ends_with_the_same_numbers_to_the_last_bit(method: str, tmp_path: Any) -> None:
    requests = choices(8, 20) if method == "loglikelihood" else questions(12, 14)

    def run(path: Any, stop_after: int | None) -> list[Any]:
        made = resuming(PrefixLM)(tiny.model("gqa").eval(), tiny.tokenizer())
        made.batch_size_per_gpu = 1

        def report(done: int) -> None:
            if stop_after is not None and done > stop_after:
                raise KeyboardInterrupt

        made.at(Journal(path), report)
        return list(getattr(made, method)(requests))

    whole = run(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", len(requests) // 2)
    kept = len(Journal(tmp_path / "cut"))
    assert 0 < kept < len(requests)
    assert run(tmp_path / "cut", None) == whole


def test_a_failed_task_leaves_the_requests_of_the_next_one_alone(tmp_path: Any) -> None:
    made = resuming(PrefixLM)(tiny.model("gqa").eval(), tiny.tokenizer())
    made.batch_size_per_gpu = 1
    made.at(Journal(tmp_path / "first"), lambda done: None)
    made.loglikelihood(choices(2))
    forward, made.model.forward = made.model.forward, None
    with pytest.raises(TypeError):
        made.loglikelihood(choices(4))
    made.model.forward = forward
    made.at(Journal(tmp_path / "second"), lambda done: None)
    text_requests = [Instance("loglikelihood_rolling", {}, (text(20, number),), 0) for number in range(3)]
    assert all(isinstance(value, float) for value in made.loglikelihood_rolling(text_requests))


def test_a_reading_counts_among_the_conditions_in_16_bits_only() -> None:
    first = ModelEvaluation("animals", "d" * 64, (), stored.ENVIRONMENT, 1.0)
    second = replace(first, environment=replace(first.environment, reading="shared prefixes once"))
    assert first.environment.reading == WHOLE and differences(first, second) == ()
    assert first.board == second.board
    first, second = (replace(each, environment=replace(each.environment, dtype="bfloat16")) for each in (first, second))
    [difference] = differences(first, second)
    assert "shared prefixes once" in difference and first.board != second.board


sequences = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(0, 2), min_size=1, max_size=9)), min_size=1, max_size=40
)


@settings(max_examples=150, deadline=None)
@given(sequences, st.sampled_from([0, 5, MIN_CACHED + 3, 90]), st.sampled_from([8, 40, 200]))
def test_a_plan_covers_every_sequence_once_and_a_token_attends_to_its_own_prefix(
    drawn: list[tuple[int, list[int]]], shared: int, most: int
) -> None:
    preambles = [[random.Random(number).randrange(3) for _ in range(shared)] for number in range(4)]
    tree = PrefixTree([tuple(preambles[number] + rest) for number, rest in drawn])
    plan = tree.plan(most)
    assert tree.tokens_read(plan) == sum(_checked(tree, part, 0, most) for part in plan)
    assert _covered(plan) == list(range(len(tree.sequences)))


def _covered(plan: Sequence[Segment | Chunk]) -> list[int]:
    return [
        number
        for part in plan
        for number in (range(part.first, part.stop) if isinstance(part, Chunk) else _covered(part.passes))
    ]


def _checked(tree: PrefixTree, part: Segment | Chunk, start: int, most: int) -> int:
    """Tokens of a part, whose prefix of `start` tokens is cached."""
    assert part.start == start
    packed = tree.pack(part)
    assert packed.mask.shape == (len(packed.ids), len(packed.ids))
    for number, slots in zip(range(part.first, part.stop), packed.slots, strict=True):
        sequence = tree.sequences[number][start : part.end if isinstance(part, Segment) else None]
        assert tuple(packed.ids[slot] for slot in slots) == sequence
        assert [packed.positions[slot] for slot in slots] == list(range(start, start + len(sequence)))
        for place, slot in enumerate(slots):
            assert np.flatnonzero(packed.mask[slot]).tolist() == sorted(slots[: place + 1])
    if isinstance(part, Chunk):
        assert len(packed.ids) <= most or part.stop - part.first == 1
        return len(packed.ids)
    return len(packed.ids) + sum(_checked(tree, each, part.end, most) for each in part.passes)


def test_a_model_in_bfloat16_shares_prefixes() -> None:
    made = PrefixLM(tiny.model("gqa").to(torch.bfloat16).eval(), tiny.tokenizer())
    assert made.unshared is None and made.reading.startswith("shared prefixes")
