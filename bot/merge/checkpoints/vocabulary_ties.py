"""The modules of a model that read one stored matrix with a row for every token, as an adapter sees them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bot.merge.checkpoints.architecture import may_count_tokens
from bot.merge.checkpoints.checkpoint import Checkpoint
from bot.merge.checkpoints.tensor_names import LAYER
from bot.merge.checkpoints.ties import (
    class_names,
    config_ties,
    is_copy,
    is_embedding,
    is_head,
    language_configs,
    main_embedding,
    main_head,
    replacement,
    second_bias,
)

# an embedding under a language model's own prefix, beside which the head is stored: language_model.lm_head
_NESTED = re.compile(r"(?P<outer>(?!model\.)\w+\.)model\.(?:decoder\.)?embed_tokens\.weight")
_SHARED = re.compile(r"(?P<stem>.*)shared\.weight")
_GENERATES = re.compile(r"CausalLM|LMHead|Generation|MaskedLM|PreTraining")


class VocabularyTies:
    """The pair, or group, of modules that share one stored matrix of a model as transformers loads it (`ties.py`).

    `source` is the stored matrix, None where there is none. `readers` are the tensors that the other modules would
    have if each had its own, with the stored tensors that they read. `shared` says that the source belongs to no
    module that reads it, as in T5.
    """

    def __init__(self, model: Checkpoint) -> None:
        loose = [name for name in model.tensors if not LAYER.search(name)]
        self._has_head = main_head(loose) is not None
        self.source = main_embedding(loose)
        self.shared = _SHARED.fullmatch(self.source or "") is not None
        self._stored = model.tensors
        self._head = _head_beside_its_bias(loose)
        names = list(self._sides())
        readers: dict[str, str | None] = {}
        if self._ties_head(model):
            names.append(self.name_of("lm_head.weight"))
            readers = dict(pair for name in loose if (pair := second_bias(name, model.config, model.tensors)))
        readers |= dict.fromkeys(names, self.source)
        self.readers = {name: own for name, own in readers.items() if own is not None and name not in model.tensors}

    def _sides(self) -> list[str]:
        return [self.name_of(f"{side}.embed_tokens.weight") for side in ("encoder", "decoder")] if self.shared else []

    def _ties_head(self, model: Checkpoint) -> bool:
        generates = any(_GENERATES.search(name) for name in class_names(model.config) or ["CausalLM"])
        return generates and not self._has_head and config_ties(model.config) is not False

    def source_of(self, wanted: str) -> str | None:
        """The stored matrix that a module reads whose own is not stored."""
        return replacement(wanted, self._stored, self.source) or (self.source if is_embedding(wanted) else None)

    def name_of(self, wanted: str) -> str:
        """The name under which a module's own matrix is written beside the stored one."""
        nested, shared = _NESTED.fullmatch(self.source or ""), _SHARED.fullmatch(self.source or "")
        if is_head(wanted) and self._head is not None:
            return self._head
        if is_head(wanted):
            own = ".".join(wanted.split(".")[-2:])
            return nested["outer"] + own if nested else own
        if shared and is_copy(wanted):
            return shared["stem"] + ".".join(wanted.split(".")[-3:])
        return wanted

    def counts_tokens(self, name: str) -> bool:
        """True if dimension 0 of a tensor counts the vocabulary."""
        return not LAYER.search(name) and may_count_tokens(name)


def _head_beside_its_bias(loose: Sequence[str]) -> str | None:
    """The name of a tied head whose bias is stored: `cls.predictions.decoder.weight` beside `cls.predictions.bias`."""
    for name in loose:
        module = name.removesuffix("bias")
        if name.endswith(".bias"):
            further = any(other.startswith(module) and other != name for other in loose)
            head = f"{module}decoder.weight" if further else f"{module}weight"
            if is_head(head):
                return head
    return None


def with_vocabulary_size(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The config of a model with another vocabulary size."""
    out, *inner = ({**part, "vocab_size": rows} if "vocab_size" in part else part for part in language_configs(config))
    return {**out, "text_config": inner[0]} if inner else dict(out)
