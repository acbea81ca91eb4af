"""Detection of models that Medusa does not support, by their configuration and before weights are loaded."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.cache_utils import DummyLayer, DynamicLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from bot.errors import EvaluationError
from evaluators.medusa.model.cache import empty_cache, window_of

ALIBI_MODELS = frozenset({"bloom", "mpt"})


def reason_against(folder: Path) -> str | None:
    """A sentence on why Medusa cannot measure the checkpoint in `folder` at all; None if it can."""
    config = _config_of(folder)
    return None if config is None else _not_decoder_only(config)


def require_decoder_only(folder: Path) -> None:
    """Raise EvaluationError SPEED_UNSUPPORTED for encoder-decoders."""
    reason = reason_against(folder)
    if reason is not None:
        raise unsupported(reason)


def require_trees(folder: Path) -> None:
    """Raise EvaluationError SPEED_UNSUPPORTED if the configuration shows that the model cannot use heads."""
    config = _config_of(folder)
    if config is None:
        return
    if (reason := _not_decoder_only(config) or reason_against_trees(config)) is not None:
        raise unsupported(reason)


def reason_against_trees(config: Any) -> str | None:
    """A sentence on why a decoder-only model cannot verify a tree; None if its configuration shows no reason."""
    name, text = _class_name(config), config.get_text_config(decoder=True)
    if text.model_type in ALIBI_MODELS or getattr(text, "alibi", False):
        return f"{name} takes its ALiBi bias from the cache column, so sibling tokens of a tree would be misplaced."
    if rope_of(text)[0] == "mrope":
        return f"{name} uses three-dimensional rotary positions (mrope), which a tree of tokens does not have."
    try:
        layers = empty_cache(config, window_of(config)).layers
    except Exception as error:  # transformers cannot describe a cache for this config
        return f"{name} has a cache that transformers cannot build ({type(error).__name__})."
    kinds = [type(layer) for layer in layers if type(layer) is not DynamicLayer and not isinstance(layer, DummyLayer)]
    recurrent = next((kind.__name__ for kind in kinds if "Linear" in kind.__name__), None)
    stateful = not kinds and getattr(_class_of(config), "_is_stateful", False)  # RWKV, xLSTM
    if recurrent is not None or stateful:
        layer = "" if recurrent is None else f" ({recurrent})"
        return f"{name} keeps a recurrent state{layer}, which the branches of a tree would share."
    if (made := _class_of(config)) is not None and "past_key_values" not in inspect.signature(made.forward).parameters:
        return f"{name} has no cache (past_key_values), which the verification of a tree needs."
    if not kinds:
        return None
    kind = kinds[0].__name__
    if "Sliding" in kind:
        return f"{name} has attention windows or chunks ({kind}) of a kind that tree masks do not support."
    return f"{name} uses the cache layer {kind}, which tree decoding does not support."


def cache_name(model: Any) -> str | None:
    """Name of the cache argument of `forward`; None if the model recomputes the whole text at every step.

    A model ignores a cache under another name. The states of RWKV and xLSTM do not count as a cache.
    """
    names = inspect.signature(type(model).forward).parameters
    if "past_key_values" in names:
        return "past_key_values"
    layers = empty_cache(model.config, None).layers
    linear = any("Linear" in type(layer).__name__ for layer in layers)
    return "cache_params" if "cache_params" in names and linear else None


def unsupported(reason: str) -> EvaluationError:
    """The error for a model that Medusa cannot serve; `reason` is a sentence."""
    return EvaluationError("SPEED_UNSUPPORTED", reason, "Choose a decoder-only model with full or windowed attention.")


def rope_of(config: Any) -> tuple[str, int | None]:
    """(rope type, original length), which limit a tree in addition to the position table."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return ("default", None)
    groups = [parameters] if "rope_type" in parameters else [g for g in parameters.values() if isinstance(g, dict)]
    for group in groups:
        if group.get("mrope_section"):
            return ("mrope", None)
        kind = group.get("rope_type", "default")
        if kind in ("longrope", "dynamic"):
            original = group.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            return (kind, original or config.max_position_embeddings)
    return ("default", None)


def _config_of(folder: Path) -> Any | None:
    """Configuration of a checkpoint; None if transformers cannot read it, which loading then reports."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception:  # a malformed file can raise anything
        return None


def _not_decoder_only(config: Any) -> str | None:
    if not config.is_encoder_decoder:
        return None
    return f"{_class_name(config)} is an encoder-decoder, and Medusa heads are made for decoder-only models."


def _class_of(config: Any) -> Any:
    """Class that AutoModelForCausalLM chooses for the configuration; None without one."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def _class_name(config: Any) -> str:
    if config.is_encoder_decoder and config.architectures:
        return str(config.architectures[0])
    made = _class_of(config)
    return f"A model of type {config.model_type}" if made is None else made.__name__
