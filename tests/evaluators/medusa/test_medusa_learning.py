"""What makes training fast is held against what it stands for: the loss, and the cache answers are written with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_causal_lms as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from benchmarks import heads as benchmark
from evaluators.medusa.drafting import drafters
from evaluators.medusa.drafting.heads import HeadSpec, identity_heads
from evaluators.medusa.model import cache as caches
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.training import distillation, train
from evaluators.medusa.training.head_loss import CHOICES, SOFT_SHARE, SoftTargets, Targets, draft_loss, product_dtype


def reference_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of 0.8^k cross entropies as it is written down."""
    losses = [0.8 ** (k + 1) * F.cross_entropy(logits[k], targets[k], ignore_index=-100) for k in range(len(targets))]
    return torch.stack(losses).sum()


@pytest.mark.parametrize("kind", ["shared", "own", "softcapped"])
def test_the_loss_in_blocks_and_its_gradient_are_those_of_whole_logits(kind: str) -> None:
    base = Base(tiny.model("gqa"), tiny.tokenizer())
    if kind == "softcapped":
        base.post = lambda z: 3 * torch.tanh(z / 3)
    spec = HeadSpec("own" if kind == "own" else "shared", 3, 2, conditioned=True, keep=tuple(range(0, 200, 2)))
    draw = torch.Generator().manual_seed(0)
    heads = identity_heads(spec, base).requires_grad_(True)
    for parameter in heads.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    h = torch.randn(40, base.hidden, generator=draw)
    following = torch.randint(0, tiny.VOCAB, (40,), generator=draw)
    targets = torch.randint(0, 100, (3, 40), generator=draw)
    targets[1, ::3] = -100
    found = []
    for loss in (
        draft_loss(heads, h, following, Targets.certain(targets)),
        reference_loss(heads(h, following), targets),
    ):
        heads.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        found.append((float(loss.detach()), [p.grad.clone() for p in heads.parameters() if p.grad is not None]))
    (fast, fast_slopes), (slow, slow_slopes) = found
    # bfloat16 products carry 8 bits; in float32 the two agree to rounding.
    tolerance = 3e-2 if product_dtype(base.device) == torch.bfloat16 else 1e-4
    assert fast == pytest.approx(slow, rel=tolerance)
    assert len(fast_slopes) == len(slow_slopes) > 0
    for mine, theirs in zip(fast_slopes, slow_slopes, strict=True):
        assert float((mine - theirs).norm()) <= tolerance * float(theirs.norm())


def test_heads_say_the_same_whatever_the_scale_their_embeddings_enter_at() -> None:
    base = tiny.base("gqa")
    heads = tiny.random_heads(base, HeadSpec("shared", 2, conditioned=True))
    h, following = torch.randn(5, base.hidden), torch.arange(5)
    want, weights = heads(h, following), heads.first.clone()
    heads.take_embeddings_at(16.0)
    assert torch.equal(heads(h, following), want) and not torch.equal(heads.first, weights)
    torch.testing.assert_close(drafters.drafting(heads)(h, following), want)
    heads.take_embeddings_at(1.0)
    assert torch.equal(heads.first, weights)


def test_embeddings_enter_training_at_the_size_of_hidden_rows() -> None:
    base, other = tiny.base("gqa"), Base(tiny.model("gqa"), tiny.tokenizer())
    features = distillation.stack_features(
        base, distillation.self_distil(base, [[n, n + 1] for n in range(4)], max_new_tokens=9)
    )
    with torch.no_grad():
        other.model.get_input_embeddings().weight.mul_(1 / 64)
    ratio = train.embedding_scale(other, features) / train.embedding_scale(base, features)
    assert ratio == 64.0
    heads, _ = train.fit(
        HeadSpec("shared", 2, conditioned=True), base, features, train.TrainingOptions(train.QUICK, 60)
    )
    assert heads.embed_scale == 1.0


