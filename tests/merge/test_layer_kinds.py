"""Each layer keeps its kind (attention, window, experts, positions) when the layers of a model are cut or stacked.

The kinds are read from the modules that transformers builds, for every language model it has. A new class whose layers
follow a rule that bot/merge/planning/layer_table.py does not know fails here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import layer_kinds as built
import pytest
from layer_kind_configs import CHANGES, NOT_BUILT
from tiny_checkpoints import llama_tensors, merge, save
from transformers import CONFIG_MAPPING

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


def stacked(
    config: Mapping[str, Any], order: Sequence[int], path: tuple[str, ...] = ("num_hidden_layers",)
) -> tuple[dict[str, Any], list[str]]:
    """The config of a model's layers in another order, and the texts of the notices."""
    return mixed({A: config}, [(A, i) for i in order], path)


def mixed(
    configs: Mapping[ModelRef, Mapping[str, Any]],
    layers: Sequence[tuple[ModelRef, int]],
    path: tuple[str, ...] = ("num_hidden_layers",),
) -> tuple[dict[str, Any], list[str]]:
    """The config of model A for layers of several models."""
    out, notes = copy.deepcopy(dict(configs[A])), Notes()
    restack(out, Stacked((path,), built.value_at(out, path), tuple(layers)), A, configs, notes)
    return out, [notice.text for notice in notes.all()]


def test_first_dense_layers_are_counted_anew() -> None:
    deepseek = {"model_type": "deepseek_v3", "num_hidden_layers": 6, "first_k_dense_replace": 2}
    for order, dense in (((1, 2, 3), 1), ((2, 3, 4, 5), 0), ((0, 1, 0, 1, 2), 4)):
        assert stacked(deepseek, order)[0]["first_k_dense_replace"] == dense


def test_default_of_the_class_counts_where_the_config_is_silent() -> None:
    assert stacked({"model_type": "deepseek_v3", "num_hidden_layers": 6}, (1, 2, 3))[0]["first_k_dense_replace"] == 2


def test_order_that_a_rule_cannot_express_is_refused_by_the_name_of_the_rule() -> None:
    deepseek = {"model_type": "deepseek_v3", "num_hidden_layers": 4, "first_k_dense_replace": 1}
    with pytest.raises(Refused) as refused:
        stacked(deepseek, (0, 1, 0, 1))
    assert refused.value.code == "LAYER_RULE"
    assert "`first_k_dense_replace`" in refused.value.message
    assert "dense layers stand before" in refused.value.next_step


def test_order_with_one_kind_is_refused_where_the_class_needs_two() -> None:
    olmo = {"model_type": "olmo_hybrid", "num_hidden_layers": 8}
    assert stacked(olmo, (3, 4))[0]["layer_types"] == ["full_attention", "linear_attention"]
    for order in ((0, 1, 2), (3, 7)):
        with pytest.raises(Refused, match="layer_types"):
            stacked(olmo, order)


def test_unknown_family_follows_the_keys_that_mean_the_same_everywhere() -> None:
    config = {"model_type": "of_their_own", "num_hidden_layers": 4, "first_k_dense_replace": 2}
    assert stacked(config, (1, 2, 3))[0]["first_k_dense_replace"] == 1
    with pytest.raises(Refused):
        stacked(config, (3, 0))


def test_layers_of_several_models_keep_the_kinds_of_their_own_models() -> None:
    experts = {"model_type": "qwen2_moe", "num_hidden_layers": 4}
    every_second = {**experts, "decoder_sparse_step": 2}
    all_but_the_last = {**experts, "decoder_sparse_step": 1, "mlp_only_layers": [3]}
    out, _ = mixed({A: every_second, B: all_but_the_last}, [(A, 0), (A, 1), (B, 2), (B, 3)])
    assert (out["decoder_sparse_step"], out["mlp_only_layers"]) == (1, [0, 3])


