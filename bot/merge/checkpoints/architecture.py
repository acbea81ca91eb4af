"""Tensors, layers and ties of a model, inferred from config and headers. docs/design/merging.md 5.2.

A layer's tensors are the suffixes stored for that layer, never a template, so hybrids, leading dense layers and pruned
shapes need no description.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from bot.errors import Refused
from bot.merge.checkpoints.checkpoint import Checkpoint
from bot.merge.checkpoints.header import TensorInfo
from bot.merge.checkpoints.tensor_names import LAYER
from bot.merge.checkpoints.ties import (
    config_ties,
    is_embedding,
    is_head,
    language_configs,
    main_embedding,
    main_head,
    replacement,
)

_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")
# families whose layers are counted by a key of their own
_OWN_DEPTH_KEYS = {"albert": "num_hidden_groups", "hrm_text": "num_layers_per_stack", "xlstm": "num_blocks"}
_BEFORE = re.compile(r"embed(?!_out)|wte|wpe|position|token_type|patch|conv1", re.IGNORECASE)
_AFTER = re.compile(r"norm|ln_f|head|score|classifier|pooler|embed_out|output", re.IGNORECASE)
# further tensors with a row for every token, beside embeddings and heads
_PER_TOKEN = re.compile(
    r"(^|\.)(lm_head(\.decoder)?|predictions(\.decoder)?|vocab_projector|generator_lm_head|output_layer"
    r"|shared_head\.head)\.(weight|bias)$"
)
_BUFFER = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias)$")
# Weights for the prediction of further tokens, which transformers does not load.
_PREDICTION = re.compile(r"(^|\.)mtp(_\w+)?\.")
# Buffers that older versions of transformers stored and newer ones compute.
_MADE_ANEW = re.compile(r"(^|\.)position_ids$|^(model\.)?(en|de)coder\.version$")
_MASK = re.compile(r"(^|\.)(attn|attention|self_attention)\.bias$")


@dataclass(frozen=True, slots=True)
class Stack:
    """Consecutive layers under one name prefix: `layers[i]` maps a suffix to the tensor's full name."""

    prefix: str
    layers: tuple[Mapping[str, str], ...]


