"""Key-value caches: one that keeps all rows of a sliding attention window, and one that grows in place.

A sliding cache drops rows that leave the window, so a rejected draft could not be undone. Here the cache keeps all
rows, and masks apply the window: those of the model in a baseline pass, those of `Window` in a pass over a tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, get_layer_types_and_kwargs

ROOM = 64  # tokens allocated ahead
LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "dummy"})


@dataclass(frozen=True, slots=True)
class Window:
    """Attention window of `size` tokens, the current one included, in every layer or (`hybrid`) only in some."""

    size: int
    hybrid: bool

    def masks(self, mask: Tensor, positions: Tensor, last: int) -> Tensor | dict[str, Tensor]:
        """Apply the window to the additive mask [.., n, L + n] of a tree: one mask, or one for each kind of layer.

        `positions` [.., n] are those of the nodes, `last` is the largest; cached column j holds position j.
        """
        inside = mask
        if last >= self.size:
            cached = torch.arange(mask.shape[-1] - positions.shape[-1], device=mask.device)
            columns = torch.cat([cached.expand(*positions.shape[:-1], -1), positions], dim=-1)
            outside = positions[..., :, None] - columns[..., None, :] >= self.size
            inside = mask.masked_fill(outside, torch.finfo(mask.dtype).min)
        return {"full_attention": mask, "sliding_attention": inside} if self.hybrid else inside


def window_of(config: Any) -> Window | None:
    """Attention window of a model; None without one.

    None also for chunks, recurrent states and windows of several sizes, which these masks do not describe.
    """
    try:
        kinds, options = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    except Exception:  # transformers cannot describe a cache for this config; the capability check reports that
        return None
    sizes = {option["sliding_window"] for kind, option in zip(kinds, options, strict=True) if "sliding" in kind}
    if not set(kinds) <= LAYER_TYPES or len(sizes) != 1:
        return None
    size = sizes.pop()
    return Window(size, "full_attention" in kinds) if isinstance(size, int) and size > 0 else None


def empty_cache(config: Any, window: Window | None) -> DynamicCache:
    """Make an empty cache; with a `window` its sliding layers keep all rows."""
    cache = DynamicCache(config=config)
    if window is not None:
        cache.layers = [DynamicLayer() if type(each) is DynamicSlidingWindowLayer else each for each in cache.layers]
    return cache


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A DynamicLayer whose `keys` and `values` [B, heads, T, D] are views of tensors with room for more tokens.

    The layer of transformers copies all rows for every new token.
    """

    keys: Tensor
    values: Tensor
    _rooms: tuple[Tensor | None, Tensor | None] = (None, None)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append the states of new tokens. Returns views of all states."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, self.keys = _append(self._rooms[0], self.keys, key_states)
        values, self.values = _append(self._rooms[1], self.values, value_states)
        self._rooms = (keys, values)
        return self.keys, self.values


def grow_in_place(cache: Any) -> Any:
    """Let the plain layers of an empty cache grow in place; layers of other kinds stay as they are."""
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    return cache


def _append(room: Tensor | None, held: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """(room, view of it) with the rows `held` and `new` after them."""
    length = held.shape[-2] if held.numel() else 0
    needed = length + new.shape[-2]
    # Rows that a caller selected, repeated or replaced are no longer in the room.
    if room is None or held.data_ptr() != room.data_ptr() or len(held) != len(room) or room.shape[-2] < needed:
        room = torch.empty((*new.shape[:-2], needed + ROOM, new.shape[-1]), dtype=new.dtype, device=new.device)
        if length:
            room[..., :length, :] = held
    room[..., length:needed, :] = new
    return room, room[..., :needed, :]
