"""Decoding: greedy text is the base's own, token for token, whatever is proposed; and it stops where plain stops."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import pytest
import reference_decoding as reference
import tiny_causal_lms as tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    Mamba2Config,
    MambaConfig,
    OpenAIGPTConfig,
    RwkvConfig,
)  # fmt: skip

from bot.errors import EvaluationError
from evaluators.medusa.decoding.acceptance import Exact, Greedy, Typical
from evaluators.medusa.decoding.capability import reason_against_trees
from evaluators.medusa.decoding.decode import Limits, StopStrings, baseline, medusa
from evaluators.medusa.decoding.runners import EagerRunner
from evaluators.medusa.drafting.drafters import HeadDrafter, PromptLookup
from evaluators.medusa.drafting.heads import HeadSpec, identity_heads, vocabulary_cut
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.training import prompt_sets
from evaluators.medusa.trees.tree import ROOT_ONLY, Tree, chain, full, greedy_tree

PROMPT = [7, 42, 99, 3, 250, 7, 42]
SPARSE = greedy_tree([[0.5, 0.2, 0.1, 0.05, 0.02], [0.4, 0.2, 0.1, 0.05], [0.3, 0.1, 0.05], [0.2, 0.1]], 64)
TREES = {"n=1": ROOT_ONLY, "n=2": chain(1), "chain-4": chain(4), "full": full((3, 3, 3)), "sparse": SPARSE}
MODELS = {"llama": 128, "gqa": 40, "gpt2": 57}  # tokens; GPT-2 ends at its last position


FEW = {"vocab_size": tiny.VOCAB, "num_hidden_layers": 2, "hidden_size": 32, "initializer_range": 0.3}
RECURRENT = {
    "mamba": MambaConfig(**FEW, state_size=4),
    "falcon-mamba": FalconMambaConfig(**FEW, state_size=4),
    "mamba2": Mamba2Config(**FEW, state_size=4, num_heads=4, head_dim=16, n_groups=1),
    "qwen3-next": tiny.CONFIGS["qwen3-next"](),
    "rwkv": RwkvConfig(**FEW, attention_hidden_size=32, context_length=64),
    "openai-gpt": OpenAIGPTConfig(vocab_size=tiny.VOCAB, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3),
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_plain_steps_give_the_logits_of_the_whole_text_whatever_state_a_model_keeps(kind: str) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(RECURRENT[kind], dtype=torch.float32).eval()
    runner, text = EagerRunner(Base(model, tiny.tokenizer())), [*PROMPT, 5, 77, 130, 5, 9, 201]
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, len(PROMPT) - 1 :]
        rows = [runner.prefill(PROMPT)[1]]
        for token in text[len(PROMPT) :]:
            rows.append(runner.forward(torch.tensor([token]), ROOT_ONLY)[1][0])
            runner.keep([0])
    torch.testing.assert_close(torch.stack(rows), whole, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", TREES)
@pytest.mark.parametrize("kind", MODELS)
def test_greedy_text_equals_plain_decoding_token_for_token(kind: str, shape: str) -> None:
    base, tree = tiny.base(kind), TREES[shape]
    limits = Limits(MODELS[kind], base.stop_ids)
    assert shape != "sparse" or tree.nodes == 64
    want = baseline(EagerRunner(base), PROMPT, limits)
    assert len(set(want.tokens)) > 8, "a model that repeats itself proves little"
    spec = HeadSpec("shared", 4, 1, conditioned=True, keep=tuple(range(0, tiny.VOCAB, 2)))
    drafters = [
        HeadDrafter(tiny.random_heads(base, spec)),
        HeadDrafter(identity_heads(HeadSpec("shared", 4), base)),
        tiny.Oracle([*PROMPT, *want.tokens]),
        tiny.Always(tiny.EOS),
        tiny.Always(0),
        PromptLookup() if shape in ("n=1", "n=2", "chain-4") else tiny.Always(1),
    ]
    for drafter in drafters:
        got = medusa(EagerRunner(base), drafter, tree, PROMPT, limits)
        assert got.tokens == want.tokens
        assert sum(got.emitted) == len(got.tokens) - 1
        if isinstance(drafter, tiny.Oracle) and tree.nodes > 1:
            assert got.steps < want.steps


def test_the_answers_to_test_questions_stay_plain_over_128_tokens() -> None:
    base, limits = tiny.base("gqa"), Limits(128, tiny.base("gqa").stop_ids)
    heads = tiny.random_heads(base, HeadSpec("shared", 4, 1, conditioned=True, keep=tuple(range(0, tiny.VOCAB, 2))))
    lengths = set()
    for question in prompt_sets.builtin("test")[:4]:
        ids = prompt_sets.encode(base, question.turns[0])
        want = baseline(EagerRunner(base), ids, limits).tokens
        for drafter in (HeadDrafter(heads), tiny.Oracle([*ids, *want])):
            assert medusa(EagerRunner(base), drafter, SPARSE.first(16), ids, limits).tokens == want
        lengths.add((len(ids), len(want)))
    assert len(lengths) == 4 and max(length for _, length in lengths) == 128


@pytest.mark.parametrize("kind", MODELS)
def test_the_fast_loop_takes_the_paths_of_the_slow_reference(kind: str) -> None:
    base, limits, tree = tiny.base(kind), Limits(12), SPARSE.first(12)
    text = baseline(EagerRunner(base), PROMPT, limits).tokens
    for drafter in (tiny.Oracle, lambda _: HeadDrafter(tiny.random_heads(base, HeadSpec(heads=4)))):
        for rule in (Greedy(), Typical(temperature=3.0), Exact(seed=5, temperature=2.0)):
            fast = medusa(EagerRunner(base), drafter([*PROMPT, *text]), tree, PROMPT, limits, rule)
            slow = reference.medusa(base, drafter([*PROMPT, *text]), tree, PROMPT, limits, rule)
            assert fast.tokens == slow.tokens
            assert fast.paths == slow.paths


class Wander:
    """Accepts any path and goes on with any token: the cache must follow whatever a rule decides."""

    def __init__(self) -> None:
        self._draws = random.Random(4)

    def pick(self, logits: torch.Tensor, position: int) -> int:
        return self._draws.randrange(290)

    def accept(
        self, tree: Tree, tokens: Sequence[int], logits: torch.Tensor, length: int
    ) -> tuple[tuple[int, ...], int]:
        return tree.ancestors(self._draws.randrange(tree.nodes)), self.pick(logits, length)


@pytest.mark.parametrize(
    ("kind", "positions"),
    [
        ("llama", "max_position_embeddings"),  # as many key heads as heads
        ("gqa", "max_position_embeddings"),  # with a head_dim of its own
        ("mqa", "max_position_embeddings"),
        ("partial-rotary", "max_position_embeddings"),
        ("gpt2", "n_positions"),
        ("opt", "max_position_embeddings"),  # positions with an offset of two
        ("gemma3", "max_position_embeddings"),  # past its window
    ],
)
def test_the_cache_after_200_scattered_paths_equals_a_fresh_prefill(kind: str, positions: str) -> None:
    base = Base(tiny.model(kind, **{positions: 1000}), tiny.tokenizer())
    assert reason_against_trees(base) is None
    runner, drafts = EagerRunner(base), HeadDrafter(tiny.random_heads(base, HeadSpec(heads=3)))
    trace = medusa(runner, drafts, full((2, 2, 2)), PROMPT, Limits(900), Wander())
    assert trace.steps >= 200
    assert sum(path != tuple(range(len(path))) for path in trace.paths) > 100
    text = [*PROMPT, *trace.tokens]
    fresh = EagerRunner(base)
    fresh.prefill(text[: runner.length])
    for mine, theirs in zip(runner.cache.layers, fresh.cache.layers, strict=True):
        assert mine.keys.shape == theirs.keys.shape
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mine.values, theirs.values, atol=1e-4, rtol=1e-4)
    _, after = runner.forward(torch.tensor(text[-1:]), ROOT_ONLY)
    _, plainly = fresh.forward(torch.tensor(text[-1:]), ROOT_ONLY)
    torch.testing.assert_close(after, plainly, atol=1e-4, rtol=1e-4)


def test_token_zero_after_a_short_leaf_is_not_accepted_by_a_padding_alias() -> None:
    """A base that always answers 0: with one row per leaf and -1 padding, the leaf (1) would be walked past its end."""
    model = tiny.model("llama")
    base = Base(model, tiny.tokenizer())
    tree = Tree(((0,), (1,), (0, 0), (0, 1)))  # (1) is a short leaf beside a deeper branch
    runner = EagerRunner(base)
    _, logits = runner.prefill(PROMPT)
    root = int(logits.argmax())
    _, after_root = runner.forward(torch.tensor([root]), ROOT_ONLY)
    truth = int(after_root[0].argmax())
    runner.keep((0,))
    after = torch.tensor([*PROMPT, root, truth])
    # Make token 0 the base's choice after the short leaf by making its output row the strongest there.
    with torch.no_grad():
        state, _ = base.run(after[None], last_only=True, use_cache=False)
        model.get_output_embeddings().weight[0] = 5 * state[0, -1] / state.norm() ** 2 * 40
    want = baseline(EagerRunner(base), PROMPT, Limits(12))

    class ShortLeaf:
        def propose(self, h: torch.Tensor, root: int, seen: list[int], tree: Tree) -> torch.Tensor:
            following = want.tokens[len(seen) - len(PROMPT)] if len(seen) - len(PROMPT) < len(want.tokens) else 5
            return torch.tensor([(following + 1) % tiny.VOCAB, following, 0, 1][: tree.nodes - 1])

    got = medusa(EagerRunner(base), ShortLeaf(), tree, PROMPT, Limits(12))
    assert got.tokens == want.tokens
    assert any(path == (0, 2) and got.tokens[2 * step + 2] == 0 for step, path in enumerate(got.paths))
    # After such a step the cache holds what plain steps would hold: the next logits are the same.
    at = [*PROMPT, *want.tokens[:1]]
    fast, slow = EagerRunner(base), EagerRunner(base)
    fast.prefill(PROMPT)
    drafted = torch.tensor([at[-1], (want.tokens[1] + 1) % tiny.VOCAB, want.tokens[1], 0, 1])
    path, following = Greedy().accept(tree, drafted.tolist(), fast.forward(drafted, tree)[1], len(PROMPT))
    assert (path, following) == ((0, 2), want.tokens[2]) and following == 0
    fast.keep(path)
    slow.prefill([*at, want.tokens[1]])
    following_logits = [runner.forward(torch.tensor([0]), ROOT_ONLY)[1] for runner in (fast, slow)]
    torch.testing.assert_close(*following_logits, atol=1e-4, rtol=1e-4)


def test_a_stop_id_inside_an_accepted_path_ends_the_text_there() -> None:
    base = tiny.base("llama")
    text = baseline(EagerRunner(base), PROMPT, Limits(30)).tokens
    for at in (3, 4, 5, 6):
        stops = frozenset({text[at], tiny.EOS})
        want = baseline(EagerRunner(base), PROMPT, Limits(30, stops))
        got = medusa(EagerRunner(base), tiny.Oracle([*PROMPT, *text]), full((2, 2, 2)), PROMPT, Limits(30, stops))
        assert got.tokens == want.tokens
        assert got.tokens[-1] in stops and not stops & set(got.tokens[:-1])
        assert got.finish == want.finish == "stop"


@pytest.mark.parametrize("tokens", range(1, 9))
def test_max_new_tokens_cuts_inside_an_accepted_path(tokens: int) -> None:
    base = tiny.base("gqa")
    text = baseline(EagerRunner(base), PROMPT, Limits(30)).tokens
    got = medusa(EagerRunner(base), tiny.Oracle([*PROMPT, *text]), chain(4), PROMPT, Limits(tokens))
    assert got.tokens == text[:tokens]
    assert got.finish == "length"
    assert (got.tokens_per_step is None) == (tokens == 1)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("left", [1, 2, 3, 5, 9])
def test_at_the_end_of_the_context_decoding_stays_exact_and_stops(kind: str, left: int) -> None:
    base = tiny.base(kind)
    assert base.max_positions is not None
    prompt = [(index * 37) % 290 for index in range(base.max_positions - left)]
    want = baseline(EagerRunner(base), prompt, Limits(50))
    got = medusa(EagerRunner(base), tiny.Oracle([*prompt, *want.tokens]), full((2, 2, 2)), prompt, Limits(50))
    assert want.finish == got.finish == "context"
    assert got.tokens == want.tokens and len(want.tokens) == left + 1


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("mamba", "Mamba.* recurrent state"),
        ("chunked", "Llama4.* attention windows or chunks"),
        ("qwen3-next", "Qwen3Next.* recurrent state"),
        ("lfm2", "Lfm2.* recurrent state"),
        ("bloom", "Bloom.* ALiBi"),
        ("mpt", "Mpt.* ALiBi"),
        ("mrope", r"three-dimensional rotary positions \(mrope\)"),
        ("falcon-alibi", "Falcon.* ALiBi"),
    ],
)
def test_a_model_that_cannot_hold_a_tree_is_refused_by_name(kind: str, says: str) -> None:
    reason = reason_against_trees(tiny.base(kind))
    assert reason is not None
    assert re.search(says, reason) and reason.endswith(".")


@pytest.mark.parametrize("shape", TREES)
def test_sampling_with_trees_gives_the_tokens_of_plain_sampling_with_the_same_noise(shape: str) -> None:
    base, limits, tree = tiny.base("llama"), Limits(30), TREES[shape]
    heads = HeadDrafter(tiny.random_heads(base, HeadSpec("shared", 4, conditioned=True)))
    for seed in range(2):
        rule = Exact(seed=seed, temperature=1.5, top_k=50, top_p=0.95)
        want = baseline(EagerRunner(base), PROMPT, limits, rule)
        for drafter in (tiny.Oracle([*PROMPT, *want.tokens]), heads, tiny.Always(tiny.EOS), tiny.Always(0)):
            got = medusa(EagerRunner(base), drafter, tree, PROMPT, limits, rule)
            assert got.tokens == want.tokens
            assert not isinstance(drafter, tiny.Oracle) or shape == "n=1" or got.steps < want.steps


def test_prompt_lookup_continues_the_latest_match_of_the_longest_tail() -> None:
    h, lookup = torch.zeros(1), PromptLookup()
    assert lookup.propose(h, 3, [1, 2, 3, 7, 8, 1, 2, 3, 9, 5, 1, 2, 3], chain(2)).tolist() == [9, 5]
    assert lookup.propose(h, 3, [1, 2, 3, 4, 6, 9, 2, 3], chain(4)).tolist() == [4, 6, 9, 2]
    assert lookup.propose(h, 3, [1, 2, 3], chain(4)).tolist() == []
    assert lookup.propose(h, 3, [3], chain(4)).tolist() == []


def test_a_model_whose_logits_are_not_finite_ends_with_the_step_and_a_reason() -> None:
    model = tiny.model("llama")
    base = Base(model, tiny.tokenizer())
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(EvaluationError, match="NaN or infinity at decoding step 0"):
        baseline(EagerRunner(base), PROMPT, Limits(5))
    with pytest.raises(EvaluationError, match="NaN or infinity on its first tokens"):
        Base(model, tiny.tokenizer())


def test_a_number_that_turns_nan_on_the_way_ends_with_its_step() -> None:
    model = tiny.model("llama", tie_word_embeddings=False)
    base = Base(model, tiny.tokenizer())
    text = baseline(EagerRunner(base), PROMPT, Limits(30)).tokens
    at = next(at for at in range(4, 30) if text[at] not in [*PROMPT, *text[:at]])
    with torch.no_grad():
        model.get_input_embeddings().weight[text[at]] = float("nan")
    with pytest.raises(EvaluationError, match=f"NaN or infinity at decoding step {at + 1}"):
        baseline(EagerRunner(base), PROMPT, Limits(40))
    with pytest.raises(EvaluationError, match=r"NaN or infinity at decoding step \d"):
        medusa(EagerRunner(base), tiny.Oracle([*PROMPT, *text]), chain(3), PROMPT, Limits(40))


def test_added_tokens_of_a_merged_tokenizer_are_read_proposed_and_stopped_at() -> None:
    """A merged vocabulary: tokens behind the old ones, one of them the end, and rows behind those that no token has."""
    made = tiny.tokenizer()
    made.add_tokens(["<tool>", "<call>"])
    made.add_special_tokens({"eos_token": "<|im_end|>"})
    end = made.convert_tokens_to_ids("<|im_end|>")
    assert end == tiny.VOCAB + 2
    base = Base(tiny.model("gqa", vocab_size=tiny.VOCAB + 20, seed=3), made)
    assert base.stop_ids == {tiny.EOS, end}
    ids = prompt_sets.encode(base, "<tool>hi<call><|im_end|>")
    assert {tiny.VOCAB, tiny.VOCAB + 1, end} <= set(ids)
    keep = vocabulary_cut([5, 5, tiny.VOCAB], 8, base)
    assert {tiny.VOCAB, end} <= set(keep)
    heads = tiny.random_heads(base, HeadSpec("shared", 3, 1, conditioned=True, keep=keep))
    stops = StopStrings(made, ["zzz"])
    text = baseline(EagerRunner(base), ids, Limits(60)).tokens
    assert max(text) >= tiny.VOCAB, "no added token was ever said"
    for limits in (Limits(60, base.stop_ids, stops), Limits(60, frozenset({max(text)}), stops)):
        want = baseline(EagerRunner(base), ids, limits)
        for drafter in (HeadDrafter(heads), tiny.Oracle([*ids, *text], base.vocab), tiny.Always(end)):
            assert medusa(EagerRunner(base), drafter, full((2, 2, 1)), ids, limits).tokens == want.tokens
    assert want.finish == "stop"
