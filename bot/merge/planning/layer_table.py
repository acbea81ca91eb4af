"""Layer rules by `model_type`: facts of transformers' config and modeling files (5.23).

Model types that are missing here have equal layers, or complete lists in their configs. tests/merge/test_layer_kinds.py
compares the table with every model class of the installed transformers.
"""

from __future__ import annotations

from collections.abc import Mapping

from bot.merge.planning import layer_formulas as formulas
from bot.merge.planning.layer_builders import (
    EVERY,
    attention,
    by_numbers,
    dense_first,
    ernie,
    first_k,
    kv,
    listed,
    mlp,
    per_layer_input,
    periods,
    placed,
    read_layers,
    shared_hybrids,
    side_steps,
    sparse_step,
    spelled_out,
    switch,
    to_letters,
)
from bot.merge.planning.layer_formulas import HYBRID, INDEXED, each, where
from bot.merge.planning.layer_rules import (
    DENSE,
    FULL,
    LINEAR,
    SLIDING,
    SPARSE,
    Rule,
    Values,
    all_of,
    every,
    first,
    leading,
    numbered,
    numbers,
    period,
)

_PATTERN = period("sliding_window_pattern")
_INTERVAL = period("full_attention_interval")
_DENSE = leading("first_k_dense_replace")
_STEP = sparse_step()
_DEEPSTACK = placed("deepstack_visual_indexes", formulas.deepstack, "the first layers stay in their places")
_INDEXER = listed("indexer_types", formulas.indexers)
_ROPES = listed("no_rope_layers", formulas.no_rope, period("no_rope_layer_interval", 0))
_BY_NUMBER = placed("scale_attn_by_inverse_layer_idx", where("scale_attn_by_inverse_layer_idx", formulas.place))
_LAST_FULL = placed("layer_types", formulas.last_is_full, "the last layer has full attention")
_FROM_LAST = attention(each(lambda i, n: FULL if (n - 1 - i) % 4 == 0 else SLIDING))
_QWEN = attention(formulas.upper_window(), leading("max_window_layers", FULL))
_QWEN_VL = attention(formulas.upper_window(80), leading("max_window_layers", FULL))
_LINEAR = attention(every(("full_attention_interval", 4), FULL, LINEAR), _INTERVAL)
_NUMBERED = placed("num_hidden_layers", formulas.place, "every layer keeps its number")
_DEPTH_SCALE = Rule(
    "scale_depth",
    formulas.depth_scale,
    "all layers come from models of one depth",
    values=(Values(("scale_depth",), formulas.proposed_depth_scale),),
)
_FIRST = placed("num_hidden_layers", formulas.is_first, "the first layer stays the first")
_KINDS_OF_MUSE = each(lambda i, n: FULL if (i + 1) % 4 == 0 or i == n - 1 else "window_attention")
_GEMMA4 = (attention(formulas.last_full(every(6))), _LAST_FULL, kv(0))

