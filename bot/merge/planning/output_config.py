"""config.json of the output: the donor's, with the edits of merging.md 3.3 and no others."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bot.merge.checkpoints.architecture import Architecture
from bot.merge.checkpoints.checkpoint import Checkpoint
from bot.merge.checkpoints.ties import config_ties, with_flag
from bot.merge.planning.layout import Layout, Stacked
from bot.merge.planning.older_keys import add_older_keys
from bot.merge.planning.work import Work
from bot.merge.recipe.notices import Notes
from bot.merge.recipe.spec import ModelRef, Recipe
from bot.merge.tokens.tokenizer import Alignment, remapped_ids

# lists that never speak of layers, however many layers there are
_NOT_BY_LAYER = re.compile(r"architectures|\w*(_token_ids?|_token_index|suppress_tokens)")
# lists of layer numbers, where others have one entry per layer
_LAYER_NUMBERS = ("mlp_only_layers", "cross_attention_layers", "attn_layer_indices", "full_attn_idxs")

# counts of layers that predict further tokens, which transformers does not load
_PREDICTION_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules")


def output_config(
    recipe: Recipe,
    checkpoints: Mapping[ModelRef, Checkpoint],
    architectures: Mapping[ModelRef, Architecture],
    layout: Layout,
    works: Sequence[Work],
    notes: Notes,
    alignment: Alignment | None,
) -> str:
    """The text of config.json: dtype as written, layer count and per-layer lists, the tie that holds, vocabulary,
    and the keys that transformers 4 reads."""
    donor = recipe.donor
    config: dict[str, Any] = copy.deepcopy(dict(checkpoints[donor].config))
    if config.pop("auto_map", None) is not None:
        notes.add("REMOTE_CODE_DROPPED", f"`auto_map` of {donor} is left out: no remote code is carried over")
    _set_dtype(config, _main_dtype(works))
    for stack in layout.stacks:
        own = [(donor, i) for i in range(stack.donor_layers)]
        for path in stack.depths:
            part = _part(config, path[:-1])
            if list(stack.layers) != own:
                _per_layer_lists(part, path[:-1], stack, checkpoints)
            part[path[-1]] = len(stack.layers)
    if layout.has_head:
        config = with_flag(config, tied=False)
    elif config_ties(config) is False and any(part.tied for part in architectures.values()):
        config = with_flag(config, tied=True)
    if layout.unpredictive:
        _without_prediction_layers(config)
    if alignment is not None:
        config.update(remapped_ids(config, alignment, donor, checkpoints[alignment.giver].config))
        inner = config.get("text_config")
        for part in (config, inner if isinstance(inner, dict) else {}):
            if "vocab_size" in part:
                part["vocab_size"] = alignment.rows
    add_older_keys(config)
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _main_dtype(works: Sequence[Work]) -> str:
    """The type most bytes are written in."""
    sizes: dict[str, int] = {}
    for work in works:
        if work.dtype.floating:
            sizes[work.dtype.name] = sizes.get(work.dtype.name, 0) + work.elements * work.dtype.itemsize
    return max(sizes, key=lambda name: sizes[name])


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    inner = [part for part in config.values() if isinstance(part, dict)]
    for part in (config, *inner):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part.get(key), str):
                part[key] = dtype
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = dtype


def _without_prediction_layers(config: dict[str, Any]) -> None:
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        for key in _PREDICTION_LAYERS:
            if part.get(key):
                part[key] = 0


def _part(config: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    for key in path:
        config = config[key]
    return config


def _per_layer_lists(
    part: dict[str, Any], path: Sequence[str], stack: Stacked, checkpoints: Mapping[ModelRef, Checkpoint]
) -> None:
    """Re-assemble every list that speaks of single layers from the layers the output is stacked of."""
    for key, value in part.items():
        if isinstance(value, list) and key in _LAYER_NUMBERS:
            listed = {model: _at(checkpoints[model].config, (*path, key)) or [] for model, _ in stack.layers}
            part[key] = [number for number, (model, i) in enumerate(stack.layers) if i in listed[model]]
        elif isinstance(value, list) and len(value) == stack.donor_layers and not _NOT_BY_LAYER.fullmatch(key):
            part[key] = [_entry(checkpoints[model].config, path, key, i, value) for model, i in stack.layers]


def _entry(config: Mapping[str, Any], path: Sequence[str], key: str, layer: int, fallback: list[Any]) -> object:
    value = _at(config, (*path, key))
    if isinstance(value, list) and layer < len(value):
        return value[layer]
    return fallback[min(layer, len(fallback) - 1)]


def _at(config: Mapping[str, Any], path: Sequence[str]) -> Any:
    part: Any = config
    for step in path:
        part = part.get(step) if isinstance(part, Mapping) else None
    return part
