"""Tensors that a family computes with in float32, whatever type the rest of the model has.

They are those of `_keep_in_fp32_modules_strict` and, for float16 alone, of `_keep_in_fp32_modules` of transformers 5.23
(a test compares them). Checkpoints store such tensors in float32, and `save_pretrained` leaves them so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from bot.merge.checkpoints.tensor_names import words


def _table(rows: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """A table with one entry per model type from one whose keys and values are lists of words."""
    return {kind: words(parts) for kinds, parts in rows.items() for kind in words(kinds)}


# model types -> parts of tensor names, kept beside bfloat16 and float16
ALWAYS = _table(
    {
        "axk1 axk2 deepseek_v3 deepseek_v32 dots1 dots3_note exaone_moe glm4_moe": "e_score_correction_bias",
        "glm4_moe_lite glm4v_moe glm_moe_dsa hy_v3 kolibri1 mimo_v2_flash nemotron_h": "e_score_correction_bias",
        "solar_open": "e_score_correction_bias",
        "bailing_hybrid": "A_log conv1d dt_bias e_score_correction_bias",
        "beam": "e_score_correction_bias mlp.gate.weight",
        "deepseek_v4": (
            "attn_hc e_score_correction_bias ffn_hc hc_head input_layernorm kv_norm norm position_bias "
            "post_attention_layernorm q_a_norm sinks"
        ),
        "ernie4_5_moe ernie4_5_vl_moe": "gate.weight moe_statics",
        "esmfold2": "boundaries distogram_head fourier norm.bias norm.weight norm_mix norm_single norm_start",
        "flint": "gate.weight sinks",
        "glm5_next": (
            "A_log attn_hc.base attn_hc.scale conv1d dt_bias e_score_correction_bias ffn_hc.base ffn_hc.scale"
        ),
        "gradium_phonon_tts pocket_tts": "freqs latent_mean latent_std",
        "granite_speech5": "conv.norm",
        "hy_v4": "base e_score_correction_bias fn hc_base hc_fn hc_scale k_norm lm_head scale sinks weights_proj",
        "inkling": "attn_sconv e_score_correction_bias gate.global_scale k_sconv mlp_sconv v_sconv",
        "inkling2": (
            "attention_input e_score_correction_bias final_input k_sconv.conv1d mlp.gate.weight mlp_input "
            "post_attention_convolution post_mlp_convolution v_sconv.conv1d"
        ),
        "kyutai_speech_to_text": "codec_model",
        "mistral_large4": "mlp.gate.weight rotary_emb",
        "muse_spark": (
            "e_score_correction_bias mlp.gate.weight post_attention_residual_gate post_feedforward_residual_gate"
        ),
        "nemotron3_5_transcribe": "audio_tower multi_modal_projector",
        "openai_privacy_filter": "sinks",
        "slanext": "structure_attention_cell structure_generator",
        "voxtral": "embed_positions",
    }
)
# the same, kept beside float16 only
BESIDE_FLOAT16 = _table(
    {
        "afmoe": (
            "expert_bias input_layernorm k_norm norm post_attention_layernorm post_mlp_layernorm "
            "pre_mlp_layernorm q_norm"
        ),
        "axk2 deepseek_v32 glm_moe_dsa mistral_large4": "indexer.weights_proj",
        "blip_2": "qformer query_tokens",
        "deepseek_v4": (
            "self_attn.compressor.gate_proj self_attn.compressor.indexer.gate_proj "
            "self_attn.compressor.indexer.kv_proj self_attn.compressor.indexer.scorer.weights_proj "
            "self_attn.compressor.kv_proj"
        ),
        "gpt_oss": "input_layernorm norm post_attention_layernorm",
        "instructblip instructblipvideo": "query_tokens",
        "longcat_flash": "classifier.weight",
        "mt5 pop2piano t5 udop umt5": "wo",
        "rwkv": "time_decay time_first",
    }
)


def stays_float32(name: str, dtype: str, config: Mapping[str, Any]) -> bool:
    """True if the tensor `name` of a model with this config, stored in float32, is not cast to `dtype`."""
    if dtype not in ("bfloat16", "float16"):
        return False
    tables = (ALWAYS,) if dtype == "bfloat16" else (ALWAYS, BESIDE_FLOAT16)
    parts = [part for table in tables for kind in _types(config) for part in table.get(kind, ())]
    return any(re.search(rf"(^|\.){re.escape(part)}($|\.)", name) for part in parts)


def _types(config: Mapping[str, Any]) -> Iterable[str]:
    """The model types of a config and of the configs inside it."""
    inner = [value.get("model_type") for value in config.values() if isinstance(value, dict)]
    return [kind for kind in (config.get("model_type"), *inner) if isinstance(kind, str)]
