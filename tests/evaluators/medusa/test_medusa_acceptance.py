"""Acceptance: sampling follows the base's distribution, typical acceptance its formula."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tiny_causal_lms as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators.medusa.decoding.acceptance import Exact, Greedy, Typical
from evaluators.medusa.decoding.decode import Limits, Trace, baseline, stream
from evaluators.medusa.decoding.runners import EagerRunner
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.trees.tree import Tree, chain, full

PROMPT = [7, 42, 99, 3, 250, 7, 42]


def test_each_seed_draws_its_own_text() -> None:
    base = tiny.base("llama")
    drawn = {tuple(baseline(EagerRunner(base), PROMPT, Limits(8), Exact(seed, temperature=1.5)).tokens)
             for seed in (0, 1, 2, -1, 1 << 32, 1 << 40)}  # fmt: skip
    assert len(drawn) == 6, "two seeds gave one text"


class PerRow:
    """How the reference samples: each root-to-leaf row draws for itself, and the longest match of any row wins."""

    def __init__(self, seed: int) -> None:
        self._draws = torch.Generator().manual_seed(seed)

    def pick(self, logits: torch.Tensor, position: int) -> int:
        return int(torch.multinomial(logits.softmax(-1), 1, generator=self._draws))

    def accept(
        self, tree: Tree, tokens: Sequence[int], logits: torch.Tensor, length: int
    ) -> tuple[tuple[int, ...], int]:
        best: tuple[int, ...] = (0,)
        for leaf in (node for node in range(tree.nodes) if not tree.children[node]):
            row, kept = tree.ancestors(leaf), 1
            while kept < len(row) and self.pick(logits[row[kept - 1]], 0) == tokens[row[kept]]:
                kept += 1
            best = max(best, row[:kept], key=len)
        return best, self.pick(logits[best[-1]], 0)


class ZeroAndOne:
    """Proposes the same tokens every time: 0 and 1 at every level."""

    def propose(self, h: torch.Tensor, root: int, seen: Sequence[int], tree: Tree) -> torch.Tensor:
        return torch.tensor([path[-1] for path in tree.paths])


def chi_square_of_second_tokens(rule: type[Exact] | type[PerRow], draws: int = 600) -> float:
    """The real loop on a toy model of twelve tokens, against what its logits say the second token is."""
    toy = {"vocab_size": 12, "initializer_range": 0.25, "eos_token_id": None, "num_hidden_layers": 1}
    base = Base(tiny.model("llama", **toy), tiny.tokenizer())
    first = base.run(torch.tensor([[3, 7]]), use_cache=False)[1][0, -1].softmax(-1)
    then = base.run(torch.tensor([[3, 7, token] for token in range(12)]), use_cache=False)[1][:, -1].softmax(-1)
    expected = draws * (first.double() @ then.double())
    assert float(expected.min()) > 5
    runner, tree = EagerRunner(base), full((2, 2))
    found = torch.zeros(12, dtype=torch.double)
    for seed in range(draws):
        steps = stream(runner, ZeroAndOne(), tree, [3, 7], Limits(4), rule(seed), trace=Trace())
        next(steps)
        found[next(steps)[0]] += 1
    return float(((found - expected) ** 2 / expected).sum())


def test_sampling_through_a_tree_follows_the_bases_distribution_where_drawing_per_row_does_not() -> None:
    one_in_a_thousand = 31.26  # 11 degrees of freedom
    assert chi_square_of_second_tokens(Exact) < one_in_a_thousand
    assert chi_square_of_second_tokens(PerRow) > 2 * one_in_a_thousand


def test_sampled_draws_follow_the_distribution() -> None:
    p = torch.tensor([0.5, 0.25, 0.15, 0.1])
    draws = torch.tensor([Exact(seed=1).pick(p.log(), position) for position in range(4000)])
    counts = draws.bincount(minlength=4).double()
    chi_square = float(((counts - 4000 * p) ** 2 / (4000 * p)).sum())
    assert chi_square < 16.27  # 3 degrees of freedom, one in a thousand


def test_top_k_and_top_p_leave_only_what_they_should() -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    assert {Exact(seed=2, top_k=2).pick(logits, at) for at in range(200)} == {0, 1}
    assert {Exact(seed=2, top_p=0.8).pick(logits, at) for at in range(300)} == {0, 1, 2}


def test_typical_acceptance_follows_the_formula_with_eps_and_delta_in_their_places() -> None:
    p = torch.tensor([0.6, 0.3, 0.06, 0.04])
    entropy = -sum(float(q) * torch.log(q + 1e-5).item() for q in p)
    rule = Typical(temperature=1.0)
    assert float(rule.threshold(p)) == pytest.approx(min(0.09, 0.3 * torch.tensor(-entropy).exp().item()), rel=1e-5)
    flat = torch.full((100,), 0.01)
    assert float(rule.threshold(flat)) == pytest.approx(0.3 / 100, rel=1e-2)  # delta * exp(-H), far below eps
    logits = p.log().expand(3, 4)
    tree = Tree(((0,), (1,)))
    assert rule.accept(tree, [0, 2, 1], logits, 10) == ((0, 2), 0)  # 0.06 < 0.09 < 0.3: only the second child stands
    assert rule.accept(tree, [0, 2, 3], logits, 10) == ((0,), 0)
    deeper = Tree(((0,), (1,), (1, 0)))
    assert rule.accept(deeper, [0, 0, 1, 1], p.log().expand(4, 4), 10) == ((0, 2, 3), 0)  # deepest, not likeliest
    assert rule.accept(tree, [0, 1, 0], logits, 10) == ((0, 2), 0)  # ties in depth by log p


@given(
    st.lists(st.floats(-4, 4, width=32), min_size=12, max_size=12), st.lists(st.integers(0, 3), min_size=2, max_size=2)
)
@settings(max_examples=50)
def test_typical_acceptance_at_no_temperature_is_greedy(values: list[float], tokens: list[int]) -> None:
    logits = torch.tensor(values).view(3, 4) + torch.arange(4) * 1e-3
    tree = chain(2)
    cold = Typical(temperature=1e-7).accept(tree, [0, *tokens], logits, 5)
    if float(logits.topk(2).values.diff().abs().min()) > 1e-4:
        assert cold == Greedy().accept(tree, [0, *tokens], logits, 5)
