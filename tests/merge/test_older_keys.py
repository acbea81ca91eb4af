"""Configs carry the keys of transformers 4 too, and transformers 5 reads the same model from them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from test_families import DECODER
from tiny_checkpoints import llama_tensors, merge, save
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bot.merge.planning.older_keys import add_older_keys

OLDER = {
    "rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq", "rotary_emb_base", "rotary_pct",
    "global_rope_theta", "local_rope_theta", "num_experts",
}  # fmt: skip
SCALINGS: list[dict[str, Any]] = [{}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}]
LANGUAGE_MODELS = sorted({
    *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    *auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, *auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
})  # fmt: skip


def older(config: dict[str, Any]) -> dict[str, Any]:
    out = copy.deepcopy(config)
    add_older_keys(out)
    return out


def parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    for key, part in config.items():
        if key.endswith("_config") and isinstance(part, dict):
            yield from parts(part)


def read(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """A config as transformers 5 reads it, without the keys that only transformers 4 reads."""
    text = CONFIG_MAPPING[kind].from_dict(copy.deepcopy(config)).to_json_string(use_diff=False)
    out: dict[str, Any] = json.loads(text)
    for part in parts(out):
        inside = set() if part is out else {"tie_word_embeddings"}
        for key in (OLDER | inside) & part.keys():
            del part[key]
    return out


def rotary_parts(config: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """For every part of a config its rotary parameters: one table, or one for each kind of layers."""
    for part in parts(config):
        rotary = part.get("rope_parameters") or {}
        inner = [one for one in rotary.values() if isinstance(one, dict)]
        yield inner or ([rotary] if rotary else [])


def changed(plain: dict[str, Any], scaling: dict[str, Any]) -> dict[str, Any]:
    """A config with other bases than its own, and with scaled positions."""
    config = copy.deepcopy(plain)
    for tables in rotary_parts(config):
        for base, table in enumerate(tables, 700):
            if scaling and base == 700:
                kept = {key: table[key] for key in ("partial_rotary_factor", "mrope_section") if key in table}
                table.clear()
                table.update(scaling | kept)
            table["rope_theta"] = float(base)
    return config


@pytest.mark.slow
def test_transformers_5_reads_the_same_config_from_both_kinds_of_keys() -> None:
    compared = set()
    for kind in LANGUAGE_MODELS:
        for scaling in SCALINGS:
            try:
                config = changed(json.loads(CONFIG_MAPPING[kind]().to_json_string(use_diff=False)), scaling)
                if (both := older(config)) == config:
                    continue
                right = read(kind, config)
            except Exception:  # no default config, or one that takes no such scaling
                continue
            assert read(kind, both) == right, kind
            compared.add(kind)
    assert len(compared) > 100
    assert {"llama", "qwen3_moe", "gemma3", "gemma3_text", "gpt_neox", "modernbert", "phi3", "qwen2_5_vl"} <= compared


def test_each_family_gets_the_keys_that_transformers_4_has_for_it() -> None:
    def of(kind: str, **rotary: Any) -> dict[str, Any]:
        config = {"model_type": kind, "rope_parameters": rotary}
        return {key: value for key, value in older(config).items() if key not in config}

    plain = {"rope_type": "default", "rope_theta": 5e5}
    yarn = {"rope_type": "yarn", "factor": 4.0}
    two = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, "sliding_attention": plain}
    long = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    assert of("llama", **plain) == {"rope_theta": 5e5}
    assert of("glm", **plain, partial_rotary_factor=0.5) == {"rope_theta": 5e5, "partial_rotary_factor": 0.5}
    assert of("qwen3", **yarn, rope_theta=1e6) == {"rope_theta": 1e6, "rope_scaling": yarn}
    assert of("gpt_neox", **plain, partial_rotary_factor=0.25) == {"rotary_emb_base": 5e5, "rotary_pct": 0.25}
    assert of("gemma3_text", **two) == {
        "rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 5e5,
    }  # fmt: skip
    assert of("modernbert", **two).keys() >= {"global_rope_theta", "local_rope_theta"}
    only = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    assert of("phi3", **long, original_max_position_embeddings=32)["rope_scaling"] == only
    mrope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    assert of("qwen2_vl_text", **mrope, rope_theta=1e6) == {"rope_theta": 1e6, "rope_scaling": mrope}


def test_a_merged_config_has_both_kinds_of_keys_and_keeps_what_it_had(tmp_path: Path) -> None:
    rotary = {"rope_type": "default", "rope_theta": 5e5}
    save(tmp_path / "a", llama_tensors(0), rope_parameters=rotary)
    merge("merge_method: passthrough\nmodels: [{model: a}]", tmp_path, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == 5e5
    assert written["rope_parameters"] == rotary
    published = {"model_type": "llama", "rope_theta": 1e6, "rope_scaling": None}
    assert older(published) == published


def test_the_config_of_a_text_model_says_that_its_head_is_tied() -> None:
    tied = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}
    assert older(tied)["text_config"]["tie_word_embeddings"] is True
    untied = {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}}
    assert older(untied) == untied


def test_the_text_model_inside_a_config_has_both_kinds_of_keys() -> None:
    text = hf.Qwen3MoeConfig(**DECODER, num_experts=4, rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    inside = older({"model_type": "some_vl", "text_config": json.loads(text.to_json_string())})["text_config"]
    assert inside["rope_theta"] == 7.0
    assert inside["num_experts"] == inside["num_local_experts"] == 4
