"""Values without which transformers cannot build a model type from its defaults."""

from __future__ import annotations

from typing import Any

_ROPES = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
_INDEXER = {
    "indexer_compress_ratio": 4, "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256,
    "indexer_budget": 16,
}  # fmt: skip
_WINDOWS = [[16, 4], [16, 4], [16, 0], [16, 0], [16, 0], [16, 0], [16, 4], [16, 4]]
_SPARSE = ["dense", "sparse", "sparse", "dense", "sparse", "sparse", "sparse", "dense"]
_HYBRID = ["linear_attention", "hybrid", *["linear_attention"] * 3, "hybrid", *["linear_attention"] * 2]

CHANGES: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 1}},
    "cohere_compass": {"text_config": {"rope_parameters": _ROPES}},
    "cohere_compass_text": {"rope_parameters": _ROPES},
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": _SPARSE}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"vision_config": {"pyramid_num_routed": [-1] * 4 + [4] * 4}},
    "emu3": {"vocabulary_map": {"<image>": 1}},
    "esm": {"vocab_size": 33},
    "fun_asr_nano": {
        "text_config": {"hidden_size": 1024}, "adaptor_config": {"hidden_size": 1024, "intermediate_size": 256},
    },
    "gpt_neo": {"attention_types": [[["global", "local", "local", "local"], 2]], "num_layers": 8},
    "granite4_vision": {
        "deepstack_layer_map": [[2, 0]], "spatial_target_layers": [1], "downsample_rate": "1/2",
    },
    "hunyuan_v1_dense": {"head_dim": 64},
    "hunyuan_v1_moe": {"head_dim": 64},
    "hunyuan_vl": {"text_config": {"head_dim": 64}},
    "lfm2_moe": {"num_hidden_layers": 8, "layer_types": ["conv", "conv", "full_attention", "conv"] * 2},
    "ministral": {"head_dim": 64},
    "mllama": {"vision_config": {"num_global_layers": 3}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "moonshine_streaming": {
        "num_key_value_heads": 8,
        "encoder_config": {"num_hidden_layers": 8, "sliding_windows": _WINDOWS},
    },
    "muse_spark": {"audio_config": {"num_hidden_layers": 4}},
    "nllb-moe": {"num_experts": 4},
    "nemotron": {"num_key_value_heads": 8},
    "nemotron_h": {"num_hidden_layers": 8, "hybrid_override_pattern": "M*M-MEM*"},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "qwen3_omni_moe": {"enable_audio_output": False},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"is_decoder": True},
    "zamba2": {"layers_block_type": _HYBRID, "num_hidden_layers": 8},
}  # fmt: skip

# model types that transformers does not build here, and why
_TIMM = "its vision tower is a model of timm, which is not installed"
_SHARED = "it has no keys and values of its own; it runs beside another model"
_COMPOSITE = "the class takes the config of its decoder, not that of the model type"
NOT_BUILT = {
    "fast_vlm": _TIMM,
    "gemma3n": _TIMM,
    "perception_lm": _TIMM,
    "gemma4_assistant": _SHARED,
    "gemma4_unified_assistant": _SHARED,
    "musicgen": _COMPOSITE,
    "musicgen_melody": _COMPOSITE,
}
