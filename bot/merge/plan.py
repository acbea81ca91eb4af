"""Recipe + headers -> Plan: every tensor, shape, dtype, byte offset and number, before a weight is read.

No torch here: planning a 70 B merge takes seconds and no memory to speak of. What a plan says, the engine does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from bot.errors import Refused
from bot.merge.architecture import infer
from bot.merge.checkpoint import Checkpoint
from bot.merge.layout import Layout, arrange
from bot.merge.output_config import output_config
from bot.merge.spec import ModelRef, Notice, Recipe
from bot.merge.steps import Notes, Work, work_of

NUMERICS_VERSION = 1  # raised whenever the same plan would give other bytes
BASE_MEMORY_BYTES = 220 * 2**20  # an interpreter with torch imported
WORKERS = 2  # tensors worked on at a time
SHARD_LIMIT_BYTES = 5_000_000_000
METADATA = {"format": "pt"}

# Files of the donor that belong to the model as much as its weights do.
_DONATED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Step:
    """One tensor of the output: what to compute, and the `nbytes` bytes at `offset` of `shard` it fills."""

    index: int
    work: Work
    shard: int
    offset: int
    nbytes: int

    @property
    def name(self) -> str:
        return self.work.name


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: its name, its first bytes (length and JSON header), its size in bytes."""

    file: str
    header: bytes
    nbytes: int


