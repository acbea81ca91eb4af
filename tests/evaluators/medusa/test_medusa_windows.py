"""Sliding windows: a tree past the window reads what plain decoding reads, or the model is refused."""

from __future__ import annotations

import pytest
import reference_decoding as reference
import tiny_causal_lms as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from evaluators.medusa.decoding.acceptance import Exact
from evaluators.medusa.decoding.capability import reason_against_trees
from evaluators.medusa.decoding.decode import Limits, baseline, medusa
from evaluators.medusa.decoding.runners import EagerRunner
from evaluators.medusa.model.cache import Window, window_of
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.training import distillation
from evaluators.medusa.trees.tree import Tree, chain, full

PROMPT = [(7 * index * index + 3 * index) % 290 for index in range(11)]
FAMILIES = ("window", "gemma2", "gemma3", "gemma3n", "cohere2", "qwen2-window", "gpt-oss")
DEEP = chain(11)  # deeper than the window of eight


@pytest.mark.parametrize("kind", FAMILIES)
def test_past_its_window_a_model_decodes_the_text_of_its_own_generate(kind: str) -> None:
    base, limits = tiny.base(kind), Limits(40)
    assert reason_against_trees(base) is None
    assert base.window is not None and base.window.size == 8
    want = baseline(EagerRunner(base), PROMPT, limits)
    assert len(set(want.tokens)) > 8, "a model that repeats itself proves little"
    ids = torch.tensor([PROMPT])
    config = GenerationConfig(do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0)
    native = base.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    assert native[0, len(PROMPT) :].tolist() == want.tokens
    for shape in (full((2, 2, 2)), DEEP):
        got = medusa(EagerRunner(base), tiny.Oracle([*PROMPT, *want.tokens]), shape, PROMPT, limits)
        assert got.tokens == want.tokens and got.steps < want.steps
        rule = Exact(seed=3, temperature=1.5)
        drawn = baseline(EagerRunner(base), PROMPT, limits, rule)
        got = medusa(EagerRunner(base), tiny.Oracle([*PROMPT, *drawn.tokens]), shape, PROMPT, limits, rule)
        assert got.tokens == drawn.tokens


@pytest.mark.parametrize("kind", ["window", "gemma3"])
def test_a_tree_that_crosses_the_window_takes_the_paths_of_passes_without_a_cache(kind: str) -> None:
    base, limits = tiny.base(kind), Limits(14)
    text = baseline(EagerRunner(base), PROMPT[:4], limits).tokens
    for shape in (full((2, 2)), chain(9)):
        fast = medusa(EagerRunner(base), tiny.Oracle([*PROMPT[:4], *text]), shape, PROMPT[:4], limits)
        slow = reference.medusa(base, tiny.Oracle([*PROMPT[:4], *text]), shape, PROMPT[:4], limits)
        assert (fast.tokens, fast.paths) == (slow.tokens, slow.paths)


@given(
    st.integers(1, 12),
    st.integers(0, 12),
    st.lists(st.sampled_from([(0,), (1,), (0, 0), (0, 1), (0, 0, 0)]), max_size=5),
)
@settings(max_examples=60)
def test_a_node_sees_what_is_visible_and_fewer_than_the_window_back(
    size: int, length: int, paths: list[tuple[int, ...]]
) -> None:
    tree = Tree(tuple({path[:upto] for path in paths for upto in range(1, len(path) + 1)}))
    mask = torch.zeros(tree.nodes, length + tree.nodes)
    visible = torch.tensor(tree.visible())
    mask[:, length:].masked_fill_(~visible, torch.finfo(torch.float32).min)
    inside = Window(size, hybrid=False).masks(mask, length + torch.tensor(tree.depth), length + tree.max_depth)
    assert isinstance(inside, torch.Tensor)
    for node in range(tree.nodes):
        place = length + tree.depth[node]
        for column in range(length + tree.nodes):
            other = column if column < length else length + tree.depth[column - length]
            sees = place - other < size and (column < length or bool(visible[node, column - length]))
            assert (inside[node, column] == 0) == sees


def test_the_probe_leaves_the_window_as_it_was_and_tells_an_ineffective_one() -> None:
    made = tiny.model("window")
    base = Base(made, tiny.tokenizer())
    assert reason_against_trees(base) is None
    assert made.config.sliding_window == 8 and base.window == Window(8, hybrid=False)

    class Deaf(Base):
        """A window that stays in the model whatever the config says."""

        def run(self, ids: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            said, self.config.sliding_window = self.config.sliding_window, 8
            try:
                return super().run(ids, **options)  # type: ignore[arg-type]
            finally:
                self.config.sliding_window = said

    reason = reason_against_trees(Deaf(tiny.model("window"), tiny.tokenizer()))
    assert reason is not None and "takes no attention window from its config" in reason


def test_windows_that_no_mask_describes_are_not_taken_for_one() -> None:
    for kind in ("llama", "chunked", "lfm2", "qwen3-next", "mamba"):
        assert window_of(tiny.model(kind).config) is None


@pytest.mark.parametrize("kind", ["window", "gemma3"])
def test_answers_generated_in_a_batch_past_the_window_are_those_of_plain_decoding(kind: str) -> None:
    base = tiny.base(kind)
    begin = PROMPT[:6]
    prompts = [[*begin, *range(10, 10 + more)] for more in (1, 4, 9)]
    for prompt, dialogue in zip(prompts, distillation.self_distil(base, prompts, max_new_tokens=16), strict=True):
        want = baseline(EagerRunner(base), prompt, Limits(16, base.stop_ids))
        assert list(dialogue.output) == want.tokens
        rows, agreed, difference = distillation.replay(base, dialogue)
        assert agreed == 1.0 and difference < 1e-3 and len(rows) == len(want.tokens)
