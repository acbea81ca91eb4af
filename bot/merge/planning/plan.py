"""Plan of a merge: everything that is known before the first weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from bot.merge.checkpoints.checkpoint import INDEX
from bot.merge.checkpoints.header import TensorInfo
from bot.merge.planning.work import Work
from bot.merge.recipe.reading import write_yaml
from bot.merge.recipe.spec import ModelRef, Notice, Recipe
from bot.merge.tokenizer.tokenizer import Alignment

NUMERICS_VERSION = 5  # raised whenever the same plan would give other bytes
BASE_MEMORY_BYTES = 300 * 2**20  # measured: an interpreter with torch imported, without tensors
WORKERS = 2  # tensors processed at a time
SHARD_LIMIT_BYTES = 5_000_000_000
METADATA = {"format": "pt"}


@dataclass(frozen=True, slots=True)
class Step:
    """One tensor of the output: its work, and the place of its bytes at `offset` of `shard`."""

    index: int
    work: Work
    shard: int
    offset: int

    @property
    def name(self) -> str:
        return self.work.name

    @property
    def nbytes(self) -> int:
        return self.work.nbytes


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: its name, its first bytes (length and JSON header), its size in bytes."""

    file: str
    header: bytes
    nbytes: int


@dataclass(frozen=True, slots=True)
class PlannedSource:
    """One source: its use and the shards behind the plan (bytes, header SHA-256).

    `header_ends` is the start of each shard's first tensor; `texts` the small files that describe the model (bytes);
    `presumed` pairs of tied tensors that have to be equal (`Checkpoint.presumed`).
    """

    model: ModelRef
    roles: tuple[str, ...]
    headers: Mapping[str, tuple[int, str]]
    header_ends: Mapping[str, int]
    texts: Mapping[str, int]
    presumed: tuple[tuple[TensorInfo, TensorInfo], ...] = ()


@dataclass(frozen=True, slots=True)
class Copied:
    """A file copied from a source byte for byte."""

    model: ModelRef
    file: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Plan of a merge. `digest` identifies the exact work."""

    recipe: Recipe
    seed: int
    shard_limit_bytes: int
    steps: tuple[Step, ...]
    shards: tuple[Shard, ...]
    sources: tuple[PlannedSource, ...]
    copies: tuple[Copied, ...]
    config: str  # the text of config.json
    texts: Mapping[str, str]  # further small files whose text is known
    vocabulary: Alignment | None
    layers: int
    notices: tuple[Notice, ...]
    bytes_in: int
    bytes_out: int
    peak_memory_bytes: int
    disk_bytes: int
    parameters: int
    digest: str = ""
    stages: tuple[tuple[ModelRef, Plan], ...] = ()  # intermediates, each after those it uses

    @property
    def parts(self) -> tuple[Plan, ...]:
        """The plans of the stages in their order, then this one."""
        return (*(stage for _, stage in self.stages), self)

    @property
    def written_texts(self) -> dict[str, str]:
        """Texts of all files beside the weights that are not copied; provenance and manifest come later."""
        texts = {**self.texts, "config.json": self.config, "mergekit_config.yml": write_yaml(self.recipe.document())}
        return texts if self.index is None else {**texts, INDEX: self.index}

    @property
    def index(self) -> str | None:
        """Text of model.safetensors.index.json; None for a single shard."""
        if len(self.shards) == 1:
            return None
        weight_map = {step.name: self.shards[step.shard].file for step in self.steps}
        index = {"metadata": {"total_size": self.bytes_out}, "weight_map": dict(sorted(weight_map.items()))}
        return json.dumps(index, indent=2) + "\n"
