"""Batch decoding of texts of different lengths, with the tokens and paths of single decoding.

Rows are aligned on the left: column j of a row holds its token at position j, and columns beyond the length of the row
are masked. A forward pass appends as many columns as the widest tree of any row needs; then every row gathers its
accepted path to its own end. A finished text leaves the batch. The code is written for exactness, not for speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DummyLayer

from evaluators.medusa.decoding.acceptance import GREEDY, Rule
from evaluators.medusa.decoding.decode import (
    Cuts,
    Finish,
    Limits,
    Trace,
    baseline,
    draft,
    medusa,
    past_context,
    require_finite,
)
from evaluators.medusa.decoding.runners import EagerRunner, bias_of, masks_of
from evaluators.medusa.drafting.drafters import Drafter
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.trees.tree import Path, Tree


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt with its limits, acceptance rule and drafter; without a drafter it is decoded as the baseline."""

    ids: Sequence[int]
    limits: Limits
    drafter: Drafter | None = None
    rule: Rule = GREEDY


@torch.inference_mode()
def decode(base: Base, requests: Sequence[Request], tree: Tree) -> list[Trace]:
    """One trace per request, in float32 equal to that of `decode.medusa` or `decode.baseline`.

    The base must support trees (`reason_against_trees`). The clocks of the traces stay at zero. Raises ValueError for
    an empty prompt or nothing to generate, EvaluationError for logits that are not finite.
    """
    if any(not request.ids or request.limits.max_new_tokens < 1 for request in requests):
        raise ValueError("decoding needs at least one prompt token and one token to generate")
    if base.rope[0] in ("longrope", "dynamic"):  # the longest row would change the angles of all others
        return [_alone(base, request, tree) for request in requests]
    if not requests:
        return []
    rows, cuts = _Rows(base), Cuts(tree)
    h, logits = rows.read([request.ids for request in requests])
    texts = [_prefilled(request, *first) for request, *first in zip(requests, h, logits, strict=True)]
    unfinished = texts
    while True:
        alive = [row for row, text in enumerate(unfinished) if text.goes_on(base, rows.lengths[row])]
        if not alive:
            return [text.trace for text in texts]
        rows.select(alive)
        unfinished = [unfinished[row] for row in alive]
        _step(base, rows, cuts, unfinished)


def _alone(base: Base, request: Request, tree: Tree) -> Trace:
    runner = EagerRunner(base)
    if request.drafter is None:
        return baseline(runner, request.ids, request.limits, request.rule)
    return medusa(runner, request.drafter, tree, request.ids, request.limits, request.rule)


def _step(base: Base, rows: _Rows, cuts: Cuts, texts: Sequence[_Text]) -> None:
    """One forward pass for all texts."""
    drafts = [text.draft(base, cuts, length) for text, length in zip(texts, rows.lengths, strict=True)]
    hidden, logits = rows.forward(drafts)
    paths = []
    for row, (text, (tokens, tree)) in enumerate(zip(texts, drafts, strict=True)):
        nodes = slice(tree.nodes)
        paths.append(text.accept(tree, tokens.tolist(), hidden[row, nodes], logits[row, nodes], rows.lengths[row]))
    rows.keep(paths)


@dataclass(slots=True)
class _Text:
    """An unfinished text. `h` is the hidden state that predicted the last token of `seen`."""

    request: Request
    h: Tensor
    seen: list[int]
    finish: Finish | None
    trace: Trace = field(default_factory=Trace)

    def goes_on(self, base: Base, length: int) -> bool:
        if self.finish is None and past_context(base, length):
            self.finish = "context"
        if self.finish is not None:
            self.trace.finish = self.finish
        return self.finish is None

    def draft(self, base: Base, cuts: Cuts, length: int) -> tuple[Tensor, Tree]:
        left = self.request.limits.max_new_tokens - len(self.trace.tokens) - 1
        tree = cuts.at(min(left, base.depth_room(length)))
        return draft(self.request.drafter, tree, self.h, self.seen, base.device)

    def accept(self, tree: Tree, token_of: list[int], hidden: Tensor, logits: Tensor, length: int) -> Path:
        """Accept tokens from the states [n, H] and logits [n, V] of the nodes. Returns the accepted nodes."""
        require_finite(logits, self.trace.steps + 1)
        path, next_root = self.request.rule.accept(tree, token_of, logits, length)
        brought = [*(token_of[node] for node in path[1:]), next_root]
        block, self.finish = self.request.limits.cut(self.seen, brought, len(self.trace.tokens))
        self.h = hidden[path[-1]]
        self.seen += block
        self.trace.tokens += block
        self.trace.emitted.append(len(block))
        self.trace.paths.append(path)
        return path


