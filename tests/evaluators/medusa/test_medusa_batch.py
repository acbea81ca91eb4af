"""Ragged batches: every row gets what it gets alone, whatever the others are and whenever they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny_causal_lms as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bot.errors import EvaluationError
from evaluators.medusa.decoding import batch
from evaluators.medusa.decoding.acceptance import Exact, Greedy, Typical
from evaluators.medusa.decoding.batch import Request
from evaluators.medusa.decoding.decode import Limits, StopStrings, Trace, baseline, medusa
from evaluators.medusa.decoding.runners import EagerRunner
from evaluators.medusa.drafting.drafters import HeadDrafter, PromptLookup
from evaluators.medusa.drafting.heads import HeadSpec
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.trees.tree import Tree, chain, full

TREES = {"full": full((2, 2)), "sparse": Tree(((0,), (1,), (2,), (0, 0), (1, 0), (0, 0, 0))), "chain": chain(4)}
RULES = (Greedy(), Typical(temperature=3.0), Exact(seed=7, temperature=1.5))


class Numbers:
    """Proposes to each node its number: siblings differ, since between equal ones rounding would choose the path."""

    def propose(self, h: torch.Tensor, root: int, seen: Sequence[int], tree: Tree) -> torch.Tensor:
        return torch.arange(1, tree.nodes)


def alone(base: Base, request: Request, tree: Tree) -> Trace:
    if request.drafter is None:
        return baseline(EagerRunner(base), request.ids, request.limits, request.rule)
    return medusa(EagerRunner(base), request.drafter, tree, request.ids, request.limits, request.rule)


def drafter_of(base: Base, name: str, request: Request) -> Any:
    """A new drafter: some count their calls."""
    if name == "oracle":
        text = baseline(EagerRunner(base), request.ids, Limits(request.limits.max_new_tokens), request.rule).tokens
        return tiny.Oracle([*request.ids, *text])
    made: dict[str, Callable[[], Any]] = {
        "heads": lambda: HeadDrafter(tiny.random_heads(base, HeadSpec("shared", 4, conditioned=True))),
        "numbers": Numbers,
        "plain": lambda: None,
    }
    return made[name]()


ROW = st.tuples(
    st.lists(st.integers(0, 289), min_size=1, max_size=20),
    st.integers(1, 18),
    st.sampled_from(["oracle", "oracle", "heads", "numbers", "plain"]),
    st.sampled_from(RULES),
    st.booleans(),
)


@pytest.mark.parametrize("kind", ["llama", "gqa", "gpt2", "opt", "window", "gemma3"])
@given(rows=st.lists(ROW, min_size=1, max_size=4), shape=st.sampled_from(sorted(TREES)))
@settings(max_examples=8, deadline=None)
def test_every_row_of_a_ragged_batch_gets_the_tokens_and_paths_it_gets_alone(
    kind: str, rows: list[Any], shape: str
) -> None:
    base, tree = tiny.base(kind), TREES[shape]
    requests: list[Request] = []
    for ids, tokens, _, rule, stops in rows:
        said = baseline(EagerRunner(base), ids, Limits(tokens), rule).tokens
        limits = Limits(tokens, frozenset({said[len(said) // 2]}) if stops else frozenset())
        requests.append(Request(ids, limits, None, rule))
    named = [name for _, _, name, _, _ in rows]

    def with_drafters() -> list[Request]:
        return [
            Request(each.ids, each.limits, drafter_of(base, name, each), each.rule)
            for each, name in zip(requests, named, strict=True)
        ]

    together = batch.decode(base, with_drafters(), tree)
    for got, request in zip(together, with_drafters(), strict=True):
        want = alone(base, request, tree)
        assert (got.tokens, got.paths, got.emitted, got.finish) == (
            want.tokens, want.paths, want.emitted, want.finish,
        )  # fmt: skip


def test_rows_that_end_early_leave_and_the_others_go_on_to_the_edge_of_the_context() -> None:
    base, tree = tiny.base("gpt2"), full((2, 2, 2))
    prompts = [[(index * 37 + row) % 290 for index in range(size)] for row, size in enumerate((3, 62, 40, 63, 64))]
    texts = [baseline(EagerRunner(base), prompt, Limits(70)).tokens for prompt in prompts]
    requests = [
        Request(prompt, Limits(70 if row else 5), tiny.Oracle([*prompt, *text]))
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    traces = batch.decode(base, requests, tree)
    assert [trace.finish for trace in traces] == ["length", *["context"] * 4]
    assert [trace.tokens for trace in traces] == [texts[0][:5], *texts[1:]]
    assert traces[2].steps < len(texts[2]) - 1


def test_stop_strings_and_prompt_lookup_work_row_by_row() -> None:
    base = tiny.base("llama")
    prompts = [[7, 42, 99, 3, 250, 7, 42], [5, 6, 7], [9] * 12, [1]]
    texts = [baseline(EagerRunner(base), prompt, Limits(30)).tokens for prompt in prompts]
    letters = [[part for part in map(base.tokenizer.decode, [[token] for token in text[3:]]) if part.isascii()]
               for text in texts]  # fmt: skip
    assert sum(map(bool, letters)) > 1
    requests = [
        Request(prompt, Limits(30, stop_strings=StopStrings(base.tokenizer, some[:1])), PromptLookup())
        for prompt, some in zip(prompts, letters, strict=True)
    ]
    for got, request, some in zip(batch.decode(base, requests, chain(3)), requests, letters, strict=True):
        want = baseline(EagerRunner(base), request.ids, request.limits)
        assert got.tokens == want.tokens
        assert got.finish == want.finish == ("stop" if some else "length")


@pytest.mark.parametrize("kind", ["phi3-longrope", "dynamic"])
def test_rows_whose_angles_depend_on_their_length_do_not_turn_each_other(kind: str) -> None:
    base = tiny.base(kind)
    prompts = [list(range(10, 10 + size)) for size in (4, 29, 36)]
    requests = [Request(prompt, Limits(12), tiny.Always(3)) for prompt in prompts]
    for got, request in zip(batch.decode(base, requests, chain(2)), requests, strict=True):
        assert got.tokens == baseline(EagerRunner(base), request.ids, request.limits).tokens


def test_no_request_no_prompt_and_no_finite_logits_each_have_their_answer() -> None:
    base = Base(tiny.model("llama"), tiny.tokenizer())
    assert batch.decode(base, [], chain(2)) == []
    with pytest.raises(ValueError, match="at least one prompt token"):
        batch.decode(base, [Request([1], Limits(3)), Request([], Limits(3))], chain(2))
    with torch.no_grad():
        base.output.weight[5] = float("nan")
    with pytest.raises(EvaluationError, match="NaN or infinity at decoding step 0"):
        batch.decode(base, [Request([1], Limits(3)), Request([2, 3], Limits(3))], chain(2))
