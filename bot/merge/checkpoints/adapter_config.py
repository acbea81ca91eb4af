"""Reader of adapter_config.json: rank and scale of a LoRA adapter per module. PEFT's keys, strictly typed.

LoRA arXiv:2106.09685, rsLoRA arXiv:2312.03732, DoRA arXiv:2402.09353. Other kinds are refused (`adapter_kinds`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from bot.errors import Refused
from bot.merge.checkpoints.adapter_kinds import refuse_other_kinds, training_only
from bot.merge.checkpoints.patterns import BadPattern, Patterns

RANK_LIMIT = 65_536
PATTERNS_LIMIT = 4_096


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
    refuse_other_kinds(config, label)
    told = config.get("base_model_name_or_path")
    return LoraConfig(
        rank=_rank(config.get("r"), label, "r"),
        alpha=_finite(config.get("lora_alpha"), label, "lora_alpha"),
        rank_stabilised=_flag(config, "use_rslora", label),
        rank_pattern=_patterns(config, "rank_pattern", label),
        alpha_pattern=_patterns(config, "alpha_pattern", label),
        fan_in_fan_out=_flag(config, "fan_in_fan_out", label),
        dora=_flag(config, "use_dora", label),
        trained_on=told if isinstance(told, str) else None,
        bias=_flag(config, "lora_bias", label),
        replaced=_names(config, "modules_to_save", label),
        tokens=_tokens(config, label),
        unused=training_only(config),
    )


def odd(label: str, key: str, what: str) -> NoReturn:
    """Refuse an adapter's config: `what` continues the sentence about `key`."""
    message = f"{label}: `{key}` of adapter_config.json {what}."
    raise Refused("BAD_CHECKPOINT", message, "Ask the adapter's author for a whole config.", value=label)


def _flag(config: Mapping[str, Any], key: str, label: str) -> bool:
    value = config.get(key, False)
    if value not in (True, False, None):
        odd(label, key, "is not true or false")
    return bool(value)


def _finite(value: object, label: str, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        odd(label, key, "is not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        odd(label, key, "is not finite")
    return number


def _rank(value: object, label: str, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= RANK_LIMIT:
        odd(label, key, f"is not a rank between 1 and {RANK_LIMIT:,}")
    return value


def _names(config: Mapping[str, Any], key: str, label: str) -> tuple[str, ...]:
    given = config.get(key) or ()
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) and name for name in given):
        odd(label, key, "is not a list of names")
    return tuple(given)


def _tokens(config: Mapping[str, Any], label: str) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    given = config.get("trainable_token_indices") or ()
    if isinstance(given, dict):
        return {name: _indices(rows, label) for name, rows in given.items()}
    return _indices(given, label)


def _indices(given: object, label: str) -> tuple[int, ...]:
    key = "trainable_token_indices"
    if not isinstance(given, list | tuple):
        odd(label, key, "is not a list of token ids")
    if not all(isinstance(row, int) and not isinstance(row, bool) and row >= 0 for row in given):
        odd(label, key, "holds something that is not a token id")
    if len(set(given)) < len(given):
        odd(label, key, "names a token twice")
    return tuple(given)


def _patterns(config: Mapping[str, Any], key: str, label: str) -> Patterns:
    given = config.get(key) or {}
    if not isinstance(given, dict) or len(given) > PATTERNS_LIMIT:
        odd(label, key, f"is not a table of at most {PATTERNS_LIMIT:,} patterns")
    rank = key == "rank_pattern"
    values = {name: float(_rank(v, label, key)) if rank else _finite(v, label, key) for name, v in given.items()}
    try:
        return Patterns(values)
    except BadPattern as bad:
        odd(label, key, f"holds a pattern that {bad}")
