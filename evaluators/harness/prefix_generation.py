"""Greedy answers to prompts that share a prefix: it is read once, and several answers grow in one packed row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers.cache_utils import DynamicCache, DynamicLayer

from evaluators.harness.packed_pass import Mask, causal, forked, read
from evaluators.harness.prefix_tree import Chunk, PrefixTree, Segment


@dataclass(slots=True)
class Answer:
    """A growing answer: the slots of the cache that it attends to, and its tokens; the last one is not yet read."""

    prompt: int
    position: int
    slots: list[int]
    tokens: list[int] = field(default_factory=list)


class PackedDecoder:
    """Greedy decoding of the prompts of `tree`, in groups of `rows` answers that grow in one packed row.

    `finished(tokens)` is called after each token of an answer; `done(answers)` with the prompts and tokens of a
    complete group. A group whose prompts are all `skipped` is left out.
    """

    def __init__(
        self,
        model: Any,
        tree: PrefixTree,
        rows: int,
        finished: Callable[[Sequence[int]], bool],
        done: Callable[[Sequence[tuple[int, Sequence[int]]]], None],
        skipped: Callable[[int], bool],
    ) -> None:
        self._model, self._tree, self._rows = model, tree, rows
        self._finished, self._done, self._skipped = finished, done, skipped

    def run(self, passes: Sequence[Segment | Chunk], cache: DynamicCache | None = None) -> None:
        """Decode all prompts of `passes`; `cache` holds the prefix that they share."""
        prompts: list[int] = []
        for each in passes:
            if isinstance(each, Chunk):
                prompts += range(each.first, each.stop)
            elif not all(map(self._skipped, range(each.first, each.stop))):
                packed, extended = self._tree.pack(each), forked(cache)
                read(self._model, packed.ids, packed.positions, packed.mask, extended, [len(packed.ids) - 1])
                self.run(each.passes, extended)
        for begin in range(0, len(prompts), self._rows):
            group = prompts[begin : begin + self._rows]
            if not all(map(self._skipped, group)):
                self._done(self._decoded(group, passes[0].start, forked(cache)))

    def _decoded(self, prompts: Sequence[int], start: int, cache: DynamicCache) -> list[tuple[int, Sequence[int]]]:
        answers = [self._prefilled(prompt, start, cache) for prompt in prompts]
        growing = [each for each in answers if not self._finished(each.tokens)]
        while growing:
            self._step(growing, cache)
            growing = [each for each in growing if not self._finished(each.tokens)]
            used = start + sum(len(each.slots) - start for each in growing)
            if growing and cache.get_seq_length() > 2 * used:
                _compact(growing, start, cache)
        return [(each.prompt, each.tokens) for each in answers]

    def _prefilled(self, prompt: int, start: int, cache: DynamicCache) -> Answer:
        """Read what the prompt has behind the prefix; the last logits give its first token."""
        sequence = self._tree.sequences[prompt]
        size, before = len(sequence) - start, cache.get_seq_length()
        mask = np.zeros((size, before + size), bool)
        mask[:, :start] = True
        mask[:, before:] = causal(size)
        logits = read(self._model, sequence[start:], range(start, len(sequence)), mask, cache, [size - 1])
        slots = [*range(start), *range(before, before + size)]
        return Answer(prompt, len(sequence), slots, [int(logits[0].argmax())])

    def _step(self, growing: Sequence[Answer], cache: DynamicCache) -> None:
        """Read the last token of each answer in one pass, and append the next."""
        before = cache.get_seq_length()
        mask: Mask = np.zeros((len(growing), before + len(growing)), bool)
        for i, each in enumerate(growing):
            each.slots.append(before + i)
            mask[i, each.slots] = True
        ids, positions = [each.tokens[-1] for each in growing], [each.position for each in growing]
        logits = read(self._model, ids, positions, mask, cache, range(len(growing)))
        for each, token in zip(growing, logits.argmax(-1).tolist(), strict=True):
            each.position += 1
            each.tokens.append(token)


def _compact(growing: Sequence[Answer], start: int, cache: DynamicCache) -> None:
    """Drop the states that no growing answer attends to."""
    kept = [*range(start), *(slot for each in growing for slot in each.slots[start:])]
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
    at = start
    for each in growing:
        size = len(each.slots) - start
        each.slots = [*range(start), *range(at, at + size)]
        at += size
