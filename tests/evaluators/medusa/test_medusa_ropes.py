"""Rotary angles that change with the length: at the switch a tree waits, and the text stays that of plain decoding."""

from __future__ import annotations

import pytest
import tiny_causal_lms as tiny
import torch
from transformers import GenerationConfig

from evaluators.medusa.decoding.acceptance import Exact
from evaluators.medusa.decoding.capability import reason_against_trees
from evaluators.medusa.decoding.decode import Limits, baseline, medusa
from evaluators.medusa.decoding.runners import EagerRunner
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.training import distillation
from evaluators.medusa.trees.tree import chain, full

SWITCH, NEW = 32, 20
KINDS = ("longrope", "phi3-longrope", "dynamic")
STARTS = (SWITCH - 9, SWITCH - 3, SWITCH - 2, SWITCH - 1, SWITCH, SWITCH + 1, SWITCH + 8)


def prompt_of(tokens: int) -> list[int]:
    return [(index * 37 + index * index) % 290 for index in range(tokens)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", STARTS)
def test_across_the_switch_the_text_is_that_of_plain_decoding_and_of_generate(kind: str, start: int) -> None:
    base, prompt, limits = tiny.base(kind), prompt_of(start), Limits(NEW)
    assert reason_against_trees(base) is None
    want = baseline(EagerRunner(base), prompt, limits)
    for shape in (full((2, 2, 2)), chain(4)):
        got = medusa(EagerRunner(base), tiny.Oracle([*prompt, *want.tokens]), shape, prompt, limits)
        assert got.tokens == want.tokens
        # A tree is used wherever the angles of all its nodes are those of plain steps.
        assert (got.steps < want.steps) == (kind != "dynamic" or start < SWITCH - 1)
    drawn = baseline(EagerRunner(base), prompt, limits, Exact(seed=1))
    got = medusa(EagerRunner(base), tiny.Oracle([*prompt, *drawn.tokens]), chain(4), prompt, limits, Exact(seed=1))
    assert got.tokens == drawn.tokens
    # Beyond the switch `generate` with rope `dynamic` goes on from the longest text it ever read: give it a new model.
    model = tiny.model(kind) if kind == "dynamic" else base.model
    ids = torch.tensor([prompt])
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0)
    native = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    assert native[0, start:].tolist() == want.tokens


def test_a_text_does_not_depend_on_the_longer_one_decoded_before() -> None:
    base = Base(tiny.model("dynamic"), tiny.tokenizer())
    prompt = prompt_of(SWITCH + 2)
    first = baseline(EagerRunner(base), prompt, Limits(NEW)).tokens
    baseline(EagerRunner(base), prompt_of(SWITCH + 40), Limits(NEW))
    assert baseline(EagerRunner(base), prompt, Limits(NEW)).tokens == first


def test_the_room_of_a_tree_ends_where_its_angles_would_change() -> None:
    longrope, phi3, dynamic = (tiny.base(kind) for kind in KINDS)
    for base in (longrope, phi3, dynamic):
        assert [base.depth_room(length) for length in (20, 28, 30, 31)] == [11, 3, 1, 0]
    assert longrope.depth_room(SWITCH) == longrope.depth_room(SWITCH + 1) + 1 == 256 - 1 - SWITCH
    assert (phi3.depth_room(SWITCH), phi3.depth_room(SWITCH + 1)) == (0, 256 - 2 - SWITCH)
    assert dynamic.depth_room(SWITCH) == dynamic.depth_room(SWITCH + 9) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_answers_generated_in_a_batch_end_before_the_switch(kind: str) -> None:
    base = tiny.base(kind)
    prompts = [prompt_of(tokens)[::-1] for tokens in (5, 12, 20)]
    for prompt, dialogue in zip(prompts, distillation.self_distil(base, prompts, max_new_tokens=30), strict=True):
        want = baseline(EagerRunner(base), prompt, Limits(30, base.stop_ids)).tokens
        assert list(dialogue.output) == want[: len(dialogue.output)]
        assert distillation.replay(base, dialogue)[1] == 1.0
