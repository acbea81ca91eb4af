"""The table of published names, held against transformers' own conversion mapping, for every language model in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import conversion_mapping
from transformers.core_model_loading import WeightTransform, revert_weight_conversion
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bot.merge.checkpoints.checkpoint import TRUSTED, Checkpoint, LocalFiles
from bot.merge.checkpoints.header import TensorInfo
from bot.merge.checkpoints.published import _EITHER, _FAMILIES, _named, _namings
from bot.merge.recipe.dtypes import BY_NAME

JOINED = "published files join matrices that lie apart in memory: a header cannot show one tensor in two places"
NEW = "newer than transformers 4: its files have one naming, unless somebody stored a state_dict"
UNTOLD: dict[str, str] = {
    **dict.fromkeys(("hrm_text", "gte", "jina_embeddings_v3", "nomic_bert", "molmo2", "minimax_m3_vl"), JOINED),
    **dict.fromkeys(("qianfan_ocr", "hunyuan_vl", "unlimited_ocr", "nemo_speechlm", "nemotron_h_omni"), JOINED),
    **dict.fromkeys(("ernie4_5_vl_moe", "step3p7", "mistral_large4", "kimi_k25", "deepseek_ocr2"), JOINED),
    **dict.fromkeys(("inkling2", "inkling2_text", "inkling_mm_model"), "experts of one matrix are interleaved"),
    **dict.fromkeys(("hy_v4", "deepseek_v4", "glm5_next", "lfm3", "lfm3_vl", "gemma4_unified", "cosmos3_edge"), NEW),
    **dict.fromkeys(("cosmos3_omni", "dots3_note", "dots3_note_text", "hyperclovax_vision_v2", "t5gemma2"), NEW),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text", "olmo_hybrid", "ultrabert", "ultravbert"), NEW),
    **dict.fromkeys(("pi0", "vision-encoder-decoder"), "no language model"),
    "qwen3_vl_moe": "experts are transposed: refused where the two layouts meet",
    "shieldgemma2": "a classifier; its decoder lies one level deeper than Gemma 3's",
    "esm": "a buffer alone",
}
MORE: dict[str, Any] = {
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "emu3": {"vocabulary_map": {"<image>": 1}},
}
# dense layers: transformers renames `.mlp.` there as well; whichever of the two is stored, it loads
_DENSE = re.compile(r"(?<=layers\.0\.)block_sparse_moe(?=\.(gate|up|down)_proj)")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers", "decoder_layers")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def language_models() -> Iterator[tuple[str, str]]:
    """(model_type, class) of everything that transformers generates text with, or fills masks."""
    tables = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    seen: set[tuple[str, str]] = set()
    for table in tables:
        for kind, names in table.items():
            for name in names if isinstance(names, tuple) else (names,):
                if (kind, name) not in seen:
                    seen.add((kind, name))
                    yield kind, name


def shrink(config: Any) -> Any:
    """Two layers, four experts, the first layer dense where a config knows dense layers."""
    for part in list(vars(config).values()):
        if isinstance(part, hf.PretrainedConfig):
            shrink(part)
    for keys, most in ((_LAYERS, 2), (_EXPERTS, 4), (("first_k_dense_replace", "num_dense_layers"), 1)):
        for key in keys:
            value = getattr(config, key, None)
            if isinstance(value, int) and value > most:
                setattr(config, key, most)
                by_layer = [
                    name for name, each in vars(config).items() if isinstance(each, list) and len(each) == value
                ]
                for name in by_layer if most == 2 else ():
                    setattr(config, name, getattr(config, name)[:most])
    return config


def unbuilt(kind: str, name: str) -> tuple[Any, Any] | None:
    """A small model without memory, and its config; None where the default config makes none."""
    try:
        config = shrink(CONFIG_MAPPING[kind](**MORE.get(kind, {})))
        with torch.device("meta"):
            model = getattr(hf, name)(config)
        return model, model.config
    except Exception:  # many configs have no defaults that fit together, or need a library
        return None


def as_checkpoint(config: dict[str, Any], tensors: dict[str, Any]) -> Checkpoint:
    at, infos = 0, {}
    for name, tensor in tensors.items():
        infos[name] = TensorInfo(name, BY_NAME["float32"], tuple(tensor.shape), "f", at, 4 * tensor.numel())
        at += 4 * tensor.numel()
    return Checkpoint("m", config, infos, {}, {}, LocalFiles("."))


def signature(kind: str) -> str:
    """The conversions of transformers for a model type, as text."""
    found: list[WeightTransform] = conversion_mapping.get_checkpoint_conversion_mapping(kind) or []
    return repr([(one, [type(op).__name__ for op in getattr(one, "operations", ())]) for one in found])


@pytest.mark.slow
def test_every_language_model_gets_the_names_and_shapes_that_transformers_publishes() -> None:
    mapped = conversion_mapping._build_checkpoint_conversion_mapping()
    wrong, seen, told, unproven = {}, set[str](), set[str](), {}
    for kind, name in language_models():
        plain = kind not in mapped and name not in mapped and not CONFIG_MAPPING[kind].sub_configs
        if plain or kind in UNTOLD:
            continue
        built = unbuilt(kind, name)
        if built is None:
            if kind in mapped:
                unproven[kind] = signature(kind)
            continue
        seen.add(signature(kind))
        model, config = built
        stored = model.state_dict()
        source = as_checkpoint(json.loads(config.to_json_string(use_diff=False)), stored)
        ours = _named(_named(source, _FAMILIES, TRUSTED), _EITHER, TRUSTED).tensors
        theirs = revert_weight_conversion(model, dict(stored))
        expected = {_DENSE.sub("mlp", key): list(tensor.shape) for key, tensor in theirs.items()}
        found = {key.replace("tower.vision_model.", "tower."): list(one.shape) for key, one in ours.items()}
        if found != expected:
            differing = found.items() ^ expected.items() if False else {*found} ^ {*expected}
            wrong[kind] = sorted(differing)[:4]
        told |= {kind}
    # those without a default model: transformers converts them as one that was looked at, and so do we
    wrong |= {kind: "no model to look at" for kind, said in unproven.items() if said not in seen}
    assert not wrong, json.dumps(wrong)
    assert {"mixtral", "qwen2_moe", "deepseek_v3", "jamba", "llava", "gemma3", "qwen2_5_vl"} <= told


def test_every_model_type_of_the_table_is_one_of_transformers() -> None:
    assert not (_FAMILIES.keys() | _EITHER.keys()) - {*CONFIG_MAPPING}
    assert not {kind for kind in UNTOLD if kind in _FAMILIES or kind in _EITHER} - {"qwen4_exp_text"}
    mapped = conversion_mapping._build_checkpoint_conversion_mapping()
    same = {kind for kind, base in conversion_mapping._MODEL_TO_CONVERSION_PATTERN.items() if base == "qwen2_moe"}
    models = {kind for kind, _ in language_models()} & same & mapped.keys()
    untold = {
        kind
        for kind in models
        if signature(kind) == signature("qwen2_moe") and not _namings({"model_type": kind}, _FAMILIES)
    }
    assert untold <= {"qwen3_omni_moe_thinker"}