def _prefilled(request: Request, h: Tensor, logits: Tensor) -> _Text:
    require_finite(logits, 0)
    root = request.rule.pick(logits, len(request.ids))
    _, finish = request.limits.cut(request.ids, [root], 0)
    return _Text(request, h, [*request.ids, root], finish, Trace(tokens=[root]))


class _Rows:
    """Cache of several texts. The first `lengths[b]` columns of row b hold its tokens; later columns are unused."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.cache: Any = base.new_cache()
        self.lengths: list[int] = []

    def read(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Prefill all prompts [B] at once. Returns h [B, H] and logits [B, V] of their last tokens."""
        self.lengths = [len(prompt) for prompt in prompts]
        ids = torch.zeros((len(prompts), max(self.lengths)), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(list(prompt))
        # Padding on the right comes after all tokens of a row, so that none of them attends to it.
        hidden, logits = self.base.run(
            ids.to(self.base.device), project=False, past_key_values=self.cache, use_cache=True
        )
        rows, last = torch.arange(len(prompts)), torch.tensor(self.lengths) - 1
        h = hidden[rows, last]
        return h, logits[rows, last] if logits.numel() else self.base.logits(h)

    def forward(self, drafts: Sequence[tuple[Tensor, Tree]]) -> tuple[Tensor, Tensor]:
        """Tokens [n_b] and tree of each row -> h [B, n, H], logits [B, n, V]; n of the widest tree.

        Values beyond the tree of a row are meaningless.
        """
        base, width = self.base, max(self.lengths)
        nodes = max(tree.nodes for _, tree in drafts)
        tokens = torch.zeros((len(drafts), nodes), dtype=torch.long, device=base.device)
        positions = torch.tensor(self.lengths, device=base.device)[:, None].repeat(1, nodes)
        mask = torch.full(
            (len(drafts), 1, nodes, width + nodes), torch.finfo(base.dtype).min, dtype=base.dtype, device=base.device
        )
        for row, (drafted, tree) in enumerate(drafts):
            tokens[row, : tree.nodes] = drafted
            positions[row, : tree.nodes] += torch.tensor(tree.depth, device=base.device)
            mask[row, :, :, : self.lengths[row]] = 0
            mask[row, 0, : tree.nodes, width : width + tree.nodes] = bias_of(base, tree)
        masks = masks_of(base, mask, positions[:, None], int(positions.max()))
        return base.run(
            tokens, attention_mask=masks, position_ids=positions, past_key_values=self.cache, use_cache=True
        )

    def keep(self, paths: Sequence[Path]) -> None:
        """Keep of the last forward pass only the nodes of each row's path, directly after its tokens."""
        width = max(self.lengths)
        kept = [
            [*range(length), *(width + node for node in path)] for length, path in zip(self.lengths, paths, strict=True)
        ]
        self.lengths = [len(columns) for columns in kept]
        filled = [columns + [0] * (max(self.lengths) - len(columns)) for columns in kept]
        index = torch.tensor(filled, device=self.base.device)[:, None, :, None]
        for layer in self._layers():
            for name in ("keys", "values"):
                rows: Tensor = getattr(layer, name)  # [B, kv_heads, columns, head_dim]
                setattr(layer, name, rows.gather(2, index.expand(-1, rows.shape[1], -1, rows.shape[3])))

    def select(self, rows: Sequence[int]) -> None:
        """Remove all other rows."""
        if list(rows) == list(range(len(self.lengths))):
            return
        self.lengths = [self.lengths[row] for row in rows]
        chosen = torch.tensor(list(rows), device=self.base.device)
        for layer in self._layers():
            layer.keys = layer.keys[chosen, :, : max(self.lengths)]
            layer.values = layer.values[chosen, :, : max(self.lengths)]

    def _layers(self) -> list[Any]:
        return [layer for layer in self.cache.layers if not isinstance(layer, DummyLayer) and layer.is_initialized]
