"""A key-value cache that grows in place: transformers' own copies all it holds for every token it takes in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 64  # tokens allocated ahead


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A DynamicLayer whose `keys` and `values` [B, heads, T, D] are views of tensors with room for more tokens."""

    keys: Tensor
    values: Tensor
    _rooms: tuple[Tensor | None, Tensor | None] = (None, None)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append the states of new tokens. Returns the views of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, self.keys = _append(self._rooms[0], self.keys, key_states)
        values, self.values = _append(self._rooms[1], self.values, value_states)
        self._rooms = (keys, values)
        return self.keys, self.values


def in_place(cache: Any) -> Any:
    """The same empty cache, its plain layers growing in place; layers of other kinds stay as they are."""
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    return cache


def _append(room: Tensor | None, held: Tensor, coming: Tensor) -> tuple[Tensor, Tensor]:
    """(room, view of it) that hold `held`, if anything, and `coming` after it."""
    length = held.shape[-2] if held.numel() else 0
    needed = length + coming.shape[-2]
    # Rows that were picked, repeated or replaced by somebody lie elsewhere than in the room.
    if room is None or held.data_ptr() != room.data_ptr() or len(held) != len(room) or room.shape[-2] < needed:
        room = torch.empty(
            (*coming.shape[:-2], needed + ROOM, coming.shape[-1]), dtype=coming.dtype, device=coming.device
        )
        if length:
            room[..., :length, :] = held
    room[..., length:needed, :] = coming
    return room, room[..., :needed, :]
