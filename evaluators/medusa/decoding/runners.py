"""The cache and the forward passes that both decoding loops share, so that neither can be favoured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DummyLayer

from evaluators.medusa.decoding.acceptance import Rule
from evaluators.medusa.drafting.drafters import Drafter
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.trees.tree import Path, Tree


@dataclass(frozen=True, slots=True)
class Step:
    """What a step that was taken in one piece brought: the accepted nodes, the tokens after the root, the next state.

    `hidden` [H] is overwritten by the next step. Unless `finite`, the other fields mean nothing.
    """

    path: Path
    block: list[int]
    hidden: Tensor
    finite: bool


class Runner(Protocol):
    """A cache and the forward passes that both decoding loops use. Batch of one.

    Invariant between calls of the loop: the cache holds exactly the first `length` tokens.
    """

    base: Base
    length: int

    @property
    def execution(self) -> str:
        """How passes are run: `eager`, `packed`, `static` or `cuda_graph`, and why if it is not the fastest."""
        ...

    def prepare(self, drafter: Drafter | None, tree: Tree, rule: Rule, lengths: range) -> Callable[[Tree], Step] | None:
        """Do, before the clock runs, what is done once per shape; `lengths` are those the text may have at a step.

        What was cached is forgotten. Returns what takes a whole step on the device, from drafting to the compacted
        cache, given the tree or a cut of it; None where the loop must go piece by piece.
        """
        ...

    def prefill(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Start anew with `ids`. Returns h [H] and logits [V] of the last token."""
        ...

    def forward(self, tokens: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
        """Tokens [n] of `tree` after the cached ones -> h [n, H], logits [n, V]; `keep` or lose them next.

        The logits are good until the next call.
        """
        ...

    def keep(self, path: Sequence[int]) -> None:
        """Leave only the nodes of `path` (root first) of the last forward pass in the cache, in that order."""
        ...

    def rewind(self, tokens: int) -> None:
        """Forget the last `tokens` cached tokens."""
        ...


class EagerRunner:
    """A DynamicCache that grows with the text: nothing is prepared, nothing is captured.

    `because` says why, where something faster was looked for.
    """

    def __init__(self, base: Base, because: str | None = None) -> None:
        self.base = base
        self.cache: Any = None
        self.length = 0
        self.execution = base.execution if because is None else f"{base.execution}: {because}"
        self._width = 0
        self._text: list[int] = []
        self._tokens: Tensor | None = None
        self._prepared: dict[tuple[tuple[int, ...], ...], tuple[Tensor, Tensor]] = {}

    def prepare(self, drafter: Drafter | None, tree: Tree, rule: Rule, lengths: range) -> None:
        """There is nothing to prepare, and the loop goes piece by piece."""

    def prefill(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Start anew with `ids`. Returns h [H] and logits [V] of the last token."""
        hidden, logits = self._read(ids)
        self.length, self._width, self._text = len(ids), 0, list(ids)
        return hidden, logits

    def _read(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        self.cache = self.base.new_cache()
        row = torch.tensor([list(ids)], device=self.base.device)
        hidden, logits = self.base.run(row, last_only=True, past_key_values=self.cache, use_cache=True)
        return hidden[0, -1], logits[0, -1]

    def forward(self, tokens: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
        """Tokens [n] of `tree` after the cached ones -> h [n, H], logits [n, V]; the cache grows by n until `keep`.

        A tree of the root alone is a plain step: no mask and no explicit positions, so the baseline pays for neither.
        """
        self._width, self._tokens = tree.nodes, tokens
        if tree.nodes == 1 and self.base.reads_anew(self.length):
            hidden, logits = self._read([*self._text, *tokens.tolist()])
            return hidden[None], logits[None]
        options: dict[str, Any] = {"past_key_values": self.cache, "use_cache": True}
        if tree.nodes > 1:
            depth, bias = self._prepare(tree)
            mask = torch.zeros((tree.nodes, self.length + tree.nodes), dtype=self.base.dtype, device=self.base.device)
            mask[:, self.length :] = bias
            here = (depth + self.length)[None]
            options |= {
                "attention_mask": masks_of(self.base, mask[None, None], here[None], self.length + tree.max_depth)
            }
            options |= {"position_ids": here}
        hidden, logits = self.base.run(tokens[None], **options)
        return hidden[0], logits[0]

    def keep(self, path: Sequence[int]) -> None:
        """Leave only the nodes of `path` (root first) of the last forward pass in the cache, in that order."""
        kept = len(path)
        if (self.base.cache_name is None or self.base.rereads_at is not None) and self._tokens is not None:
            self._text[self.length :] = self._tokens[list(path)].tolist()
        if list(path) != list(range(kept)):
            # Advanced indexing copies its right-hand side first, so overlapping source and target rows are safe.
            source = torch.tensor([self.length + node for node in path], device=self.base.device)
            target = slice(self.length, self.length + kept)
            for layer in self.cache.layers:
                if isinstance(layer, DummyLayer):
                    continue
                layer.keys[:, :, target] = layer.keys[:, :, source]
                layer.values[:, :, target] = layer.values[:, :, source]
        if self._width > kept:
            self.cache.crop(kept - self._width)
        self.length += kept
        self._width = 0

    def rewind(self, tokens: int) -> None:
        """Forget the last `tokens` cached tokens."""
        self.cache.crop(-tokens)
        self.length -= tokens
        del self._text[self.length :]

    def _prepare(self, tree: Tree) -> tuple[Tensor, Tensor]:
        """Depths [n] and the additive mask of the tree's own block [n, n], once per tree."""
        if tree.paths not in self._prepared:
            self._prepared[tree.paths] = (torch.tensor(tree.depth, device=self.base.device), bias_of(self.base, tree))
        return self._prepared[tree.paths]


def bias_of(base: Base, tree: Tree) -> Tensor:
    """The additive mask of the tree's own block, [n, n]."""
    visible = torch.tensor(tree.visible(), device=base.device)
    # finfo.min, not -inf: a row of -inf would give NaN in some kernels.
    bias = torch.zeros(visible.shape, dtype=base.dtype, device=base.device)
    return bias.masked_fill_(~visible, torch.finfo(base.dtype).min)


def masks_of(base: Base, mask: Tensor, here: Tensor, last: int) -> Tensor | dict[str, Tensor]:
    """What the model takes for the mask [B, 1, n, L + n] of nodes at the positions `here` [B, 1, n] up to `last`."""
    return mask if base.window is None else base.window.masks(mask, here, last)
