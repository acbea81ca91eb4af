"""The files of a model with the tokenizer of its adapter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bot.merge.checkpoints.checkpoint import Files
from bot.merge.checkpoints.model_files import NAMED_TEMPLATES, TOKENIZER_FILES


def tokenizer_files(names: Iterable[str]) -> frozenset[str]:
    """The files of a tokenizer among file names; none where the tokenizer itself is missing."""
    found = frozenset(TOKENIZER_FILES).intersection(names)
    return found if any(name.startswith("tokenizer") for name in found) else frozenset()


@dataclass(frozen=True, slots=True)
class OtherTokenizer:
    """`Files` of a model, with `names` taken from its adapter in place of the model's tokenizer."""

    model: Files
    adapter: Files
    names: frozenset[str]

    def __str__(self) -> str:
        return str(self.model)

    def sizes(self) -> dict[str, int]:
        own = {name: size for name, size in self.model.sizes().items() if not _of_tokenizer(name)}
        return own | {name: size for name, size in self.adapter.sizes().items() if name in self.names}

    def read(self, name: str, start: int, length: int) -> bytes:
        return (self.adapter if name in self.names else self.model).read(name, start, length)


def _of_tokenizer(name: str) -> bool:
    return name in TOKENIZER_FILES or name.startswith(f"{NAMED_TEMPLATES}/")
