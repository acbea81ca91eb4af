"""Grouped-query attention that does not repeat keys and values, for one token and for a tree.

With a mask, sdpa in transformers repeats the keys and values of each group for every query head, in each layer of each
step. Without a mask it leaves grouping to torch, whose CPU kernel in bfloat16 becomes slower with longer texts
(measured: a baseline step of a 135 M Llama after 512 tokens takes 31 ms instead of 20). Here the query heads of a group
become rows of one matrix, which gives the same products over the keys in the cache. Both decoding loops and `generate`
of transformers then use this kernel.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from evaluators.medusa.model.causal_lm import Base

GROUPED = "sdpa_grouped"
# options that change the scores
UNLIKE_SDPA = ("position_bias", "softcap", "s_aux", "cache", "indices", "block_indices")
CHECKS_NAME = re.compile(r"_attn_implementation\s*(?:not\s+)?(?:in|==|!=)[\s(\"']")


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """query [B, heads, n, d], key and value [B, kv_heads, L, d], mask [B, 1, n or n * heads / kv_heads, L] or None.

    Returns [B, n, heads, d]. The longer mask is already tiled, once for all layers.
    """
    _, heads, n, _ = query.shape
    groups = heads // key.shape[1]
    odd = any(options.get(name) is not None for name in UNLIKE_SDPA)
    causal = attention_mask is None and n > 1  # prefill: its kernel needs no mask
    if causal or groups == 1 or odd or (attention_mask is not None and attention_mask.shape[1] > 1):
        done: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return done
    rows = query.reshape(query.shape[0], key.shape[1], groups * n, query.shape[3])
    mask = attention_mask
    if mask is not None and mask.shape[2] != groups * n:
        mask = mask.repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=options.get("scaling"))
    return out.reshape(query.shape[0], heads, n, value.shape[3]).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


def use_grouped(base: Base) -> None:
    """Use this kernel for `base`, if it runs with sdpa and the code of its class does not check for that name.

    Models with sparse attention check the name and would otherwise omit their mask.
    """
    if base.model.config._attn_implementation == "sdpa" and not _checks_name(base.model):
        base.model.set_attn_implementation(GROUPED)


def _checks_name(model: nn.Module) -> bool:
    try:
        source = inspect.getsource(sys.modules[type(model).__module__])
    except (OSError, TypeError, KeyError):
        return True
    return CHECKS_NAME.search(source) is not None


def tiles_of(base: Base) -> int:
    """Number of times the rows of the mask of a tree are repeated for this base."""
    if base.model.config._attn_implementation != GROUPED:
        return 1
    heads = base.config.num_attention_heads
    return int(heads // (getattr(base.config, "num_key_value_heads", None) or heads))
