"""One pass of a model over tokens packed in one row, each with its position and a mask of what it attends to."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from evaluators.harness.prefix_tree import Chunk, PrefixTree

Mask = npt.NDArray[np.bool_]
_PROBE = 24  # tokens of the trial


@torch.inference_mode()
def read(
    model: Any,
    ids: Sequence[int],
    positions: Sequence[int],
    mask: Mask,
    cache: DynamicCache | None,
    kept: Sequence[int],
) -> Tensor:
    """Logits [K, V] at the indices `kept` of N tokens.

    `mask` [N, N] or [N, C + N] says which tokens each one attends to; the narrow form attends to all C tokens that the
    cache holds. The cache is extended by the N tokens; None keeps no states.
    """
    device = model.device
    cached = 0 if cache is None else cache.get_seq_length()
    bias = torch.zeros(1, 1, len(ids), cached + len(ids), dtype=model.dtype, device=device)
    hidden = ~torch.from_numpy(mask).to(device)
    bias[0, 0, :, -hidden.shape[1] :].masked_fill_(hidden, torch.finfo(model.dtype).min)
    out = model(
        input_ids=torch.tensor([list(ids)], device=device),
        position_ids=torch.tensor([list(positions)], device=device),
        attention_mask=bias,
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=torch.tensor(list(kept), device=device),
    )
    logits: Tensor = out.logits[0]
    return logits


def forked(cache: DynamicCache | None) -> DynamicCache:
    """A cache over the same states; tokens appended to one are not in the other."""
    out = DynamicCache()
    if cache is not None:
        out.layers = [copy.copy(layer) for layer in cache.layers]
    return out


def causal(size: int) -> Mask:
    """The mask [N, N] of a plain sequence."""
    return np.tri(size, dtype=bool)


def reason_against(model: Any) -> str | None:
    """A sentence why tokens of this model cannot be packed; None if a trial agrees with plain passes."""
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.get_input_embeddings().num_embeddings, (_PROBE,), generator=generator).tolist()
    tree = PrefixTree([tuple(ids[:16]), tuple(ids[:12] + ids[16:])])
    try:
        with torch.inference_mode():
            plain = [model(torch.tensor([row], device=model.device)).logits[0, -1].float() for row in tree.sequences]
        cache = DynamicCache()
        read(model, ids[:4], range(4), causal(4), cache, [3])
        if not all(type(layer) is DynamicLayer for layer in cache.layers):
            return "its cache keeps more than keys and values"
        packed = tree.pack(Chunk(0, 2, 4))
        ends = [slots[-1] for slots in packed.slots]
        found = read(model, packed.ids, packed.positions, packed.mask, forked(cache), ends).float()
    except Exception as error:  # a model of any kind may come here, and its own way is always there
        return f"a trial ended with {type(error).__name__}"
    tolerance = 1e-4 if model.dtype == torch.float32 else 2e-2
    scale = max(1.0, *(float(each.abs().max()) for each in plain))
    agrees = all(float((a - b).abs().max()) <= tolerance * scale for a, b in zip(plain, found, strict=True))
    return None if agrees else "a trial gave other logits"


def longest(model: Any) -> float:
    """Tokens up to which attention and positions do not depend on the length of a pass."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [each for each in rope.values() if isinstance(each, dict)] or [rope]
    original = [
        part.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
        for part in parts
        if part.get("rope_type") in ("dynamic", "longrope")
    ]
    return min([each for each in (window, *original) if each], default=float("inf"))
