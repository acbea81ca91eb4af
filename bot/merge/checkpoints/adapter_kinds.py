"""Kinds of adapters that cannot be added to stored weights, each with the next step that works in PEFT 0.21.2.

`tests/merge/test_adapter_kinds.py` follows every next step with the real library.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bot.errors import Refused
from bot.merge.checkpoints.tensor_names import words

_MERGE_FIRST = "Merge it into its model with the PEFT library first, and name the merged model."
_NO_MERGED_MODEL = "No merged model can compute the same; leave the adapter out of the recipe."
_CONVERT = (
    "Ask for it as plain LoRA, as PEFT's save_pretrained writes it with path_initial_model_for_weight_conversion, or "
    "for the changed base with `init_lora_weights: true`."
)
_REPEAT_FIRST = (
    "Repeat the layers with a passthrough recipe of slices, take layer_replication out of adapter_config.json, and "
    "name that model; PEFT's own merge adds the changes of all copies to each of them."
)
# keys of LoraConfig with which the merged weight is not base + scale * B A: (what it is, the next step)
_KEYS: Mapping[str, tuple[str, str]] = {
    "layer_replication": ("repeats layers of its model", _REPEAT_FIRST),
    "target_parameters": ("adapts bare parameters", _MERGE_FIRST),
    "alora_invocation_tokens": ("works from a certain token on only (aLoRA)", _NO_MERGED_MODEL),
    "use_qalora": ("is a QALoRA adapter of quantised weights", _NO_MERGED_MODEL),
    "use_bdlora": ("is a block-diagonal adapter", _MERGE_FIRST),
    "arrow_config": ("routes between adapters", _NO_MERGED_MODEL),
    "kasa_config": ("is a KaSA adapter", _MERGE_FIRST),
}
# values of `init_lora_weights`, in lower case, that move part of the base's weights into the adapter. PEFT repeats
# the change when it loads the adapter only where the change follows from the weights alone.
_REPEATED_BY_PEFT = ("pissa", "olora")
_NOT_REPEATED = ("pissa_niter", "corda", "lora_ga", "loftq")
# values of `peft_type` whose tuners have no merge_and_unload, or one that raises
_WITHOUT_MERGE = words(
    "ADAPTION_PROMPT CARTRIDGE CPT LILY MULTITASK_PROMPT_TUNING POLY PREFIX_TUNING PROMPT_TUNING P_TUNING SHADOW XLORA"
)
# keys of LoraConfig for training only, and the tensors they leave beside A and B
_TRAINING_ONLY: Mapping[str, tuple[str, ...]] = {
    "velora_config": (".lora_velora_embed",),
    "monteclora_config": (".lora_monteclora_sampler.",),
}


def refuse_other_kinds(config: Mapping[str, Any], label: str) -> None:
    """Refuse an adapter that is more than low-rank factors on unchanged weights. Raises `Refused` NOT_SUPPORTED."""
    kind = config.get("peft_type")
    if kind != "LORA":
        named = f"a {kind[:40]} adapter" if isinstance(kind, str) and kind else "an adapter of an unnamed kind"
        _refuse(label, f"is {named}, not a LoRA adapter", _NO_MERGED_MODEL if kind in _WITHOUT_MERGE else _MERGE_FIRST)
    for key, (what, next_step) in _KEYS.items():
        if config.get(key):
            _refuse(label, what, next_step)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith((*_REPEATED_BY_PEFT, *_NOT_REPEATED)):
        repeated = not start.lower().startswith(_NOT_REPEATED)
        _refuse(
            label, f"was trained on weights changed beforehand ({start[:40]})", _MERGE_FIRST if repeated else _CONVERT
        )


def training_only(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Parts of the names of tensors that the adapter's training needed and its merged weight does not."""
    return tuple(part for key, parts in _TRAINING_ONLY.items() if config.get(key) for part in parts)


def _refuse(label: str, what: str, next_step: str) -> None:
    raise Refused(
        "NOT_SUPPORTED", f"{label} {what}; that cannot be added to weights on the fly.", next_step, value=label
    )
