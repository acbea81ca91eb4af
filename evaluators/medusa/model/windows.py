"""Sliding attention windows: which models have one, the cache that holds a tree for them, and the masks of its nodes.

A sliding cache forgets what a window leaves, and with it the way back after a wrong guess. So the cache keeps all rows,
and the window is in the masks: the model's own in a plain pass, these in the pass over a tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, get_layer_types_and_kwargs

MADE_OF = frozenset({"full_attention", "sliding_attention", "dummy"})


@dataclass(frozen=True, slots=True)
class Window:
    """A token sees the `size` newest tokens, itself included, in every layer or (`hybrid`) only in some of them."""

    size: int
    hybrid: bool

    def masks(self, mask: Tensor, here: Tensor, last: int) -> Tensor | dict[str, Tensor]:
        """What the model takes for the additive mask [.., n, L + n] of a tree: one mask, or one for each kind of layer.

        `here` [.., n] are the positions of the nodes, `last` the largest; cached column j holds position j.
        """
        inside = mask
        if last >= self.size:
            cached = torch.arange(mask.shape[-1] - here.shape[-1], device=mask.device)
            position = torch.cat([cached.expand(*here.shape[:-1], -1), here], dim=-1)
            left = here[..., :, None] - position[..., None, :] >= self.size
            inside = mask.masked_fill(left, torch.finfo(mask.dtype).min)
        return {"full_attention": mask, "sliding_attention": inside} if self.hybrid else inside


def window_of(config: Any) -> Window | None:
    """The window of a model whose layers all hold attention, full or in one window; None without one.

    None also for chunks, recurrent states, and windows of several sizes, which no such mask describes.
    """
    try:
        kinds, options = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    except Exception:  # a config that transformers cannot describe a cache for; the capability check says so
        return None
    sizes = {option["sliding_window"] for kind, option in zip(kinds, options, strict=True) if "sliding" in kind}
    if not set(kinds) <= MADE_OF or len(sizes) != 1:
        return None
    size = sizes.pop()
    return Window(size, "full_attention" in kinds) if isinstance(size, int) and size > 0 else None


def empty_cache(config: Any, window: Window | None) -> DynamicCache:
    """A cache without tokens; with a `window` its sliding layers keep all rows."""
    cache = DynamicCache(config=config)
    if window is not None:
        cache.layers = [DynamicLayer() if type(each) is DynamicSlidingWindowLayer else each for each in cache.layers]
    return cache
