"""Decoding and heads use the model that transformers loads, whichever of a tied pair is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evaluators.medusa.decoding.decode import Limits, medusa
from evaluators.medusa.decoding.static_runner import fastest
from evaluators.medusa.drafting.drafters import HeadDrafter
from evaluators.medusa.drafting.heads import HeadSpec
from evaluators.medusa.model import packed
from evaluators.medusa.trees.tree import Tree
from tests.evaluators.medusa import tiny_causal_lms as tiny

EMBEDDING = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}
PROMPT = [3, 5, 9, 40, 41, 77, 8]


def stored(folder: Path, kind: str, head: str) -> Path:
    """A checkpoint whose config says tied unless `head` is "equal, untied"."""
    tied = head != "equal, untied"
    tiny.write(folder, tiny.model(kind, tie_word_embeddings=tied))
    tensors = load_file(folder / "model.safetensors")
    shared = tensors.pop(EMBEDDING[kind])
    tensors["lm_head.weight"] = shared.clone()
    if head == "other":
        tensors["lm_head.weight"] = shared.flip(0).contiguous()
    if head != "alone":
        tensors[EMBEDDING[kind]] = shared
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", sorted(EMBEDDING))
@pytest.mark.parametrize("head", ["other", "alone", "equal, untied"])
def test_decoding_and_heads_use_the_projection_that_transformers_loads(tmp_path: Path, kind: str, head: str) -> None:
    folder = stored(tmp_path / "model", kind, head)
    reference: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([PROMPT])
    base, _ = packed.load(folder, dtype="float32")
    with torch.no_grad():
        difference = (base.run(ids, use_cache=False)[1] - reference(ids).logits).abs().max()
        want = reference.generate(ids, do_sample=False, max_new_tokens=16, pad_token_id=0)[0, len(PROMPT) :].tolist()
    heads = tiny.random_heads(base, HeadSpec("shared", 2))
    assert float(difference) < 1e-4 and torch.equal(heads.unembed, reference.get_output_embeddings().weight)
    tree, limits = Tree(((0,), (1,), (0, 0))), Limits(16, base.stop_ids)
    assert medusa(fastest(base), HeadDrafter(heads), tree, PROMPT, limits).tokens == want
