"""Config keys of transformers 4, written beside those of transformers 5.

transformers 5 stores rotary positions under `rope_parameters` alone. transformers 4 ignores that key and uses a base of
10,000 without scaling, which makes another model of the same weights. It reads the flag for tied heads from the config
of the text model, transformers 5 from that of the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# model_type -> keys for the base and for the share of a head that is rotated
_ROTARY_NAMES = dict.fromkeys(("gpt_neox", "gpt_neox_japanese"), ("rotary_emb_base", "rotary_pct"))
# model_type -> where transformers 4 keeps the base of full and of sliding attention
_TWO_BASES = {
    **dict.fromkeys(("gemma3_text", "gemma3n_text"), ("rope_theta", "rope_local_base_freq")),
    **dict.fromkeys(("modernbert", "modernbert-decoder"), ("global_rope_theta", "local_rope_theta")),
}
# transformers 4 refuses any other key in `rope_scaling` of these
_LONGROPE_ONLY = ("phi3", "phi4_multimodal")
# without `rope_scaling` in transformers 4; transformers 5 would let it replace other parts of `rope_parameters`
_NO_SCALING = (
    "bailing_hybrid",
    "cohere_compass_text",
    "dots3_note",
    "dots3_note_text",
    "modernbert",
    "modernbert-decoder",
    "zaya",
)
_EXPERTS = ("qwen3_moe", "qwen3_vl_moe_text", "qwen3_omni_moe_text")


def add_older_keys(config: dict[str, Any]) -> None:
    """Add the keys that transformers 4 reads to a config and its nested ones.

    Existing keys stay, except for the flag of a text model whose whole model ties its head.
    """
    for key, part in config.items():
        if key.endswith("_config") and isinstance(part, dict):
            add_older_keys(part)
    text = config.get("text_config")
    if isinstance(text, dict) and config.get("tie_word_embeddings") is True and "tie_word_embeddings" in text:
        text["tie_word_embeddings"] = True
    older = _rotary(config)
    if config.get("model_type") in _EXPERTS and "num_local_experts" in config:
        older["num_experts"] = config["num_local_experts"]
    for key, value in older.items():
        if config.get(key) is None:
            config[key] = value


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of transformers 4 for the rotary positions of a config."""
    kind, rotary = str(config.get("model_type")), config.get("rope_parameters")
    if not isinstance(rotary, Mapping):
        return {}
    sliding = None
    if any(isinstance(value, Mapping) for value in rotary.values()):
        sliding, rotary = rotary.get("sliding_attention"), rotary.get("full_attention")
        if kind not in _TWO_BASES or not isinstance(sliding, Mapping) or not isinstance(rotary, Mapping):
            return {}  # no model of transformers 4
    base, share = _ROTARY_NAMES.get(kind, ("rope_theta", "partial_rotary_factor"))
    names = {"rope_theta": base, "partial_rotary_factor": share}
    out = {names[key]: rotary[key] for key in names if key in rotary}
    scaling = {key: value for key, value in rotary.items() if key not in names}
    if scaling not in ({}, {"rope_type": "default"}) and kind not in _NO_SCALING:
        longrope = ("short_factor", "long_factor")
        only = {"type": scaling.get("rope_type"), **{key: scaling.get(key) for key in longrope}}
        out["rope_scaling"] = only if kind in _LONGROPE_ONLY else scaling
    if sliding is not None:
        for key, value in zip(_TWO_BASES[kind], (rotary.get("rope_theta"), sliding.get("rope_theta")), strict=True):
            out[key] = value
    return out
