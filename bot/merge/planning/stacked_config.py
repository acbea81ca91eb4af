"""Per-layer values of a config, rewritten for layers that are cut, stacked or mixed.

There are three kinds: lists with one entry per layer, lists of layer numbers, and rules (`layer_rules`).
merging.md 3.3.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bot.errors import Refused
from bot.merge.planning.layer_rules import WHOLE, Kinds, Rule, at, part_at, rules_of
from bot.merge.planning.layer_table import LAYER_RULES
from bot.merge.planning.layout import Stacked
from bot.merge.recipe.notices import Notes
from bot.merge.recipe.spec import ModelRef

Configs = Mapping[ModelRef, Mapping[str, Any]]

# lists that are never per layer, even if as long as the stack
_NOT_BY_LAYER = re.compile(r"architectures|\w*(_token_ids?|_token_index|suppress_tokens|_section|_aspect_ratios)")
# strings with one letter per layer
_LETTERS = ("hybrid_override_pattern", "index_topk_pattern")
# lists of layer numbers, where others have one entry per layer; the number of the first layer
_LAYER_NUMBERS = {
    "mlp_only_layers": 0,
    "cross_attention_layers": 0,
    "attn_layer_indices": 0,
    "full_attn_idxs": 0,
    "moe_layers": 0,
    "local_layer_ids": 0,
    "rope_scaling_layers": 0,
    "subsample_layers": 0,
    "fullatt_block_indexes": 0,
    "hybrid_layer_ids": 0,
    "full_attn_layers": 1,
    "kda_layers": 1,
    "ple_layer_ids": 1,
}
# dicts whose lists are per layer like those of the config itself
_INNER = ("linear_attn_config", "sparse_attention_config")
# lists that may have entries for prediction layers at their end
_WITH_PREDICTION = re.compile(
    r"\w*layer_types|compress_ratios|swiglu_limits\w*|rope_theta|partial_rotary_factors|\w*_freq"
)
# further keys that count the same layers
_SAME_COUNT = {"num_blocks": "num_hidden_layers"}
# further keys that layers of a kind need
_NEEDED = {"sliding": ("use_sliding_window", "sliding_window"), "chunked": ("attention_chunk_size",)}


def restack(config: dict[str, Any], stack: Stacked, config_source: ModelRef, configs: Configs, notes: Notes) -> None:
    """Change `config`, a copy of the config source's, so that it describes the layers of `stack`.

    Raises `Refused(LAYER_RULE)` if a rule of the config cannot give each layer the kind that it had in its own model.
    """
    same = list(stack.layers) == [(config_source, i) for i in range(stack.source_layers)]
    for path in stack.depths or _uncounted(config, stack):
        part = at(config, path[:-1])
        if not same:
            rules = rules_of(config, path, LAYER_RULES)
            wanted = [_wanted(rule, path, stack, config_source, configs) for rule in rules]
            _per_layer(part, path[:-1], stack, configs)
        if path in stack.depths:
            part[path[-1]] = len(stack.layers)
        if _SAME_COUNT.get(path[-1]) in part:
            part[_SAME_COUNT[path[-1]]] = len(stack.layers)
        if not same:
            _follow(config, path, list(zip(rules, wanted, strict=True)), stack, config_source, configs, notes)


def without_predicted(config: dict[str, Any], stack: Stacked) -> None:
    """Cut the entries of prediction layers off the lists, which follow those of `stack`."""
    for path in stack.depths:
        part, count = at(config, path[:-1]), len(stack.layers)
        for key, value in part.items():
            if isinstance(value, list) and _WITH_PREDICTION.fullmatch(key) and len(value) == count + _predicted(part):
                part[key] = value[:count]


def _uncounted(config: Mapping[str, Any], stack: Stacked) -> list[tuple[str, ...]]:
    """Paths of missing counts in configs that count layers by a list alone (Nemotron-H, saved again)."""
    paths: tuple[tuple[str, ...], ...] = (("num_hidden_layers",), ("text_config", "num_hidden_layers"))
    return [
        path
        for path in paths
        for rule in rules_of(config, path, LAYER_RULES)
        if rule.listed and stack.layers and _length(part_at(config, path).get(rule.listed)) == stack.source_layers
    ][:1]


def _length(value: object) -> int:
    return len(value) if isinstance(value, list | str) else 0


def _view(config: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """The part of a config that describes a stack, and the whole config for the rules that depend on it."""
    return {**part_at(config, path), WHOLE: config}


def _count(config: Mapping[str, Any], path: Sequence[str], least: int) -> int:
    count = at(config, path)
    return count if isinstance(count, int) and count >= least else least


def _wanted(rule: Rule, path: Sequence[str], stack: Stacked, config_source: ModelRef, configs: Configs) -> Kinds:
    """The kind each layer of the output had in its own model."""
    depth = {model: 1 + max(i for own, i in stack.layers if own == model) for model, _ in stack.layers}
    kinds = {
        model: rule.kinds(_view(configs[model], path), _count(configs[model], path, least))
        for model, least in depth.items()
    }
    return [kinds[model][i] for model, i in stack.layers]


def _follow(
    config: dict[str, Any],
    path: Sequence[str],
    rules: Sequence[tuple[Rule, Kinds]],
    stack: Stacked,
    config_source: ModelRef,
    configs: Configs,
    notes: Notes,
) -> None:
    part = at(config, path[:-1])
    for rule, wanted in rules:
        own = rule.kinds(_view(configs[config_source], path), stack.source_layers)
        part.update(_needed(wanted, own, path, stack, configs))
        edits = rule.edits(_view(config, path), wanted)
        if edits is None:
            raise _refusal(rule, config_source, wanted)
        part.update(edits)
        if rule.listed is not None and rule.ignores_list(_view(configs[config_source], path), own):
            _follow_old(rule, part, _view(config, path), wanted, notes)
    for rule, wanted in rules:  # two rules may share a key
        if rule.kinds(_view(config, path), len(wanted)) != wanted:
            raise _refusal(rule, config_source, wanted)


def _needed(
    wanted: Kinds, own: Kinds, path: Sequence[str], stack: Stacked, configs: Configs
) -> Iterator[tuple[str, Any]]:
    """Keys that a kind needs which no layer of the config source has, from the model that gives it."""
    for (model, _), kind in zip(stack.layers, wanted, strict=True):
        for word, keys in _NEEDED.items():
            if isinstance(kind, str) and word in kind and kind not in own:
                theirs = part_at(configs[model], path)
                yield from ((key, theirs[key]) for key in keys if key in theirs)


def _follow_old(rule: Rule, part: dict[str, Any], view: Mapping[str, Any], wanted: Kinds, notes: Notes) -> None:
    edits = rule.old_edits(view, wanted)
    if edits is not None:
        part.update(edits)
        return
    keys = " and ".join(f"`{key}`" for values in rule.values for key in values.keys) or "the rule before it"
    text = f"config.json lists `{rule.listed}`, as {keys} cannot express the new order"
    notes.add(
        "LAYER_LIST", f"{text}; programs that do not read the list (transformers 4.52 and older) build other layers"
    )


def _refusal(rule: Rule, config_source: ModelRef, wanted: Kinds) -> Refused:
    return Refused(
        "LAYER_RULE",
        f"`{rule.name}` in the config of {config_source} cannot describe this order of layers.",
        f"Choose slices for which {rule.limit}.",
        value=", ".join(map(str, wanted)),
    )


def _per_layer(part: dict[str, Any], path: Sequence[str], stack: Stacked, configs: Configs) -> None:
    """Rebuild every per-layer list for the layers of the output."""
    for key, value in part.items():
        if isinstance(value, list) and key in _LAYER_NUMBERS:
            part[key] = _numbers(path, key, stack, configs)
        elif isinstance(value, list) and not _NOT_BY_LAYER.fullmatch(key):
            extra = _predicted(part) if _WITH_PREDICTION.fullmatch(key) else 0
            part[key] = _entries(path, key, value, stack, configs, extra)
        elif isinstance(value, str) and key in _LETTERS and len(value) == stack.source_layers:
            part[key] = "".join(str(_entry(configs[model], path, key, i, value)) for model, i in stack.layers)
        elif key == "per_layer_config" and isinstance(value, dict):
            part[key] = _by_number(path, key, stack, configs)
        elif key in _INNER and isinstance(value, dict):
            _per_layer(value, (*path, key), stack, configs)


def _numbers(path: Sequence[str], key: str, stack: Stacked, configs: Configs) -> list[int]:
    start = _LAYER_NUMBERS[key]
    listed = {model: at(configs[model], (*path, key)) for model, _ in stack.layers}
    numbers = {model: value if isinstance(value, list) else [] for model, value in listed.items()}
    return [number + start for number, (model, i) in enumerate(stack.layers) if i + start in numbers[model]]


def _predicted(part: Mapping[str, Any]) -> int:
    count = part.get("num_nextn_predict_layers")
    return count if isinstance(count, int) else 0


def _entries(
    path: Sequence[str], key: str, value: list[Any], stack: Stacked, configs: Configs, extra: int
) -> list[Any]:
    """One entry per layer, and those of `extra` prediction layers after them."""
    if len(value) not in (stack.source_layers, stack.source_layers + extra):
        return value
    own = [_entry(configs[model], path, key, i, value) for model, i in stack.layers]
    return own + value[stack.source_layers :]


def _by_number(path: Sequence[str], key: str, stack: Stacked, configs: Configs) -> dict[str, Any]:
    """Dict from layer numbers (JSON: strings) to special properties of the layer."""
    found = {str(number): at(configs[model], (*path, key, str(i))) for number, (model, i) in enumerate(stack.layers)}
    return {number: value for number, value in found.items() if value is not None}


def _entry(config: Mapping[str, Any], path: Sequence[str], key: str, layer: int, fallback: Sequence[Any]) -> object:
    value = at(config, (*path, key))
    if isinstance(value, list | str) and layer < len(value):
        return value[layer]
    return fallback[min(layer, len(fallback) - 1)]
