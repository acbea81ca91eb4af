"""Reader of adapter_config.json: rank and scale of a LoRA adapter per module. PEFT's keys, strictly typed.

LoRA arXiv:2106.09685, rsLoRA arXiv:2312.03732, DoRA arXiv:2402.09353. Kinds that cannot be added to stored weights are
refused, each with the next step that works in PEFT 0.21.2 (`tests/merge/test_adapter_kinds.py` follows them).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from bot.errors import Refused
from bot.merge.checkpoints.patterns import BadPattern, Patterns
from bot.merge.checkpoints.tensor_names import words

RANK_LIMIT = 65_536
PATTERNS_LIMIT = 4_096
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


@dataclass(frozen=True, slots=True, eq=False)
class LoraConfig:
    """Content of adapter_config.json.

    `trained_on` is the name of the base model. `replaced` are the `modules_to_save`; `tokens` the rows of
    `trainable_token_indices`, by module if several are named; `unused` parts of names of unused tensors.
    """

    rank: int
    alpha: float
    rank_stabilised: bool
    rank_pattern: Patterns
    alpha_pattern: Patterns
    fan_in_fan_out: bool
    dora: bool
    trained_on: str | None
    bias: bool = False
    replaced: tuple[str, ...] = ()
    tokens: tuple[int, ...] | Mapping[str, tuple[int, ...]] = ()
    unused: tuple[str, ...] = ()

    def replaces(self, module: str) -> bool:
        """True for one of `modules_to_save`, by the end of the module's name, as PEFT compares."""
        return module.endswith(self.replaced)

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """The trained rows of an embedding or head; a bare list belongs to the input embedding."""
        if not isinstance(self.tokens, Mapping):
            return self.tokens
        return next((rows for name, rows in self.tokens.items() if module.endswith(name)), ())

    def rank_of(self, module: str) -> int:
        """The rank the config announces for a module."""
        value = self.rank_pattern.value(module)
        return self.rank if value is None else int(value)

    def scale_of(self, module: str) -> float:
        """The factor before B A: alpha / r, with rsLoRA alpha / sqrt(r)."""
        own = self.alpha_pattern.value(module)
        rank = self.rank_of(module)
        return (self.alpha if own is None else own) / (math.sqrt(rank) if self.rank_stabilised else rank)


def lora_config(config: Mapping[str, Any], label: str) -> LoraConfig:
    """Read a loaded adapter_config.json. Raises `Refused` NOT_SUPPORTED or BAD_CHECKPOINT, naming `label`."""
    _refuse_other_kinds(config, label)
    trained_on = config.get("base_model_name_or_path")
    return LoraConfig(
        rank=_rank(config.get("r"), label, "r"),
        alpha=_finite(config.get("lora_alpha"), label, "lora_alpha"),
        rank_stabilised=_flag(config, "use_rslora", label),
        rank_pattern=_patterns(config, "rank_pattern", label),
        alpha_pattern=_patterns(config, "alpha_pattern", label),
        fan_in_fan_out=_flag(config, "fan_in_fan_out", label),
        dora=_flag(config, "use_dora", label),
        trained_on=trained_on if isinstance(trained_on, str) else None,
        bias=_flag(config, "lora_bias", label),
        replaced=_names(config, "modules_to_save", label),
        tokens=_tokens(config, label),
        unused=tuple(part for key, parts in _TRAINING_ONLY.items() if config.get(key) for part in parts),
    )


def _refuse_other_kinds(config: Mapping[str, Any], label: str) -> None:
    """Refuse an adapter that is more than low-rank factors on unchanged weights. Raises `Refused` NOT_SUPPORTED."""

    def refuse(what: str, next_step: str) -> None:
        message = f"{label} {what}; that cannot be added to weights on the fly."
        raise Refused("NOT_SUPPORTED", message, next_step, value=label)

    kind = config.get("peft_type")
    if kind != "LORA":
        named = f"a {kind[:40]} adapter" if isinstance(kind, str) and kind else "an adapter of an unnamed kind"
        refuse(f"is {named}, not a LoRA adapter", _NO_MERGED_MODEL if kind in _WITHOUT_MERGE else _MERGE_FIRST)
    for key, (what, next_step) in _KEYS.items():
        if config.get(key):
            refuse(what, next_step)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith((*_REPEATED_BY_PEFT, *_NOT_REPEATED)):
        next_step = _CONVERT if start.lower().startswith(_NOT_REPEATED) else _MERGE_FIRST
        refuse(f"was trained on weights changed beforehand ({start[:40]})", next_step)


def refuse_config(label: str, key: str, what: str) -> NoReturn:
    """Refuse an adapter's config: `what` continues the sentence about `key`."""
    message = f"{label}: `{key}` of adapter_config.json {what}."
    raise Refused("BAD_CHECKPOINT", message, "Ask the adapter's author for a whole config.", value=label)


def _flag(config: Mapping[str, Any], key: str, label: str) -> bool:
    value = config.get(key, False)
    if value not in (True, False, None):
        refuse_config(label, key, "is not true or false")
    return bool(value)


def _finite(value: object, label: str, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse_config(label, key, "is not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        refuse_config(label, key, "is not finite")
    return number


def _rank(value: object, label: str, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= RANK_LIMIT:
        refuse_config(label, key, f"is not a rank between 1 and {RANK_LIMIT:,}")
    return value


def _names(config: Mapping[str, Any], key: str, label: str) -> tuple[str, ...]:
    value = config.get(key) or ()
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) and name for name in value):
        refuse_config(label, key, "is not a list of names")
    return tuple(value)


def _tokens(config: Mapping[str, Any], label: str) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    value = config.get("trainable_token_indices") or ()
    if isinstance(value, dict):
        return {name: _indices(rows, label) for name, rows in value.items()}
    return _indices(value, label)


def _indices(value: object, label: str) -> tuple[int, ...]:
    key = "trainable_token_indices"
    if not isinstance(value, list | tuple):
        refuse_config(label, key, "is not a list of token ids")
    if not all(isinstance(row, int) and not isinstance(row, bool) and row >= 0 for row in value):
        refuse_config(label, key, "holds something that is not a token id")
    if len(set(value)) < len(value):
        refuse_config(label, key, "names a token twice")
    return tuple(value)


def _patterns(config: Mapping[str, Any], key: str, label: str) -> Patterns:
    value = config.get(key) or {}
    if not isinstance(value, dict) or len(value) > PATTERNS_LIMIT:
        refuse_config(label, key, f"is not a table of at most {PATTERNS_LIMIT:,} patterns")
    rank = key == "rank_pattern"
    values = {name: float(_rank(v, label, key)) if rank else _finite(v, label, key) for name, v in value.items()}
    try:
        return Patterns(values)
    except BadPattern as bad:
        refuse_config(label, key, f"holds a pattern that {bad}")