@dataclass(frozen=True, slots=True)
class PlannedSource:
    """One source: what it is used for and the shards the plan was made from (bytes, header SHA-256)."""

    model: ModelRef
    roles: tuple[str, ...]
    headers: Mapping[str, tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Copied:
    """A file taken over from a source byte for byte."""

    model: ModelRef
    file: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything about a merge that is known before its first weight. `digest` identifies the exact work."""

    recipe: Recipe
    seed: int
    shard_limit_bytes: int
    steps: tuple[Step, ...]
    shards: tuple[Shard, ...]
    sources: tuple[PlannedSource, ...]
    copies: tuple[Copied, ...]
    config: str  # the text of config.json
    layers: int
    notices: tuple[Notice, ...]
    bytes_in: int
    bytes_out: int
    peak_memory_bytes: int
    disk_bytes: int
    parameters: int
    digest: str = field(default="")

    def summary(self) -> dict[str, object]:
        """The plan as plain JSON values, for printing and for reports."""
        return {
            "method": self.recipe.method,
            "recipe_digest": self.recipe.digest,
            "plan_digest": self.digest,
            "sources": [
                {"model": str(s.model), "roles": list(s.roles), "bytes": sum(size for size, _ in s.headers.values())}
                for s in self.sources
            ],
            "tensors": len(self.steps),
            "layers": self.layers,
            "parameters": self.parameters,
            "dtypes": _dtype_bytes(self.steps),
            "shards": [{"file": shard.file, "bytes": shard.nbytes} for shard in self.shards],
            "copied_files": [copied.file for copied in self.copies],
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "peak_memory_bytes": self.peak_memory_bytes,
            "disk_bytes": self.disk_bytes,
            "values": _value_ranges(self.steps),
            "notices": [{"code": n.code, "text": n.text, "count": n.count} for n in self.notices],
        }


def make(
    recipe: Recipe,
    checkpoints: Mapping[ModelRef, Checkpoint],
    *,
    seed: int = 0,
    shard_limit_bytes: int = SHARD_LIMIT_BYTES,
) -> Plan:
    """Plan a merge. `checkpoints` holds every reference of `recipe.sources`; seed keys the random methods.

    Raises `bot.errors.Refused`: SHAPE_MISMATCH, TENSOR_MISSING, VALUE_OUT_OF_RANGE, MISSING_KEY, NOT_SUPPORTED.
    """
    _refuse_unready(recipe)
    notes = Notes()
    architectures = {ref: infer(checkpoints[ref]) for ref in recipe.sources}
    _same_family(recipe, checkpoints)
    layout = arrange(recipe, checkpoints, architectures)
    for code, text in layout.notices:
        notes.add(code, text, text)
    for ref in recipe.sources:
        for text in checkpoints[ref].notices:
            notes.add("SOURCE_ODD", text, text)
    works = [work for slot in layout.slots if (work := work_of(slot, recipe, seed, notes)) is not None]
    steps, shards = pack(works, shard_limit_bytes)
    config = output_config(recipe, checkpoints, architectures, layout, works, notes)
    copies = tuple(
        Copied(recipe.donor, name, checkpoints[recipe.donor].sizes[name])
        for name in _DONATED
        if name in checkpoints[recipe.donor].sizes
    )
    return _finish(recipe, checkpoints, layout, steps, shards, copies, config, notes, seed, shard_limit_bytes)


def _finish(
    recipe: Recipe,
    checkpoints: Mapping[ModelRef, Checkpoint],
    layout: Layout,
    steps: tuple[Step, ...],
    shards: tuple[Shard, ...],
    copies: tuple[Copied, ...],
    config: str,
    notes: Notes,
    seed: int,
    shard_limit_bytes: int,
) -> Plan:
    sources = tuple(PlannedSource(ref, _roles(recipe, ref), checkpoints[ref].headers) for ref in recipe.sources)
    bytes_out = sum(step.nbytes for step in steps)
    small = len(config) + sum(copied.nbytes for copied in copies) + 200 * len(steps) + 64 * 1024
    identity = {
        "recipe": recipe.digest,
        "numerics": NUMERICS_VERSION,
        "seed": seed,
        "shard_limit_bytes": shard_limit_bytes,
        "sources": {str(source.model): {k: list(v) for k, v in source.headers.items()} for source in sources},
        "config": config,
    }
    return Plan(
        recipe=recipe,
        seed=seed,
        shard_limit_bytes=shard_limit_bytes,
        steps=steps,
        shards=shards,
        sources=sources,
        copies=copies,
        config=config,
        layers=len(layout.layers),
        notices=(*recipe.notices, *notes.all()),
        bytes_in=sum(operand.tensor.nbytes for step in steps for operand in step.work.operands),
        bytes_out=bytes_out,
        peak_memory_bytes=BASE_MEMORY_BYTES
        + sum(sorted((_memory(step.work) for step in steps), reverse=True)[:WORKERS]),
        disk_bytes=sum(shard.nbytes for shard in shards) + small,
        parameters=sum(step.work.elements for step in steps),
        digest=hashlib.sha256(b"plan/1\n" + json.dumps(identity, sort_keys=True).encode()).hexdigest(),
    )


def pack(works: Iterable[Work], shard_limit_bytes: int) -> tuple[tuple[Step, ...], tuple[Shard, ...]]:
    """Distribute tensors over shards of at most `shard_limit_bytes` of data (a larger tensor stands alone).

    Within a shard wider types come first, so that every tensor starts at a multiple of its element size, which
    readers that map the file rely on; work order is kept otherwise.
    """
    groups: list[list[Work]] = [[]]
    filled = 0
    for work in works:
        size = work.elements * work.dtype.itemsize
        if groups[-1] and filled + size > shard_limit_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(work)
        filled += size
    steps: list[Step] = []
    shards: list[Shard] = []
    for number, group in enumerate(groups):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        entries: dict[str, object] = {"__metadata__": METADATA}
        starts: dict[str, int] = {}
        at = 0
        for work in sorted(group, key=lambda w: -w.dtype.itemsize):
            end = at + work.elements * work.dtype.itemsize
            entries[work.name] = {"dtype": work.dtype.code, "shape": list(work.shape), "data_offsets": [at, end]}
            starts[work.name], at = at, end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        shards.append(Shard(file, header, len(header) + at))
        for work in group:
            nbytes = work.elements * work.dtype.itemsize
            steps.append(Step(len(steps), work, number, len(header) + starts[work.name], nbytes))
    return tuple(steps), tuple(shards)


def _refuse_unready(recipe: Recipe) -> None:
    if recipe.vocabulary is not None or recipe.chat_template is not None:
        key = "chat_template" if recipe.vocabulary is None else "tokenizer"
        raise Refused(
            "NOT_SUPPORTED", f"`{key}` in a recipe is not supported yet.",
            "Merge models that share one vocabulary and leave the key out; the base model's tokenizer is kept.",
        )  # fmt: skip


def _same_family(recipe: Recipe, checkpoints: Mapping[ModelRef, Checkpoint]) -> None:
    families = {ref: checkpoints[ref].config.get("model_type") for ref in recipe.sources}
    if len(set(families.values())) > 1:
        raise Refused(
            "SHAPE_MISMATCH",
            "the models are of different families: "
            + ", ".join(f"{ref} is {kind}" for ref, kind in families.items())
            + ".",
            "Merge models of one architecture.",
        )


def _roles(recipe: Recipe, ref: ModelRef) -> tuple[str, ...]:
    roles = []
    if any(ref == source.model for module in recipe.modules for piece in module.slices for source in piece.sources):
        roles.append("input")
    if ref == recipe.base or any(ref == piece.base for module in recipe.modules for piece in module.slices):
        roles.append("base")
    if ref == recipe.donor:
        roles.append("config and tokenizer")
    return tuple(roles)


def _memory(work: Work) -> int:
    """Bytes one tensor needs while it is merged: stored inputs, their float32 copies, work space, the output."""
    stored = sum(operand.tensor.nbytes for operand in work.operands)
    if work.action != "merge":
        return 2 * stored
    return 2 * stored + work.elements * (4 * (len(work.operands) + 3) + work.dtype.itemsize)


def _dtype_bytes(steps: Iterable[Step]) -> dict[str, int]:
    out: dict[str, int] = {}
    for step in steps:
        out[step.work.dtype.name] = out.get(step.work.dtype.name, 0) + step.nbytes
    return out


def _value_ranges(steps: Iterable[Step]) -> dict[str, object]:
    """Lowest and highest resolved value of every parameter, per model where it is given per model."""
    spans: dict[str, list[float]] = {}
    for step in steps:
        seen = [(name, float(value)) for name, value in step.work.shared.items()]
        for name, values in step.work.per_input.items():
            for operand, value in zip(step.work.operands, values, strict=True):
                if value is not None:
                    seen.append((f"{name} of {operand.model}", float(value)))
        for name, value in seen:
            low, high = spans.get(name, [value, value])
            spans[name] = [min(low, value), max(high, value)]
    return {name: span[0] if span[0] == span[1] else span for name, span in spans.items()}
