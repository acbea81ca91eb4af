"""config.json of the output: the config source's, with the edits of merging.md 3.3 and no others."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bot.merge.checkpoints.architecture import Architecture
from bot.merge.checkpoints.checkpoint import Checkpoint
from bot.merge.checkpoints.ties import config_ties, with_flag
from bot.merge.checkpoints.vocabulary_ties import with_vocabulary_size
from bot.merge.planning.layout import Layout
from bot.merge.planning.older_keys import add_older_keys
from bot.merge.planning.stacked_config import restack, without_predicted
from bot.merge.planning.work import Work
from bot.merge.recipe.notices import Notes
from bot.merge.recipe.spec import ModelRef, Recipe
from bot.merge.tokenizer.tokenizer import Alignment, remapped_ids

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
    """Text of config.json with dtype, layers, head tie and vocabulary of the output, and transformers 4 keys."""
    config_source = recipe.config_source
    config: dict[str, Any] = copy.deepcopy(dict(checkpoints[config_source].config))
    if config.pop("auto_map", None) is not None:
        notes.add("REMOTE_CODE_DROPPED", f"`auto_map` of {config_source} is left out: no remote code is carried over")
    _set_dtype(config, _main_dtype(works))
    configs = {ref: checkpoints[ref].config for ref in recipe.sources}
    for stack in layout.stacks:
        restack(config, stack, config_source, configs, notes)
        if layout.unpredictive:
            without_predicted(config, stack)
    if layout.has_head:
        config = with_flag(config, tied=False)
    elif config_ties(config) is False and any(part.tied for part in architectures.values()):
        config = with_flag(config, tied=True)
    if layout.unpredictive:
        _without_prediction_layers(config)
    if alignment is not None:
        config.update(remapped_ids(config, alignment, config_source, checkpoints[alignment.tokenizer_source].config))
        config = with_vocabulary_size(config, alignment.rows)
    add_older_keys(config)
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _main_dtype(works: Sequence[Work]) -> str:
    """Floating-point dtype with the most bytes."""
    sizes = Counter[str]()
    for work in works:
        if work.dtype.floating:
            sizes[work.dtype.name] += work.nbytes
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
