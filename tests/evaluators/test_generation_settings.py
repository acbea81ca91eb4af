from __future__ import annotations

import pytest
from transformers import GenerationConfig

from evaluators.generation_settings import LIMITS, NEUTRAL, OF_BEAMS, steering

# without effect on greedy text
WITHOUT_EFFECT = {
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "renormalize_logits",
    "use_cache",
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "compile_config",
    "disable_compile",
    "continuous_batching_config",
    "low_memory",
    "prefill_chunk_size",
    "transformers_version",
    "_from_model_config",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
    "num_return_sequences",
    "use_mtp",
    "is_assistant",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
    "assistant_early_exit",
    "assistant_lookbehind",
    "target_lookbehind",
    "assistant_ensemble_weight",
    "speculation_type",
}
ALWAYS_GIVEN = {"max_length"}  # by lm-eval and by our loops
TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"}


def test_every_setting_of_generation_is_classified() -> None:
    known = {*NEUTRAL, *OF_BEAMS, *LIMITS} | WITHOUT_EFFECT | ALWAYS_GIVEN | TOKENS
    assert set(vars(GenerationConfig())) - known == set()


@pytest.mark.parametrize("settings", [NEUTRAL, {"length_penalty": 2.0}, {"temperature": 0.6, "do_sample": True}])
def test_settings_that_change_nothing_are_not_reported(settings: dict[str, object]) -> None:
    assert steering(GenerationConfig(**settings), limits=True) == {}
