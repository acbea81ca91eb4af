"""Packed weights: the same model, faster; and the choice of what it computes in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_causal_lms as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators import medusa
from evaluators.medusa.decoding.capability import PROBE, disagreement, reason_against_trees
from evaluators.medusa.decoding.decode import Limits, baseline
from evaluators.medusa.decoding.decode import medusa as speculate
from evaluators.medusa.decoding.runners import EagerRunner
from evaluators.medusa.drafting.drafters import HeadDrafter
from evaluators.medusa.drafting.heads import HeadSpec
from evaluators.medusa.model import causal_lm, packed
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.trees.tree import Tree, chain, full

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN to pack weights with"
)
KINDS = ("llama", "gqa", "gpt2", "opt", "partial-rotary")
PROMPT = [5, 17, 5, 200, 31]


def made(kind: str, dtype: torch.dtype = torch.float32) -> Base:
    return Base(tiny.model(kind).to(dtype), tiny.tokenizer())


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_give_the_logits_of_the_model_and_unpacked_its_bits(kind: str) -> None:
    base = made(kind)
    ids = torch.tensor([PROMPT * 3])
    with torch.no_grad():
        want = base.model(input_ids=ids).logits
        assert packed.pack(base) is None and base.execution == "packed"
        assert torch.allclose(base.model(input_ids=ids).logits, want, atol=1e-3)
        assert not any(type(m) is torch.nn.Linear and "forward" not in m.__dict__ for m in base.model.modules())
        packed.unpack(base)
        assert base.execution == "eager"
        assert torch.equal(base.model(input_ids=ids).logits, want)


@given(
    rows=st.integers(1, 40), width=st.integers(1, 70), out=st.integers(1, 70), bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_packed_product_is_the_product_for_any_number_of_rows(
    rows: int, width: int, out: int, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    layer = torch.nn.Linear(width, out, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    layer = layer.to(dtype)
    x = torch.randn(2, rows, width, generator=draw).to(dtype)
    with torch.no_grad():
        exact = x.double() @ layer.weight.double().t() + (layer.bias.double() if bias else 0.0)
        got = packed._packed(layer)(x)
        # Summing n rounded products in any order errs by about sqrt(n) roundings of the sum of their sizes.
        size = x.double().abs() @ layer.weight.double().abs().t() + (layer.bias.double().abs() if bias else 0.0)
    assert got.dtype == dtype
    assert bool(((got.double() - exact).abs() <= (2 + width**0.5) * torch.finfo(dtype).eps * size + 1e-9).all())


@pytest.mark.parametrize("kind", KINDS)
def test_with_packed_weights_greedy_text_equals_plain_decoding_token_for_token(kind: str) -> None:
    base = made(kind)
    assert packed.pack(base) is None
    limits = Limits(40, base.stop_ids)
    want = baseline(EagerRunner(base), PROMPT, limits)
    for tree in (chain(4), full((3, 3, 3))):
        drafter = tiny.Oracle([*PROMPT, *want.tokens])
        assert speculate(EagerRunner(base), drafter, tree, PROMPT, limits).tokens == want.tokens


@pytest.mark.parametrize(
    "spec",
    [
        HeadSpec("shared", 3),
        HeadSpec("shared", 3, conditioned=True, keep=tuple(range(7, 250))),
        HeadSpec("own", 2, layers=2),
    ],
    ids=["shared", "reduced", "own"],
)
def test_heads_draft_the_same_tokens_with_packed_weights(spec: HeadSpec) -> None:
    base = made("llama")
    heads = tiny.random_heads(base, spec)
    h = torch.randn(base.hidden, generator=torch.Generator().manual_seed(3))
    want = HeadDrafter(heads).propose(h, 9, [9], chain(spec.heads))
    assert packed.pack(base) is None
    assert torch.equal(HeadDrafter(heads).propose(h, 9, [9], chain(spec.heads)), want)


def test_a_model_that_would_fill_the_memory_twice_is_not_packed() -> None:
    base = made("llama")
    reason = packed.pack(base, free_bytes=1 << 16)
    assert reason is not None and "0 MiB are free" in reason and base.execution == "eager"
    half = made("llama", torch.float16)
    reason = packed.pack(half)
    assert reason == "oneDNN packs no weights of type float16" and half.execution == "eager"


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"dtype": "bfloat16"}, (torch.float32, torch.bfloat16)),
        ({"torch_dtype": "bfloat16"}, (torch.float32, torch.bfloat16)),
        ({"dtype": "float16"}, (torch.float32,)),
        ({"dtype": "float32"}, (torch.float32,)),
        ({}, (torch.float32,)),
        ([], (torch.float32,)),
    ],
    ids=str,
)
def test_a_cpu_runs_bfloat16_only_where_it_multiplies_it(
    config: object, wanted: tuple[torch.dtype, ...], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    chosen = causal_lm.fastest_dtype(tmp_path)
    assert chosen in wanted
    assert causal_lm.fastest_dtype(tmp_path) == chosen, "decided without a clock"
    assert causal_lm.fastest_dtype(tmp_path / "absent") == torch.float32


class Chained(EagerRunner):
    """Reads the nodes of a tree as if they stood one after the other."""

    def forward(self, tokens: torch.Tensor, tree: Tree) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(tokens, chain(tree.nodes - 1))


@pytest.mark.parametrize("seed", range(5))
def test_in_bfloat16_rounding_is_told_from_a_wrong_mask(seed: int) -> None:
    base = made("gqa", torch.bfloat16)
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, base.vocab, (12,), generator=draw).tolist()
    tokens = torch.randint(0, base.vocab, (PROBE.nodes,), generator=draw)
    with torch.inference_mode():
        assert disagreement(EagerRunner(base), ids, tokens) is None
        assert "inside a tree" in (disagreement(Chained(base), ids, tokens) or "")


class Blind(Base):
    """Gives the model no positions, so that GPT-2 counts the columns of its cache."""

    def run(self, ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        options.pop("position_ids", None)
        return super().run(ids, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bit_a_wrong_place_in_a_table_of_positions_is_seen_however_alike_its_rows_are(dtype: torch.dtype) -> None:
    model, draw = tiny.model("gpt2"), torch.Generator().manual_seed(1)
    table = model.transformer.wpe.weight
    drift = torch.randn(table.shape, generator=draw).cumsum(0)  # neighbours are alike, as after a real training
    table.data.copy_(drift * 0.03 * model.transformer.wte.weight.std())
    model.to(dtype)
    assert reason_against_trees(Base(model, tiny.tokenizer())) is None
    assert "inside a tree" in (reason_against_trees(Blind(model, tiny.tokenizer())) or "")


@pytest.mark.slow
def test_a_measurement_in_bfloat16_is_whole_and_leaves_plain_text_only_at_ties(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "model", tiny.model("llama").to(torch.bfloat16))
    report = medusa.measure(
        folder, tmp_path / "out", medusa.SpeedOptions(budget_s=20, questions=3, max_new_tokens=16, dtype="bfloat16")
    )
    assert report["refusal"] is None
    assert (report["model"]["dtype"], report["environment"]["execution"]) == ("bfloat16", "packed")
    row = next(row for row in report["candidates"] if row["id"] == "fresh")
    assert all(each["tie"] for each in row["exact"]["divergences"])
    assert row["exact"]["equal"] + len(row["exact"]["divergences"]) == row["exact"]["prompts"]


def test_memory_that_holds_files_which_were_read_counts_as_free() -> None:
    """Else a checkpoint that was just read takes the memory for its own packed weights."""
    told = "MemTotal:       16316412 kB\nMemFree:          204800 kB\nMemAvailable:   12582912 kB\n"
    assert packed.available(told) == 12 << 30
    assert packed.available("MemFree: 204800 kB\n") is None
    free = packed.free_memory(torch.device("cpu"))
    assert free is not None and 0 < free < 1 << 50