def test_window_comes_with_the_layers_that_have_it() -> None:
    plain = {"model_type": "qwen2", "num_hidden_layers": 2, "use_sliding_window": False}
    windowed = {**plain, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
    out, _ = mixed({A: plain, B: windowed}, [(A, 0), (B, 1)])
    assert out["layer_types"] == ["full_attention", "sliding_attention"]
    assert (out["use_sliding_window"], out["sliding_window"]) == (True, 16)


def test_keys_that_older_programs_read_say_the_same_where_they_can() -> None:
    gemma = {"model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window_pattern": 3}
    out, notices = stacked(gemma, (1, 2, 4, 5))
    assert out["layer_types"] == ["sliding_attention", "full_attention"] * 2
    assert out["sliding_window_pattern"] == 2
    assert notices == []


def test_notice_tells_what_older_programs_cannot_read() -> None:
    gemma = {"model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window_pattern": 3}
    out, notices = stacked(gemma, (0, 2, 3, 2))
    assert [kind == "full_attention" for kind in out["layer_types"]] == [False, True, False, True]
    assert notices == []
    out, notices = stacked(gemma, (2, 2, 3))
    assert out["layer_types"][0] == out["layer_types"][1] == "full_attention"
    assert "`sliding_window_pattern` cannot express" in notices[0]


def test_same_order_leaves_the_config_alone() -> None:
    for config in ({"model_type": "gemma2"}, {"model_type": "diffllama"}, {"model_type": "qwen2_moe"}):
        config = {**config, "num_hidden_layers": 4}
        assert stacked(config, (0, 1, 2, 3)) == (config, [])


def test_numbers_of_vision_layers_follow_their_layers() -> None:
    vision = {"model_type": "qwen2_5_vl_vision", "depth": 8, "fullatt_block_indexes": [3, 7]}
    config = {"model_type": "qwen2_5_vl", "vision_config": vision}
    out, _ = stacked(config, (2, 3, 6, 7), ("vision_config", "depth"))
    assert out["vision_config"] == {**vision, "depth": 4, "fullatt_block_indexes": [1, 3]}


def test_config_of_a_single_layer_moves_with_the_layer() -> None:
    config = {"model_type": "llama", "num_hidden_layers": 3, "per_layer_config": {"2": {"intermediate_size": 8}}}
    assert stacked(config, (2, 0, 2))[0]["per_layer_config"] == {
        "0": {"intermediate_size": 8},
        "2": {"intermediate_size": 8},
    }


def test_entries_of_prediction_layers_stay_behind_the_layers() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = {"model_type": "step3p5", "num_hidden_layers": 3, "num_nextn_predict_layers": 1, "layer_types": kinds}
    assert stacked(config, (1, 2))[0]["layer_types"] == kinds[1:]


def test_list_that_alone_counts_the_layers_is_followed() -> None:
    nemotron = {"model_type": "nemotron_h", "layers_block_type": ["linear_attention", "mlp", "full_attention"]}
    out = copy.deepcopy(nemotron)
    restack(out, Stacked((), 3, ((A, 1), (A, 2))), A, {A: nemotron}, Notes())
    assert out == {"model_type": "nemotron_h", "layers_block_type": ["mlp", "full_attention"]}


def test_letters_for_each_layer_are_followed() -> None:
    nemotron = {"model_type": "nemotron_h", "num_hidden_layers": 4, "hybrid_override_pattern": "M-M*"}
    out, _ = stacked(nemotron, (1, 2, 3))
    assert (out["num_hidden_layers"], out["hybrid_override_pattern"]) == (3, "-M*")


def test_merged_model_is_built_as_the_layers_were(tmp_path: Path) -> None:
    qwen = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    save(tmp_path / "a", llama_tensors(1, layers=4), **qwen)
    slices = "".join(f"- sources: [{{model: a, layer_range: {part}}}]\n" for part in ("[0, 2]", "[1, 4]"))
    merge(f"merge_method: passthrough\nslices:\n{slices}", tmp_path, tmp_path / "out")
    read = CONFIG_MAPPING["qwen2"].from_json_file(str(tmp_path / "out" / "config.json"))
    assert read.layer_types == ["full_attention"] * 3 + ["sliding_attention"] * 2


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
