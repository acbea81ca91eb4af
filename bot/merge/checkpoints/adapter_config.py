"""adapter_config.json -> what a LoRA adapter means: its scale for every module. PEFT's keys, strictly typed.

LoRA arXiv:2106.09685, rsLoRA arXiv:2312.03732, DoRA arXiv:2402.09353. An adapter that is more than low-rank factors
on unchanged weights (another kind, weights changed before training, layers repeated) is refused by its own name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from bot.errors import Refused
from bot.merge.checkpoints.patterns import BadPattern, Patterns

RANK_LIMIT = 65_536
PATTERNS_LIMIT = 4_096
# keys that make the merged weight something else than base + scale * B A
_FOREIGN = {
    "layer_replication": "repeats layers of its model",
    "target_parameters": "adapts bare parameters",
    "trainable_token_indices": "trains single tokens",
    "alora_invocation_tokens": "switches itself on by a token (aLoRA)",
    "use_qalora": "is a QALoRA adapter",
    "use_bdlora": "is a block-diagonal adapter",
    "arrow_config": "routes between adapters",
    "velora_config": "is a VeLoRA adapter",
    "monteclora_config": "is a MonteCLoRA adapter",
    "kasa_config": "is a KaSA adapter",
    "lora_bias": "has biases of its own inside the adapter",
}
# ways to start training that move part of the base's weights into the adapter
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True, eq=False)
class LoraConfig:
    """The meaning of adapter_config.json. `trained_on` is the base's name as the adapter tells it."""

    rank: int
    alpha: float
    rank_stabilised: bool
    rank_pattern: Patterns
    alpha_pattern: Patterns
    fan_in_fan_out: bool
    dora: bool
    trained_on: str | None

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
    kind = config.get("peft_type")
    if kind != "LORA":
        named = f"a {kind[:40]} adapter" if isinstance(kind, str) and kind else "an adapter of an unnamed kind"
        _foreign(label, f"is {named}, not a LoRA adapter")
    for key, what in _FOREIGN.items():
        if config.get(key):
            _foreign(label, what)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        _foreign(label, f"was trained on weights changed beforehand ({start[:40]})")
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
    )


def _foreign(label: str, what: str) -> NoReturn:
    raise Refused(
        "NOT_SUPPORTED", f"{label} {what}; that cannot be added to weights on the fly.",
        "Merge it into its model with the PEFT library first, and name the merged model.", value=label,
    )  # fmt: skip


def odd(label: str, key: str, what: str) -> NoReturn:
    """Refuse an adapter's config: `what` continues the sentence about `key`."""
    raise Refused(
        "BAD_CHECKPOINT", f"{label}: `{key}` of adapter_config.json {what}.",
        "Ask the adapter's author for a whole config.", value=label,
    )  # fmt: skip


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
