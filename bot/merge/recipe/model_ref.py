"""References to models in recipes: `path[@revision][+adapter[@revision]]`, or mergekit's mapping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, order=True)
class ModelRef:
    """A model by Hub id or local folder, optionally at a revision, optionally with a LoRA adapter on top."""

    path: str
    revision: str | None = None
    lora: ModelRef | None = None

    @property
    def bare(self) -> ModelRef:
        """The model without its adapter."""
        return ModelRef(self.path, self.revision)

    def pinned(self, commits: Mapping[ModelRef, ModelRef]) -> ModelRef:
        """The reference with model and adapter replaced by their entries in `commits` (keyed by bare references)."""
        bare = commits.get(self.bare, self.bare)
        return bare if self.lora is None else replace(bare, lora=self.lora.pinned(commits))

    def __str__(self) -> str:
        own = self.path if self.revision is None else f"{self.path}@{self.revision}"
        return own if self.lora is None else f"{own}+{self.lora}"

    def document(self) -> object:
        """The reference as written in a recipe: text, or a mapping if a path contains `@` or `+`."""
        parts = [part for part in (self.bare, self.lora) if part is not None]
        if not any(sign in part.path for part in parts for sign in "@+"):
            return str(self)
        keys = ("model", "lora")[: len(parts)]
        return {key: {"path": part.path, "revision": part.revision} for key, part in zip(keys, parts, strict=True)}
