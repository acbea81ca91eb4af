"""Models of a given shape that need no download, and drafters of a given accuracy: for what a step costs.

The model's weights are random, but its readout is not: every token has one successor, whose output row is the token's
own embedding, and what the layers add is small beside it. All is computed as in a trained model of the shape, and the
text is certain by a margin that no rounding crosses, so that a drafter can know it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.models import Shape
from evaluators.medusa.drafting.drafters import HeadDrafter
from evaluators.medusa.drafting.heads import Heads, HeadSpec
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.trees.tree import Path, Tree

SHAPES = {
    "tiny": Shape(2, 64, 128, 4, 2, 512),
    "1B": Shape(16, 2048, 8192, 32, 8, 128256),
    "3B": Shape(28, 3072, 8192, 24, 8, 128256),
    "8B": Shape(32, 4096, 14336, 32, 8, 128256),
}
POSITIONS = 4096
RESIDUAL = 0.1  # by which what a layer adds is made small
# Cumulative accuracy of the first five ranks of the published heads of the 7B model, head by head (medusa.md, 2.3).
PUBLISHED = (
    (0.560, 0.672, 0.727, 0.760, 0.780),
    (0.316, 0.424, 0.485, 0.528, 0.562),
    (0.201, 0.288, 0.348, 0.383, 0.417),
    (0.147, 0.225, 0.274, 0.311, 0.340),
    (0.118, 0.187, 0.235, 0.272, 0.300),
)


def shares(misses: float) -> list[list[float]]:
    """Share of positions where each rank of each head is right, if only that part of the published misses is left."""
    rows = [[0.0, *(1 - (1 - value) * misses for value in row)] for row in PUBLISHED]
    return [[after - before for before, after in itertools.pairwise(row)] for row in rows]


@dataclass(frozen=True, slots=True)
class Simulated:
    """A model of some shape and the successor [V] of each of its tokens."""

    base: Base
    successor: Tensor

    def text(self, first: int, tokens: int) -> list[int]:
        """`tokens` tokens after `first`."""
        text = [first]
        successor = self.successor.tolist()
        for _ in range(tokens):
            text.append(successor[text[-1]])
        return text[1:]


@torch.no_grad()
def simulated(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Simulated:
    """Made on the device, the same for the same seed and device."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        order = torch.randperm(shape.vocabulary)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(RESIDUAL)
        layer.mlp.down_proj.weight.mul_(RESIDUAL)
    successor = torch.empty_like(order)
    successor[order] = order.roll(-1)
    embedding = model.get_input_embeddings().weight
    embedding.normal_()
    model.get_output_embeddings().weight[successor] = embedding
    return Simulated(Base(model, None), successor)


def real_heads(base: Base, vocabulary: int) -> Heads:
    """Conditioned heads over a reduced vocabulary, as many as were published: what is paid for a draft."""
    keep = tuple(range(min(vocabulary, base.vocab)))
    return Heads(HeadSpec("shared", len(PUBLISHED), 1, conditioned=True, keep=keep), base)


class SimulatedDrafter:
    """Runs real heads, then replaces what they say by guesses that are right as often as `accuracy` says.

    Which rank of a head is right, if any, is drawn once for every position, independently for each head.
    """

    def __init__(self, model: Simulated, heads: Heads, accuracy: Sequence[Sequence[float]], seed: int = 0) -> None:
        self._heads = HeadDrafter(heads)
        self._vocab = model.base.vocab
        device, count = model.base.device, len(accuracy)
        ahead = [model.successor]
        for _ in range(count):
            ahead.append(model.successor[ahead[-1]])
        self._ahead = torch.stack(ahead[:count], dim=1)  # [V, heads]: the tokens 1, 2, .. places after each
        limits = torch.tensor(accuracy).cumsum(-1)  # [heads, ranks]
        drawn = torch.rand(POSITIONS, count, 1, generator=torch.Generator().manual_seed(seed))
        self._right = (drawn >= limits).sum(-1).to(device)  # [positions, heads]: the rank; past the last one none is
        self._nodes: dict[tuple[Path, ...], tuple[Tensor, Tensor]] = {}

    def propose(self, h: Tensor, root: int, seen: Sequence[int], tree: Tree) -> Tensor:
        at = torch.tensor([root, len(seen) - 1], device=h.device)
        return self.draft(h, at[:1], at[1:], tree)

    def draft(self, h: Tensor, root: Tensor, position: Tensor, tree: Tree) -> Tensor:
        self._heads.draft(h, root, position, tree)
        if tree.paths not in self._nodes:
            head = torch.tensor([len(path) - 1 for path in tree.paths], device=h.device)
            self._nodes[tree.paths] = head, torch.tensor([path[-1] for path in tree.paths], device=h.device)
        head, rank = self._nodes[tree.paths]
        truth, right = self._ahead[root][0, head], self._right[position][0, head]
        return torch.where(right == rank, truth, (truth + 1 + rank) % self._vocab)