def test_soft_targets_are_what_came_and_what_the_base_held_possible_at_the_guessed_place() -> None:
    base = Base(tiny.model("gqa", initializer_range=0.15), tiny.tokenizer())
    dialogues = distillation.self_distil(base, [[n, n + 1] for n in range(6)], max_new_tokens=9)
    features = distillation.stack_features(base, dialogues)
    heads = identity_heads(HeadSpec("shared", 2, keep=tuple(range(0, 300, 2))), base)
    came, guessed = (train.draft_targets(each, heads) for each in (features.tokens, features.labels(2)))
    targets = SoftTargets(heads, features, came, guessed).at(torch.arange(len(features.tokens)))
    likely = torch.softmax(base.logits(features.hidden)[:, ::2].float(), -1)
    for k in range(2):
        for row in range(len(features.tokens)):
            shares = dict(zip(targets.ids[k, row].tolist(), targets.shares[k, row].tolist(), strict=True))
            if guessed[k, row] == -100:
                assert not any(shares.values())
                continue
            said = int(guessed[k, row])
            assert len(shares) == CHOICES and sum(shares.values()) == pytest.approx(1, abs=1e-3)
            assert shares[said] >= SOFT_SHARE
            place = row + k + 1
            whole = sum(float(likely[place, token]) for token in shares)
            for token, share in shares.items():
                want = SOFT_SHARE * float(likely[place, token]) / whole + (1 - SOFT_SHARE) * (token == said)
                assert share == pytest.approx(want, abs=2e-2)


ACTIONS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 90)),
    st.tuples(st.just("pick"), st.lists(st.integers(0, 1), min_size=1, max_size=3)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("crop"), st.integers(1, 3)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTIONS, max_size=8))
def test_a_cache_that_grows_in_place_holds_what_one_that_copies_holds(
    actions: list[tuple[str, int | list[int]]],
) -> None:
    draw = torch.Generator().manual_seed(0)
    copying, growing_one = DynamicLayer(), caches.GrowingLayer()
    layers, rows = (copying, growing_one), 2
    for name, value in [("append", 3), *actions, ("append", 1)]:
        if name == "append":
            keys, values = (torch.randn(rows, 2, value, 4, generator=draw) for _ in range(2))
            for mine, theirs in zip(*(layer.update(keys, values) for layer in layers), strict=True):
                assert torch.equal(mine, theirs)
        elif name == "pick":
            chosen = torch.tensor(value) % rows
            rows = len(chosen)
            for layer in layers:
                layer.batch_select_indices(chosen)
        elif name == "repeat":
            rows *= value  # type: ignore[operator]
            for layer in layers:
                layer.batch_repeat_interleave(value)
        elif copying.get_seq_length() > value:  # type: ignore[operator]
            for layer in layers:
                layer.crop(-value)  # type: ignore[operator]
        assert growing_one.get_seq_length() == copying.get_seq_length()
    assert torch.equal(growing_one.keys, copying.keys) and torch.equal(growing_one.values, copying.values)


def test_only_plain_layers_of_a_cache_grow_in_place() -> None:
    full = caches.grow_in_place(DynamicCache(config=tiny.model("gqa").config))
    assert {type(layer) for layer in full.layers} == {caches.GrowingLayer}
    windowed = DynamicCache(config=tiny.model("gqa").config)
    windowed.layers[0] = type("Other", (DynamicLayer,), {})()
    assert type(caches.grow_in_place(windowed).layers[0]) is not caches.GrowingLayer
    bare = caches.grow_in_place(DynamicCache())
    bare.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    assert type(bare.layers[0]) is caches.GrowingLayer


@pytest.mark.slow
def test_the_benchmark_of_heads_has_a_row_and_a_curve_for_every_kind_from_the_same_answers(tmp_path: Path) -> None:
    model = tiny.write(tmp_path / "model", tiny.model("gqa", initializer_range=0.15))
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"category": "x", "turns": [f"What is {n}?"]}) + "\n" for n in range(4)))
    kinds, out = list(benchmark.KINDS)[:2], tmp_path / "heads.md"
    asked = [str(model), "--prompts", str(questions), "--cache", str(tmp_path / "cache"), "--minutes", "0.1"]
    assert benchmark.main([*asked, "--threads", "1", "--tokens", "12", "--out", str(out), "--kinds", *kinds]) == 0
    rows = json.loads((tmp_path / "cache" / "heads.json").read_text())["rows"]
    first, second = (rows[kind] for kind in kinds)
    assert first["facts"]["prompts"] == second["facts"]["prompts"] > 0
    assert first["before_fit_s"] == second["before_fit_s"]
    assert all(row["facts"]["steps"] > 0 and row["facts"]["curve"] for row in (first, second))
    section = out.read_text()
    assert all(section.count(f"\n| {kind} |") == 2 for kind in kinds)
