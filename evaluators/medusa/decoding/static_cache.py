"""A key/value cache of fixed size: all layers in one tensor, so that a path is compacted in one copy for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from evaluators.medusa.model.causal_lm import Base


@dataclass(slots=True)
class Place:
    """Where the next pass writes and how far it reads: rows `slots` [n], the first `span` rows, after `length`."""

    slots: Tensor
    span: int
    length: int


class StaticTreeLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, views [1, kv_heads, capacity, head_dim] of the whole."""

    is_compileable = True

    def __init__(self, keys: Tensor, values: Tensor, place: Place) -> None:
        super().__init__()
        self.keys, self.values, self.place = keys, values, place
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing left to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.place.slots, key_states)
        self.values.index_copy_(2, self.place.slots, value_states)
        return self.keys[:, :, : self.place.span], self.values[:, :, : self.place.span]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.place.span, 0

    def get_seq_length(self) -> int:
        return self.place.length

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])


class StaticTreeCache(Cache):  # type: ignore[misc]
    """rows [2 * layers, kv_heads, capacity, head_dim]: keys and values of layer i at 2i and 2i + 1. Batch of one."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.place = Place(torch.zeros(0, dtype=torch.long, device=rows.device), 0, 0)
        pairs = zip(rows[::2, None].unbind(), rows[1::2, None].unbind(), strict=True)
        super().__init__(layers=[StaticTreeLayer(keys, values, self.place) for keys, values in pairs])

    def at(self, slots: Tensor, span: int, length: int) -> StaticTreeCache:
        """This cache, for a pass that writes rows `slots` and reads the first `span`."""
        self.place.slots, self.place.span, self.place.length = slots, span, length
        return self

    def move(self, source: Tensor, target: Tensor) -> None:
        """Rows `source` [m] to rows `target` [m], in every layer; all are read before any is written."""
        self.rows.index_copy_(2, target, self.rows.index_select(2, source))


@torch.no_grad()
def row_shape(base: Base) -> tuple[int, int, int] | str:
    """(2 * layers, kv_heads, head_dim) of what the base caches for a token, or the reason why it has no such shape."""
    name = type(base.model).__name__
    cache = base.new_cache()
    if odd := next((layer for layer in cache.layers if type(layer) is not DynamicLayer), None):
        return f"{name} uses the cache layer {type(odd).__name__}, which has no static form here."
    base.run(torch.zeros((1, 1), dtype=torch.long, device=base.device), past_key_values=cache, use_cache=True)
    tensors: Sequence[Tensor] = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    if len({(tensor.shape, tensor.dtype) for tensor in tensors}) != 1:
        return f"{name} caches keys and values of several shapes, which do not fit into one tensor."
    return len(tensors), tensors[0].shape[1], tensors[0].shape[3]
