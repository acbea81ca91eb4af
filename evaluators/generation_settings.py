"""Settings of a generation config that change greedy text, for reports of answers that are written without them."""

from __future__ import annotations

from typing import Any

# each with the value that changes nothing
NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "guidance_scale": 1.0,
    "token_healing": False,
    "remove_invalid_values": False,
    **dict.fromkeys(
        (
            "bad_words_ids",
            "suppress_tokens",
            "begin_suppress_tokens",
            "sequence_bias",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "exponential_decay_length_penalty",
            "stop_strings",
            "penalty_alpha",
            "dola_layers",
            "watermarking_config",
            "constraints",
            "force_words_ids",
        )
    ),
}
# with several beams only
OF_BEAMS: dict[str, Any] = {"length_penalty": 1.0, "diversity_penalty": 0.0, "early_stopping": False}
LIMITS: dict[str, Any] = {"max_new_tokens": None, "max_time": None}


def steering(config: Any, *, limits: bool) -> dict[str, Any]:
    """The settings of a generation config that change greedy text, by name; with `limits` also those that end it."""
    beams = getattr(config, "num_beams", None) or 1
    neutral = NEUTRAL | (OF_BEAMS if beams > 1 else {}) | (LIMITS if limits else {})
    own = {name: getattr(config, name, None) for name in neutral}
    return {name: value for name, value in own.items() if value not in (None, [], neutral[name])}
