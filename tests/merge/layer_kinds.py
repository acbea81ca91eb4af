"""The layers that transformers builds for a config, without weights."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto

LAYERS = 8
MAPPINGS = ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "CAUSAL_LM", "MASKED_LM")
DEPTHS = (
    "num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers", "num_encoder_layers",
    "num_decoder_layers", "encoder_num_hidden_layers", "decoder_num_hidden_layers", "depth",
)  # fmt: skip
# values that make every rule tell the layers of a stack apart, for whatever class has the key
SETTINGS = {
    "first_k_dense_replace": 2, "num_dense_layers": 3, "max_window_layers": 5, "use_sliding_window": True,
    "sliding_window": 16, "decoder_sparse_step": 2, "encoder_sparse_step": 2, "num_kv_shared_layers": 0,
    "moe_layer_start_index": 2, "attn_layer_period": 4, "attn_layer_offset": 1, "interleave_moe_layer_step": 2,
    "cross_layer_interval": 1, "hidden_size_per_layer_input": 0, "fullatt_block_indexes": [3, 6],
    "num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 4, "attn_layer_indices": [2, 5],
    "full_attn_idxs": [2, 5], "deepstack_visual_indexes": [6], "cross_attention_layers": [2, 5],
    "intermediate_layers_indices": [6],
}  # fmt: skip
_PLACE = re.compile(r"layer_(idx|id|num|number|index)|training|seed|has_relative_attention_bias")
# modules that do not change how a layer computes, and config lists that are not per layer or repeat a rule
_SILENT = re.compile(r".*(drop_path|relative_attention_bias).*")  # the bias belongs to the first place, see layout.py
_NOT_COMPARED = (
    "architectures", "mlp_only_layers", "local_layer_ids", "block_types", "kv_source_layers", "rope_scaling_layers",
    "summary_idxs", "supported_aspect_ratios",
)  # fmt: skip
_NUMBERS = re.compile(r"\w*(layers|indexes|indices|idxs|layer_ids)")

Layer = tuple[Any, ...]


@cache
def model_types() -> dict[str, str]:
    """Model type -> the class that transformers builds for it: every causal or conditional language model."""
    found: dict[str, str] = {}
    for name in MAPPINGS:
        for model_type, built in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES").items():
            found.setdefault(model_type, built if isinstance(built, str) else built[0])
    return dict(sorted(found.items()))


def config_json(model_type: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json as it might be published: the layer counts and the rules, no lists that transformers derives."""
    config = CONFIG_MAPPING[model_type](**changes)
    return _merged(_published(config), changes)


def _merged(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        config[key] = _merged(config.get(key, {}), value) if isinstance(value, dict) and key in config else value
    return config


def _published(config: PreTrainedConfig) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(type(config))}
    out: dict[str, Any] = {"model_type": config.model_type}
    out |= {key: LAYERS for key in DEPTHS if key in fields}
    if len(out) > 1:
        out |= {key: value for key, value in SETTINGS.items() if key in fields}
    for key in type(config).sub_configs:
        inner = getattr(config, key, None)
        if isinstance(inner, PreTrainedConfig):
            out[key] = _published(inner)
    return out


def depth_paths(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of the layer counts in a config."""
    for key, value in config.items():
        if key in DEPTHS and value == LAYERS:
            yield (*path, key)
        elif isinstance(value, dict):
            yield from depth_paths(value, (*path, key))


def value_at(config: Mapping[str, Any], path: Sequence[str]) -> Any:
    """The value at a path of keys."""
    for key in path:
        config = config[key]
    return config


def read(model_type: str, config: Mapping[str, Any]) -> PreTrainedConfig:
    """The config as transformers understands it."""
    config = {key: value for key, value in config.items() if key not in ("model_type", "transformers_version")}
    return CONFIG_MAPPING[model_type](**copy.deepcopy(config))  # a copy, as some classes change what they are given


def build(model_type: str, config: PreTrainedConfig) -> nn.Module:
    """The model without weights."""
    with torch.device("meta"), no_init_weights():
        return getattr(transformers, model_types()[model_type])(config)


def stacks(model: nn.Module, count: int) -> dict[str, nn.ModuleList]:
    """The outermost lists of `count` modules, by name."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == count
            and not any(name.startswith(f"{own}.") for own in found)
        ):
            found[name] = module
    return found


def layers_of(model: nn.Module, name: str) -> list[Layer]:
    """For each layer of a stack: modules and their settings, tensors and their shapes, entries in config lists."""
    layers = model.get_submodule(name)
    owner = model.get_submodule(name.rpartition(".")[0])
    lists = list(_lists(getattr(owner, "config", None), len(layers)))
    return [
        (
            [
                (inner, type(module).__name__, _settings(module))
                for inner, module in layer.named_modules()
                if not _SILENT.fullmatch(inner)
            ],
            [(key, tuple(tensor.shape)) for key, tensor in _tensors(layer)],
            [(key, values[i]) for key, values in lists],
        )
        for i, layer in enumerate(layers)
    ]


def loose(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors outside of the stacks."""
    prefixes = tuple(f"{name}." for name in names)
    return {key: tuple(tensor.shape) for key, tensor in _tensors(model) if not key.startswith(prefixes)}


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for key, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not _SILENT.fullmatch(key):
            yield key, tensor


def _settings(module: nn.Module) -> list[tuple[str, Any]]:
    return sorted(
        (key, round(value, 6) if isinstance(value, float) else value)
        for key, value in vars(module).items()
        if not key.startswith("_") and not _PLACE.fullmatch(key) and isinstance(value, int | float | str | bool | None)
    )


def _lists(config: PreTrainedConfig | None, count: int) -> Iterator[tuple[str, list[Any]]]:
    """Per-layer values of a config: entries of lists, and membership in lists of layer numbers."""
    for key, value in vars(config).items() if config is not None else ():
        if not isinstance(value, list | tuple) or key in _NOT_COMPARED:
            continue
        if len(value) == count:
            yield key, list(value)
        elif _NUMBERS.fullmatch(key) and all(isinstance(number, int) for number in value):
            yield key, [i in value for i in range(count)]
