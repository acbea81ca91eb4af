"""Each layer keeps its kind (attention, window, experts, positions) when the layers of a model are cut or stacked.

The kinds are read from the modules that transformers builds, for every language model it has. A new class whose layers
follow a rule that bot/merge/planning/layer_table.py does not know fails here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

import layer_kinds as built
import pytest
from layer_kind_configs import CHANGES, NOT_BUILT

from bot.errors import Refused
from bot.merge.planning.layout import Stacked
from bot.merge.planning.stacked_config import restack
from bot.merge.recipe.notices import Notes
from bot.merge.recipe.spec import ModelRef

A, B = ModelRef("a"), ModelRef("b")
ORDERS = {"cut": (1, 2, 3, 4, 5, 6), "stack": (0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7)}

# model type -> the rule that cannot express an order, and which order
REFUSED: dict[str, dict[str, str]] = {
    "afmoe": {"num_dense_layers": "stack"},
    "beam": {"num_hidden_layers": "cut stack"},
    "blip-2": {"cross_attention_frequency": "cut"},
    "cohere_compass": {"deepstack_visual_indexes": "cut"},
    "cohere_compass_text": {"deepstack_visual_indexes": "cut stack"},
    "cosmos3_omni": {"deepstack_visual_indexes": "cut"},
    "diffllama": {"num_hidden_layers": "cut stack"},
    "diffusion_gemma": {"layer_types": "cut"},
    "esm": {"num_hidden_layers": "cut stack"},
    "esmc": {"num_hidden_layers": "cut stack"},
    "fun_asr_nano": {"num_hidden_layers": "cut"},
    "gemma4": {"layer_types": "cut"},
    "gemma4_text": {"layer_types": "cut"},
    "gemma4_unified": {"layer_types": "cut"},
    "gemma4_unified_text": {"layer_types": "cut"},
    "gpt_neox_japanese": {"num_hidden_layers": "cut"},
    "granite4_vision": {"cross_attention_frequency": "cut"},
    "granite_speech": {"cross_attention_frequency": "cut"},
    "granite_speech_plus": {"cross_attention_frequency": "cut"},
    "idefics": {"cross_layer_interval": "cut stack"},
    "inkling2": {"n_layers_per_attn_res_block": "cut stack"},
    "inkling2_text": {"n_layers_per_attn_res_block": "cut stack"},
    "inkling_mm_model": {"num_hidden_layers": "cut stack"},
    "instructblip": {"cross_attention_frequency": "cut"},
    "instructblipvideo": {"cross_attention_frequency": "cut"},
    "janus": {"num_hidden_layers": "cut stack"},
    "lfm2_moe": {"num_dense_layers": "stack"},
    "minimax": {"layer_types": "cut stack"},
    "modernbert": {"num_hidden_layers": "cut"},
    "modernbert-decoder": {"num_hidden_layers": "cut"},
    "modernvbert": {"num_hidden_layers": "cut"},
    "neomme": {"num_hidden_layers": "cut stack"},
    "nllb-moe": {"encoder_sparse_step": "cut", "decoder_sparse_step": "cut"},
    "pegasus_x": {"stagger_local_blocks": "cut"},
    "qwen3_omni_moe": {"deepstack_visual_indexes": "cut"},
    "qwen3_omni_moe_thinker": {"deepstack_visual_indexes": "cut"},
    "qwen3_vl": {"deepstack_visual_indexes": "cut"},
    "qwen3_vl_moe": {"deepstack_visual_indexes": "cut"},
    "rwkv": {"num_hidden_layers": "cut"},
    "switch_transformers": {"num_sparse_encoder_layers": "cut", "num_sparse_decoder_layers": "cut"},
    "zamba": {"layers_block_type": "stack"},
    "zamba2": {"layers_block_type": "stack"},
    "zaya": {"num_hidden_layers": "cut"},
}


def stacked(config: Mapping[str, Any], order: Sequence[int], path: tuple[str, ...] = ("num_hidden_layers",)) -> Any:
    """The config of a model's layers in another order, and the texts of the notices."""
    out, notes = copy.deepcopy(dict(config)), Notes()
    count = built.value_at(config, path)
    restack(out, Stacked((path,), count, tuple((A, i) for i in order)), A, {A: config}, notes)
    return out, [notice.text for notice in notes.all()]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(built.model_types().keys() - NOT_BUILT.keys()))
def test_every_layer_keeps_its_kind(model_type: str) -> None:
    published = built.config_json(model_type, CHANGES.get(model_type, {}))
    parent = built.build(model_type, built.read(model_type, published))
    saved = json.loads(json.dumps(parent.config.to_dict(), default=str))
    refused: dict[str, set[str]] = {}
    for name, order in ORDERS.items():
        seen = []
        for config in (published, saved):
            out = config
            for path in built.depth_paths(config):
                try:
                    out, _ = stacked(out, order, path)
                except Refused as refusal:
                    assert refusal.code == "LAYER_RULE"
                    refused.setdefault(refusal.message.split("`")[1], set()).add(name)
            read = built.read(model_type, out)
            if read.to_dict() not in seen:
                seen.append(read.to_dict())
                assert_same_kinds(parent, built.build(model_type, read), order)
    assert {rule: " ".join(sorted(orders)) for rule, orders in refused.items()} == REFUSED.get(model_type, {})


def assert_same_kinds(parent: Any, model: Any, order: Sequence[int]) -> None:
    """Compare every stack of layers, as far as it took the new order, and the tensors beside the stacks."""
    names = list(built.stacks(parent, built.LAYERS))
    for name in names:
        before, now = built.layers_of(parent, name), built.layers_of(model, name)
        came_from = order if len(now) == len(order) else range(built.LAYERS)
        for layer, i in zip(now, came_from, strict=True):
            assert layer == before[i], f"{name}: layer {i} became another"
    assert built.loose(model, names) == built.loose(parent, names)