@dataclass(frozen=True, slots=True)
class Architecture:
    """Parts of a model. Loose tensors are those outside the main layers; `others` are further stacks among them."""

    main: Stack
    others: tuple[Stack, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    embedding: str | None
    head: str | None  # the stored head
    tied: bool  # no head is stored, and the config does not ask for one
    depth_key: tuple[str, ...] | None  # path of the layer count in the config
    dropped: tuple[str, ...]  # rotary and mask buffers, never written
    predicting: frozenset[str]  # prediction layers, which stand for the whole stack: among `after`
    unused: frozenset[str]  # not loaded by transformers: prediction layers, and buffers that it computes
    unsure: tuple[str, ...]  # loose tensors placed before the stack for want of a hint


def infer(checkpoint: Checkpoint) -> Architecture:
    """Take a checkpoint apart. Raises `Refused(TENSOR_MISSING)` if the main stack lacks a layer."""
    dropped = tuple(name for name, tensor in checkpoint.tensors.items() if _is_buffer(tensor))
    names = [name for name in checkpoint.tensors if name not in set(dropped)]
    depth_key, depth = layer_count(checkpoint.config)
    stacks = _stacks(name for name in names if not _PREDICTION.search(name))
    main, further = _main_stack(checkpoint, stacks, depth)
    owned = {name for layer in main.layers for name in layer.values()}
    predicting = {name for layer in further for name in layer.values()}
    predicting |= {name for name in names if _PREDICTION.search(name)}
    loose = [name for name in names if name not in owned and name not in predicting]
    before, after, unsure = _split(loose)
    others = tuple(stack for stack in stacks if stack.prefix != main.prefix)
    stacked = {name for stack in others for layer in stack.layers for name in layer.values()}
    head = main_head(loose)
    return Architecture(
        main=main,
        others=others,
        before=before,
        after=(*after, *(name for name in names if name in predicting)),
        embedding=main_embedding(loose),
        head=head,
        tied=head is None and config_ties(checkpoint.config) is not False,
        depth_key=depth_key,
        dropped=dropped,
        predicting=frozenset(predicting),
        unused=frozenset(predicting | {name for name in loose if _MADE_ANEW.search(name)}),
        unsure=tuple(name for name in unsure if name not in stacked),
    )


def tied_in(name: str, model: Architecture) -> str | None:
    """Stored tensor that a model uses for the tied `name`, which it does not store."""
    return replacement(name, {*model.before, *model.after}, model.embedding) if model.tied else None


def layer_count(config: Mapping[str, Any]) -> tuple[tuple[str, ...] | None, int | None]:
    """Path and value of the number of layers in a config."""
    paths: tuple[tuple[str, ...], ...] = ((), ("text_config",))
    for path, part in zip(paths, language_configs(config), strict=False):
        own = _OWN_DEPTH_KEYS.get(str(part.get("model_type")))
        for key in (*([own] if own else []), *_DEPTH_KEYS):
            if isinstance(part.get(key), int):
                return (*path, key), part[key]
    return None, None


def is_optional(name: str) -> bool:
    """True if a model may lack this tensor: a bias. (The planner decides about tied heads.)"""
    return name.endswith((".bias", "_bias", ".b"))


def may_count_tokens(name: str) -> bool:
    """True if a loose tensor of this name has one row per token, provided it has as many rows as the embedding."""
    return is_embedding(name) or is_head(name) or bool(_PER_TOKEN.search(name))


def _is_buffer(tensor: TensorInfo) -> bool:
    if _BUFFER.search(tensor.name):
        return True
    # GPT-2 and GPT-NeoX store their causal mask under the name of a bias
    return bool(_MASK.search(tensor.name)) and len(tensor.shape) == 4


def _stacks(names: Iterable[str]) -> list[Stack]:
    prefixes: dict[str, dict[int, dict[str, str]]] = {}
    for name in names:
        match = LAYER.search(name)
        if match is not None:
            layers = prefixes.setdefault(name[: match.start()], {})
            layers.setdefault(int(match.group(1)), {})[name[match.end() :]] = name
    return [
        Stack(prefix, tuple(layers[i] for i in sorted(layers)))
        for prefix, layers in prefixes.items()
        if sorted(layers) == list(range(len(layers)))
    ]


def stored_bytes(checkpoint: Checkpoint, stack: Stack) -> int:
    """Bytes of all tensors of a stack."""
    return sum(checkpoint.tensors[name].nbytes for layer in stack.layers for name in layer.values())


def _main_stack(
    checkpoint: Checkpoint, stacks: list[Stack], depth: int | None
) -> tuple[Stack, tuple[Mapping[str, str], ...]]:
    """The stack that the config counts, and the layers stored behind its end, which transformers does not load."""

    weight = partial(stored_bytes, checkpoint)
    matching = [stack for stack in stacks if depth is None or len(stack.layers) == depth]
    if matching:
        return max(matching, key=weight), ()
    longer = [stack for stack in stacks if type(depth) is int and 0 < depth < len(stack.layers)]
    if longer:
        stack = max(longer, key=weight)
        return Stack(stack.prefix, stack.layers[:depth]), stack.layers[depth:]
    longest = max((len(stack.layers) for stack in stacks), default=0)
    message = f"{checkpoint.name} has {longest} complete layers in its shards; its config says {depth or 'nothing'}."
    next_step = "Download it again: layers are missing, or its config.json belongs to another model."
    raise Refused("TENSOR_MISSING", message, next_step, value=checkpoint.name)


def _split(loose: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    before: list[str] = []
    after: list[str] = []
    unsure: list[str] = []
    for name in loose:
        if _BEFORE.search(name) and not is_head(name):
            before.append(name)
        elif _AFTER.search(name) or is_head(name):
            after.append(name)
        else:
            before.append(name)
            unsure.append(name)
    return tuple(before), tuple(after), tuple(unsure)
