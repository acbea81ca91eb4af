"""Where a text ends: stop strings are found as transformers finds them, also inside an accepted block."""

from __future__ import annotations

from functools import cache

import pytest
import tiny_causal_lms as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig
from transformers.generation import StopStringCriteria

from evaluators.medusa.decoding.decode import Limits, StopStrings, Trace, baseline, medusa, stream
from evaluators.medusa.decoding.runners import EagerRunner
from evaluators.medusa.trees.tree import chain, full

PROMPT = [7, 42, 99, 3, 250, 7, 42]
BYTES = tiny.tokenizer()


def of_bytes(text: str) -> list[int]:
    ids: list[int] = BYTES(text, add_special_tokens=False)["input_ids"]
    return ids


@cache
def of_transformers(strings: tuple[str, ...]) -> StopStringCriteria:
    return StopStringCriteria(BYTES, list(strings))


def native(ids: list[int], strings: tuple[str, ...], tokens: int) -> list[int]:
    base = tiny.base("llama")
    config = GenerationConfig(
        do_sample=False, max_new_tokens=tokens, eos_token_id=None, pad_token_id=0, stop_strings=list(strings)
    )
    row = torch.tensor([ids])
    out = base.model.generate(
        row, attention_mask=torch.ones_like(row), generation_config=config, tokenizer=base.tokenizer
    )
    found: list[int] = out[0, len(ids) :].tolist()
    return found


def stops_in(text: list[int]) -> list[tuple[str, ...]]:
    """Strings of one to four characters that the text really holds, wherever whole characters stand."""
    said = BYTES.decode(text)
    whole = [said[at : at + 1 + at % 4] for at in range(2, len(said) - 4)]
    return [(part,) for part in whole if "\ufffd" not in part]


@pytest.mark.parametrize("shape", [chain(4), full((2, 2, 2))])
def test_a_stop_string_across_two_blocks_or_inside_one_ends_the_text_where_generate_ends(shape: object) -> None:
    base = tiny.base("llama")
    text = baseline(EagerRunner(base), PROMPT, Limits(40)).tokens
    cases = stops_in(text)
    assert len(cases) > 5
    inside = across = 0
    for strings in cases:
        limits = Limits(40, stop_strings=StopStrings(base.tokenizer, strings))
        want = baseline(EagerRunner(base), PROMPT, limits)
        got = medusa(EagerRunner(base), tiny.Oracle([*PROMPT, *text]), shape, PROMPT, limits)  # type: ignore[arg-type]
        assert want.tokens == got.tokens == native(PROMPT, strings, 40)
        assert want.finish == got.finish == "stop"
        assert strings[0] in BYTES.decode(got.tokens) and strings[0] not in BYTES.decode(got.tokens[:-1])
        if got.steps:
            inside += got.emitted[-1] < len(got.paths[-1])
            across += got.emitted[-1] < len(of_bytes(strings[0]))
    assert inside and across, "no string ended inside a block, or none began in the block before"


def test_the_streaming_iterator_ends_with_the_token_that_completes_the_string() -> None:
    base = tiny.base("llama")
    text = baseline(EagerRunner(base), PROMPT, Limits(40)).tokens
    limits = Limits(40, stop_strings=StopStrings(base.tokenizer, stops_in(text)[-1]))
    trace = Trace()
    drafter = tiny.Oracle([*PROMPT, *text])
    blocks = list(stream(EagerRunner(base), drafter, chain(3), PROMPT, limits, trace=trace))
    assert [token for block in blocks for token in block] == trace.tokens
    assert trace.tokens == baseline(EagerRunner(base), PROMPT, limits).tokens and len(trace.tokens) < 40
    assert trace.finish == "stop"


def test_a_string_that_begins_in_the_prompt_ends_the_text_with_the_first_token() -> None:
    base = tiny.base("llama")
    prompts = [[*PROMPT[:-1], *of_bytes(letter)] for letter in "abcdefghijklmnopqrstuvwxyz"]
    firsts = [baseline(EagerRunner(base), prompt, Limits(1)).tokens[0] for prompt in prompts]
    readable = [pair for pair in zip(prompts, firsts, strict=True) if "\ufffd" not in BYTES.decode([pair[1]])]
    assert readable
    for prompt, first in readable:
        said = BYTES.decode([prompt[-1], first])
        limits = Limits(9, stop_strings=StopStrings(base.tokenizer, (said,)))
        assert baseline(EagerRunner(base), prompt, limits).tokens == [first] == native(prompt, (said,), 9)


LETTERS = "abé世🙂 "


@given(
    st.text(LETTERS, min_size=1, max_size=12),
    st.lists(st.text(LETTERS, min_size=1, max_size=4), min_size=1, max_size=2),
)
@settings(max_examples=150, deadline=None)
def test_after_every_token_the_answer_is_that_of_transformers(text: str, strings: list[str]) -> None:
    ids = of_bytes(text)
    stops, theirs = StopStrings(BYTES, strings), of_transformers(tuple(strings))
    for length in range(1, len(ids) + 1):
        says = bool(theirs(torch.tensor([ids[:length]]), None)[0])
        assert stops.completed_by(ids[:length]) == says, (text, strings, length)


def test_a_character_of_several_tokens_counts_when_its_last_byte_arrives() -> None:
    ids = of_bytes("ok 🙂!")
    stops = StopStrings(BYTES, ["🙂"])
    assert [stops.completed_by(ids[:length]) for length in range(1, len(ids) + 1)] == [*[False] * 6, True, False]


def test_an_empty_stop_string_is_no_stop_string() -> None:
    for wrong in ([""], ["a", ""], "abc"):
        with pytest.raises(ValueError, match="list of non-empty strings"):
            StopStrings(BYTES, wrong)
