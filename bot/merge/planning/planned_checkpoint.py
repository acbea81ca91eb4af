"""A planned merge as a checkpoint: headers, config and tokenizer from its plan.

A recipe of several documents is planned to the end before any weights move. docs/design/merging.md 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from bot.errors import Failed
from bot.merge.checkpoints.checkpoint import INDEX, TRUSTED, Checkpoint, open_checkpoint
from bot.merge.checkpoints.lora import Adapter
from bot.merge.recipe.spec import ModelRef

if TYPE_CHECKING:
    from bot.merge.planning.plan import Plan


def checkpoint(plan: Plan, name: str, opened: Mapping[ModelRef, Checkpoint | Adapter]) -> Checkpoint:
    """The result of `plan` as later documents see it; `opened` are the sources it was planned from."""
    return open_checkpoint(_PlannedFiles(plan, name, opened), limits=TRUSTED, name=name, unwritten=True)


class _PlannedFiles:
    """Files that `plan` will write, as far as their bytes are known."""

    def __init__(self, plan: Plan, name: str, opened: Mapping[ModelRef, Checkpoint | Adapter]) -> None:
        self._name = name
        self._heads = {shard.file: shard.header for shard in plan.shards}
        self._sizes = {shard.file: shard.nbytes for shard in plan.shards}
        self._texts = {**plan.texts, "config.json": plan.config}
        if plan.index is not None:
            self._texts[INDEX] = plan.index
        self._copies = {copied.file: opened[copied.model] for copied in plan.copies}

    def __str__(self) -> str:
        return self._name

    def sizes(self) -> dict[str, int]:
        texts = {file: len(text.encode()) for file, text in self._texts.items()}
        return {**self._sizes, **{file: source.sizes[file] for file, source in self._copies.items()}, **texts}

    def read(self, name: str, start: int, length: int) -> bytes:
        if name in self._texts:
            return self._texts[name].encode()[start : start + length]
        if name in self._copies:
            return self._copies[name].files.read(name, start, length)
        found = self._heads[name][start : start + length]
        if len(found) < length:
            raise Failed("INTERNAL", f"{name} of {self._name} has not been merged yet.", "Tell the operator.")
        return found