_TABLE: tuple[tuple[str, tuple[Rule, ...]], ...] = (
    # attention: a window in all layers but every n-th
    ("gemma2 t5_gemma_module vaultgemma gpt_oss", (attention(every(2)),)),
    ("cohere2", (attention(every(("sliding_window_pattern", 4)), _PATTERN),)),
    ("gemma3_text t5gemma2_text t5gemma2_decoder", (attention(every(("sliding_window_pattern", 6)), _PATTERN),)),
    (
        "gemma3n_text",
        (
            attention(every(5)),
            kv(15),
            per_layer_input(256),
            listed("activation_sparsity_pattern", each(lambda i, n: 0.95 if n > 10 and i < 10 else 0.0)),
        ),
    ),
    ("gemma4_text", (*_GEMMA4, per_layer_input(256))),
    ("gemma4_unified_text diffusion_gemma_text", _GEMMA4),
    (
        "embedding_gemma2_text",
        (
            attention(formulas.last_full(every(("sliding_window_pattern", 6))), _PATTERN),
            _LAST_FULL,
            per_layer_input(512),
        ),
    ),
    ("olmo3", (attention(every(4)),)),
    ("ultrabert", (attention(every(3)),)),
    ("kolibri1", (attention(every(5)),)),
    ("exaone4", (attention(formulas.exaone, _PATTERN),)),
    ("cwm granite_swa granitemoe_swa", (attention(every(4, shift=0)),)),
    (
        "modernbert modernbert-decoder",
        (attention(every(("global_attn_every_n_layers", 3), shift=0), period("global_attn_every_n_layers")), _FIRST),
    ),
    ("muse_glimmer_text", (_FROM_LAST, listed("layer_rope_theta", formulas.muse_thetas(10_000.0)))),
    (
        "muse_spark_text",
        (_FROM_LAST, listed("layer_rope_theta", formulas.muse_thetas(500_000.0)), mlp(all_of(SPARSE))),
    ),
    ("muse_glimmer_vision muse_spark_vision", (attention(_KINDS_OF_MUSE),)),
    (
        "inkling2_text",
        (attention(every(6, HYBRID, "hybrid_sliding")), placed("n_layers_per_attn_res_block", formulas.place)),
    ),
    (
        "inkling_text",
        (
            attention(formulas.inkling_attention, numbers("local_layer_ids", "hybrid_sliding")),
            mlp(first(("dense_mlp_idx", 0)), leading("dense_mlp_idx")),
        ),
    ),
    ("zaya", (attention(all_of(HYBRID)), _FIRST)),
    # attention: a window in the upper or lower layers
    ("qwen2 qwen3 qwen2_5_omni_text qwen2_5_omni_talker deepseek_ocr2_encoder", (_QWEN,)),
    ("qwen2_vl_text qwen2_5_vl_text", (_QWEN_VL,)),
    ("qwen2_moe", (attention(formulas.lower_window), _STEP)),
    (
        "qwen3_omni_moe_talker_code_predictor",
        (attention(formulas.upper_window(28, switch=False), leading("max_window_layers", FULL)),),
    ),
    ("dots1", (attention(formulas.upper_window(62, switch=False), leading("max_window_layers", FULL)), first_k(0))),
    ("smollm3", (_ROPES, attention(formulas.smollm3_attention))),
    ("ministral", (attention(formulas.window_if_set(SLIDING, 4096)),)),
    # attention and other mixers
    ("qwen3_5_text qwen3_5_moe_text", (_LINEAR,)),
    ("qwen3_next", (_LINEAR, _STEP)),
    ("qwen4_exp_text", (attention(every(("full_attention_interval", 4), INDEXED, LINEAR), _INTERVAL),)),
    (
        "bailing_hybrid",
        (
            attention(every(("layer_group_size", 6), FULL, LINEAR), period("layer_group_size")),
            dense_first(2),
        ),
    ),
    ("minimax", (attention(every(2, LINEAR, FULL)), placed("layer_types", formulas.minimax_decay))),
    (
        "olmo_hybrid",
        (
            attention(formulas.olmo_hybrid),
            placed("layer_types", formulas.has_both_kinds, "there are layers of attention and of linear attention"),
        ),
    ),
    ("kimi_linear", (attention(formulas.kimi_attention), dense_first(1))),
    ("lfm2", (attention(numbered("full_attn_idxs", range(10_000), FULL, "conv"), numbers("full_attn_idxs", FULL)),)),
    ("lfm3", (attention(each(lambda i, n: FULL if i % 4 == 2 else SLIDING if i % 4 == 0 and i > 0 else "conv")),)),
    ("lfm3_vl_vision", (attention(each(lambda i, n: "conv" if i < 2 or i % 2 else FULL)),)),
    ("bamba", (by_numbers("attn_layer_indices"),)),
    ("granitemoehybrid", (attention(all_of(LINEAR)),)),
    (
        "jamba",
        (
            periods("attn_layer_period", "attn_layer_offset", (8, 4), FULL, LINEAR),
            periods("expert_layer_period", "expert_layer_offset", (2, 1), SPARSE, DENSE),
        ),
    ),
    ("recurrent_gemma", (spelled_out("block_types", formulas.repeated_blocks),)),
    ("zamba", shared_hybrids(formulas.zamba_blocks)),
    ("zamba2", shared_hybrids(formulas.zamba2_blocks)),
    (
        "nemotron_h",
        (
            listed(
                "layers_block_type",
                formulas.letters,
                Values(
                    ("hybrid_override_pattern",), lambda wanted, _: [{"hybrid_override_pattern": to_letters(wanted)}]
                ),
            ),
        ),
    ),
    ("gpt_neo", (spelled_out("attention_types", formulas.gpt_neo_attention, lambda wanted: [[wanted, 1]]),)),
    (
        "deepseek_v4",
        (
            attention(formulas.deepseek_v4_attention),
            mlp(first(("num_hash_layers", 3), "hash_moe", "moe"), leading("num_hash_layers", "hash_moe")),
        ),
    ),
    ("moonshine_streaming_encoder", (listed("sliding_windows", formulas.moonshine_windows),)),
    # experts
    ("deepseek_v2 mistral4", (first_k(0),)),
    ("deepseek_v3", (first_k(3),)),
    ("glm4_moe glm4v_moe_text", (first_k(1),)),
    (
        "afmoe",
        (
            attention(every(("global_attn_every_n_layers", 4)), period("global_attn_every_n_layers")),
            first_k(1, "num_dense_layers"),
        ),
    ),
    ("lfm2_moe", (first_k(2, "num_dense_layers"),)),
    ("qwen3_moe", (_STEP,)),
    ("qwen3_vl_moe_text qwen3_omni_moe_text qwen3_omni_moe_talker_text", (_STEP, _DEEPSTACK)),
    ("qwen3_vl_text", (_DEEPSTACK,)),
    ("cohere_compass_text", (attention(all_of(FULL)), _DEEPSTACK)),
    (
        "flint",
        (attention(each(lambda i, n: FULL if i < 2 or i % 4 == 1 or i == n - 1 else SLIDING)), sparse_step((0, 1))),
    ),
    ("ernie4_5_moe", (ernie(),)),
    (
        "llama4_text",
        (
            _ROPES,
            attention(formulas.llama4_attention),
            Rule("moe_layers", formulas.llama4_experts, EVERY, values=(numbers("moe_layers"),)),
        ),
    ),
    ("axk1", (mlp(formulas.dense_then_every, _DENSE),)),
    ("axk2", (attention(all_of(INDEXED)), mlp(formulas.dense_then_every, _DENSE))),
    ("beam", (attention(formulas.last_full(every(6))), mlp(first(3)), _NUMBERED)),
    ("cohere2_moe", (attention(formulas.cohere2_moe), dense_first(0))),
    ("deepseek_v32", (attention(all_of(INDEXED)), dense_first(3))),
    ("glm_moe_dsa", (attention(all_of(INDEXED)), dense_first(3), _INDEXER)),
    ("glm5_next_text", (attention(each(lambda i, n: INDEXED if i % 4 == 3 else LINEAR)), mlp(first(3)), _INDEXER)),
    (
        "hy_v4",
        (
            attention(all_of(INDEXED)),
            mlp(first(1)),
            listed("indexer_types", each(lambda i, n: "full" if i == 0 or i % 4 == 1 else "shared")),
        ),
    ),
    ("ernie4_5_vl_moe_text glm4_moe_lite hy_v3", (mlp(first(1)),)),
    ("laguna", (attention(all_of(FULL)), mlp(first(1)))),
    ("mellum", (attention(all_of(FULL)), mlp(all_of(SPARSE)))),
    ("mimo_v2_flash", (attention(each(lambda i, n: FULL if i == 0 or (i + 1) % 6 == 0 else SLIDING)), mlp(first(1)))),
    ("minimax_m3_vl_text", (attention(formulas.minimax_m3_attention), mlp(formulas.minimax_m3_experts))),
    ("exaone_moe", (attention(formulas.exaone, _PATTERN), dense_first(1))),
    (
        "unlimited_ocr_text",
        (
            attention(formulas.window_if_set("reference_sliding_attention", None)),
            dense_first(1),
        ),
    ),
    (
        "mistral_large4_text",
        (
            _ROPES,
            attention(all_of(INDEXED)),
            dense_first(1),
            _INDEXER,
            spelled_out("kv_source_layers", formulas.kv_sources, formulas.absolute),
        ),
    ),
    (
        "step3p5 step3p7_text",
        (attention(all_of(FULL)), mlp(formulas.step_experts, numbers("moe_layers_enum", SPARSE))),
    ),
    ("dots3_note_text", (attention(formulas.dots3_attention), mlp(formulas.dense_then_every, _DENSE))),
    ("nllb-moe", (side_steps("encoder"), side_steps("decoder"))),
    ("switch_transformers", (switch("encoder", "num_layers"), switch("decoder", "num_decoder_layers"))),
    # rules that depend on the place of a layer alone
    ("gpt2 gpt-sw3 imagegpt decision_transformer", (_BY_NUMBER,)),
    ("diffllama", (_NUMBERED,)),
    (
        "esm esmc janus_vision_model janus_vqgan",
        (placed("num_hidden_layers", each(lambda i, n: n), "the count of layers stays the same"),),
    ),
    ("minicpm3", (_DEPTH_SCALE,)),
    ("inkling_vision neomme", (placed("num_hidden_layers", formulas.place_and_count),)),
    ("gpt_neox_japanese", (placed("num_hidden_layers", formulas.is_last, "the last layer stays the last"),)),
    ("rwkv fun_asr_nano_encoder", (_FIRST,)),
    ("evolla", (placed("aligner_num_add_layers", formulas.evolla),)),
    ("idefics", (placed("cross_layer_interval", formulas.place_and_count),)),
    (
        "pegasus_x",
        (
            placed(
                "stagger_local_blocks",
                where("stagger_local_blocks", each(lambda i, n: i % 2), default=True),
                depth="encoder_layers",
            ),
        ),
    ),
    (
        "blip_2_qformer instructblip_qformer instructblipvideo_qformer",
        (placed("cross_attention_frequency", every(("cross_attention_frequency", 2), True, False, shift=0)),),
    ),
    ("mllama_text_model", (by_numbers("cross_attention_layers", 3, 8, 13, 18, 23, 28, 33, 38),)),
    ("molmo2_text", (by_numbers("rope_scaling_layers", *range(1000)),)),
    # vision and audio towers
    (
        "sam_vision_model got_ocr2_vision deepseek_ocr2_sam_vision_model pp_chart2table_vision pp_formulanet_vision "
        "sam_hq_vision_model slanext_vision unlimited_ocr_sam_vision_model",
        (by_numbers("global_attn_indexes", 2, 5, 8, 11),),
    ),
    ("qwen2_5_omni_dit", (by_numbers("look_ahead_layers", 10), by_numbers("look_backward_layers", 0, 20))),
    (
        "qwen2_5_vl_vision exaone4_5_vision qwen2_5_omni_vision_encoder",
        (by_numbers("fullatt_block_indexes", 7, 15, 23, 31),),
    ),
    (
        "qwen3_vl_vision qwen3_vl_moe_vision cohere_compass_vision qwen3_omni_moe_vision_encoder",
        (read_layers("deepstack_visual_indexes", 8, 16, 24),),
    ),
    ("mllama_vision_model", (read_layers("intermediate_layers_indices", 3, 7, 15, 23, 30),)),
    ("granite_docling_vision", (read_layers("deepstack_visual_indexes", 3, 7, 10),)),
    # an unknown family: keys with the same meaning in every family
    (
        "*",
        (
            _DEPTH_SCALE,
            first_k(0),
            sparse_step(),
            periods("attn_layer_period", "attn_layer_offset", (1, 0), FULL, LINEAR),
            periods("expert_layer_period", "expert_layer_offset", (1, 0), SPARSE, DENSE),
        ),
    ),
)
LAYER_RULES: Mapping[str, tuple[Rule, ...]] = {name: rules for names, rules in _TABLE for name in names.split()}
