"""Makes the plan of a merge from a recipe and the headers of its sources. docs/design/merging.md 5.1."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from bot.errors import Refused
from bot.merge.checkpoints import lora
from bot.merge.checkpoints.adapted_model import models_of
from bot.merge.checkpoints.architecture import infer
from bot.merge.checkpoints.checkpoint import INDEX, TRUSTED, Checkpoint, Limits
from bot.merge.checkpoints.lora import Adapter
from bot.merge.checkpoints.model_files import OTHER_FILES, TEMPLATE, TOKENIZER_FILES
from bot.merge.checkpoints.published import one_naming
from bot.merge.checkpoints.ties import is_head
from bot.merge.planning import classic_tensors, planned_checkpoint
from bot.merge.planning.layout import arrange
from bot.merge.planning.memory import memory_of
from bot.merge.planning.output_config import output_config
from bot.merge.planning.plan import (
    BASE_MEMORY_BYTES,
    METADATA,
    NUMERICS_VERSION,
    SHARD_LIMIT_BYTES,
    WORKERS,
    Copied,
    Plan,
    PlannedSource,
    Shard,
    Step,
)
from bot.merge.planning.planning_budget import PlanningBudget
from bot.merge.planning.work import Work, work_of
from bot.merge.recipe.notices import Notes
from bot.merge.recipe.spec import ModelRef, Recipe
from bot.merge.tokenizer import chat_template, template_files
from bot.merge.tokenizer.tokenizer import Alignment, align, remapped_ids


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Pause the garbage collector, which takes a third of the time of a plan with 30,000 tensors."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@_collection_paused()
def make(
    recipe: Recipe,
    opened: Mapping[ModelRef, Checkpoint | Adapter],
    *,
    seed: int = 0,
    shard_limit_bytes: int = SHARD_LIMIT_BYTES,
    limits: Limits = TRUSTED,
) -> Plan:
    """Plan a merge and the stages before it.

    `opened` holds `recipe.repos`; `seed` keys the random methods; `limits` bounds layers and tensors. Raises
    `bot.errors.Refused`: SHAPE_MISMATCH, TENSOR_MISSING, VALUE_OUT_OF_RANGE, MISSING_KEY, NOT_SUPPORTED, TOO_LARGE.
    """
    budget = PlanningBudget(limits)
    models = {ref: one for ref, one in opened.items() if isinstance(one, Checkpoint)}
    opened = {**opened, **one_naming(models, limits)}
    stages: list[tuple[ModelRef, Plan]] = []
    for stage in recipe.stages:
        plan = _plan_document(_Document(stage.recipe, opened, seed, shard_limit_bytes), budget)
        opened[stage.ref] = planned_checkpoint.checkpoint(plan, stage.name, opened)
        stages.append((stage.ref, plan))
    return _plan_document(_Document(recipe, opened, seed, shard_limit_bytes, tuple(stages)), budget)


@dataclass(frozen=True, slots=True)
class _Document:
    """One document of a recipe with its sources (`opened`, by bare reference) and the options of the plan."""

    recipe: Recipe
    opened: Mapping[ModelRef, Checkpoint | Adapter]
    seed: int
    shard_limit_bytes: int
    stages: tuple[tuple[ModelRef, Plan], ...] = ()


def _plan_document(document: _Document, budget: PlanningBudget) -> Plan:
    notes, recipe = Notes(), document.recipe
    budget.sources(len(document.opened[ref.bare].tensors) for ref in recipe.sources)
    checkpoints = models_of(recipe, document.opened)
    architectures = {ref: infer(checkpoints[ref]) for ref in recipe.sources}
    _same_family(recipe, checkpoints)
    _same_width(recipe, checkpoints)
    if recipe.classic is not None:
        depths = {ref: len(part.main.layers) for ref, part in architectures.items()}
        recipe = classic_tensors.expand_gradient(recipe, classic_tensors.first_depth(recipe, depths), notes)
        document = replace(document, recipe=recipe)
    embeddings = {ref: part.embedding for ref, part in architectures.items()}
    rows = {ref: checkpoints[ref].tensors[name].shape[0] for ref, name in embeddings.items() if name is not None}
    alignment = align(recipe, checkpoints, rows, notes)
    layout = arrange(recipe, checkpoints, architectures, budget)
    for code, text in layout.notices:
        notes.add(code, text, text)
    for ref in recipe.sources:
        for text in checkpoints[ref].notices:
            notes.add("SOURCE_ODD", text, text)
    works = [
        work
        for slot in layout.slots
        if (work := work_of(slot, recipe, checkpoints, document.seed, notes, alignment)) is not None
    ]
    layout = replace(layout, has_head=any(is_head(work.name) for work in works))
    config = output_config(recipe, checkpoints, architectures, layout, works, notes, alignment)
    if recipe.classic is not None:
        config = classic_tensors.with_true_rows(config, {work.name: work.shape for work in works})
    small = _small_files(recipe, checkpoints, alignment, config, notes, known_templates=budget.strict)
    return _finish(document, len(layout.layers), works, small, alignment, notes)


@dataclass(frozen=True, slots=True)
class _SmallFiles:
    """Files beside the weights: config.json, further texts, files copied."""

    config: str
    texts: Mapping[str, str]
    copies: tuple[Copied, ...]


def _small_files(
    recipe: Recipe,
    checkpoints: Mapping[ModelRef, Checkpoint],
    alignment: Alignment | None,
    config: str,
    notes: Notes,
    *,
    known_templates: bool,
) -> _SmallFiles:
    config_source = recipe.config_source
    tokenizer_source = config_source if alignment is None else alignment.tokenizer_source
    texts = {} if alignment is None else dict(alignment.texts)
    loaded = checkpoints[config_source].document("generation_config.json")
    if alignment is not None and tokenizer_source != config_source and loaded is not None:
        loaded.update(remapped_ids(loaded, alignment, config_source, checkpoints[tokenizer_source].config))
        texts["generation_config.json"] = json.dumps(loaded, indent=2) + "\n"
    template = chat_template.chat_template(recipe, checkpoints, alignment, notes, known_only=known_templates)
    if template is not None:
        texts[TEMPLATE] = template
        text = texts.get("tokenizer_config.json")
        own = json.loads(text) if text else checkpoints[tokenizer_source].document("tokenizer_config.json")
        if own is not None:
            texts["tokenizer_config.json"] = chat_template.without_template(own)
    stale = {"added_tokens.json"} if "tokenizer.json" in texts else set()
    listed = chat_template.with_named_templates(checkpoints[tokenizer_source], texts.get("tokenizer_config.json"))
    if template is None and listed is not None:
        texts["tokenizer_config.json"], stale = listed, stale | {TEMPLATE}
    tokenizer = () if recipe.classic is not None and not recipe.classic.copy_tokenizer else TOKENIZER_FILES
    names = [(tokenizer_source, name) for name in tokenizer if name not in stale]
    names += [(config_source, name) for name in OTHER_FILES]
    for ref, name in names if known_templates else ():
        kept = template_files.known_only(name, checkpoints[ref], texts.get(name), notes)
        if kept is not None:
            texts[name] = kept
    copies = tuple(
        Copied(checkpoints[ref].elsewhere.get(name, ref.bare), name, checkpoints[ref].sizes[name])
        for ref, name in names
        if name in checkpoints[ref].sizes and name not in texts
    )
    return _SmallFiles(config, {name: text for name, text in texts.items() if text}, copies)


def _finish(
    document: _Document,
    layers: int,
    works: Sequence[Work],
    small: _SmallFiles,
    alignment: Alignment | None,
    notes: Notes,
) -> Plan:
    steps, shards = pack(works, document.shard_limit_bytes)
    recipe = document.recipe
    read = dict.fromkeys(part for ref in recipe.sources for part in (ref.bare, ref.lora) if part is not None)
    sources = tuple(_planned_source(ref, _roles(recipe, ref), document.opened[ref]) for ref in read)
    small_bytes = len(small.config) + sum(map(len, small.texts.values())) + sum(c.nbytes for c in small.copies)
    memory = sorted((memory_of(step.work) for step in steps), reverse=True)
    return Plan(
        recipe=recipe,
        seed=document.seed,
        shard_limit_bytes=document.shard_limit_bytes,
        steps=steps,
        shards=shards,
        sources=sources,
        copies=small.copies,
        config=small.config,
        texts=small.texts,
        vocabulary=alignment,
        layers=layers,
        notices=(*recipe.notices, *notes.all()),
        bytes_in=sum(operand.nbytes for step in steps for operand in step.work.reads),
        bytes_out=sum(step.nbytes for step in steps),
        peak_memory_bytes=BASE_MEMORY_BYTES + sum(memory[:WORKERS]),
        disk_bytes=sum(shard.nbytes for shard in shards) + small_bytes + 200 * len(steps) + 64 * 1024,
        parameters=sum(step.work.elements for step in steps),
        digest=_digest(document, sources, small, alignment),
        stages=document.stages,
    )


def _digest(
    document: _Document, sources: Iterable[PlannedSource], small: _SmallFiles, alignment: Alignment | None
) -> str:
    """Identity of the exact work: everything that may change a byte of the output."""
    adapters = {str(ref): one.digest for ref, one in document.opened.items() if isinstance(one, Adapter)}
    identity = {
        "recipe": document.recipe.digest,
        "numerics": NUMERICS_VERSION,
        "seed": document.seed,
        "shard_limit_bytes": document.shard_limit_bytes,
        "sources": {str(source.model): {k: list(v) for k, v in source.headers.items()} for source in sources},
        "config": small.config,
        "texts": dict(small.texts),
        "vocabulary": None if alignment is None else {str(ref): dict(ids) for ref, ids in alignment.sources.items()},
        **({"adapters": adapters} if adapters else {}),
        **({"stages": [stage.digest for _, stage in document.stages]} if document.stages else {}),
    }
    return hashlib.sha256(b"plan/1\n" + json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _planned_source(ref: ModelRef, roles: tuple[str, ...], opened: Checkpoint | Adapter) -> PlannedSource:
    describing = ("config.json", lora.CONFIG, INDEX, *TOKENIZER_FILES, *OTHER_FILES)
    texts = {name: opened.sizes[name] for name in describing if name in opened.sizes}
    presumed = opened.presumed if isinstance(opened, Checkpoint) else ()
    return PlannedSource(ref, roles, opened.headers, opened.header_ends, texts, presumed)


def pack(works: Iterable[Work], shard_limit_bytes: int) -> tuple[tuple[Step, ...], tuple[Shard, ...]]:
    """Distribute tensors over shards of at most `shard_limit_bytes` of data (a larger tensor gets its own).

    Within a shard wider types come first, so that every tensor starts at a multiple of its element size, as readers
    that map the file require; otherwise work order is kept.
    """
    groups: list[list[Work]] = [[]]
    filled = 0
    for work in works:
        if groups[-1] and filled + work.nbytes > shard_limit_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(work)
        filled += work.nbytes
    steps: list[Step] = []
    shards: list[Shard] = []
    for number, group in enumerate(groups):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        entries: dict[str, object] = {"__metadata__": METADATA}
        starts: dict[str, int] = {}
        at = 0
        for work in sorted(group, key=lambda w: -w.dtype.itemsize):
            end = at + work.nbytes
            entries[work.name] = {"dtype": work.dtype.code, "shape": list(work.shape), "data_offsets": [at, end]}
            starts[work.name], at = at, end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        shards.append(Shard(file, header, len(header) + at))
        for work in group:
            steps.append(Step(len(steps), work, number, len(header) + starts[work.name]))
    return tuple(steps), tuple(shards)


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


def _same_width(recipe: Recipe, checkpoints: Mapping[ModelRef, Checkpoint]) -> None:
    """Refuse stacked layers of different widths: the output's config has one width only."""
    if all(module.layout == "models" for module in recipe.modules):
        return
    for key in ("hidden_size", "intermediate_size"):
        widths = {ref: checkpoints[ref].config.get(key) for ref in recipe.sources}
        if len({width for width in widths.values() if isinstance(width, int)}) > 1:
            raise Refused(
                "SHAPE_MISMATCH",
                f"the models differ in {key}: " + ", ".join(f"{ref} has {n}" for ref, n in widths.items()) + ".",
                "Stack layers of models of one width.",
            )


def _roles(recipe: Recipe, ref: ModelRef) -> tuple[str, ...]:
    """The uses of the bare `ref`."""
    pieces = [piece for module in recipe.modules for piece in module.slices]
    bases = [base for base in (recipe.base, *(piece.base for piece in pieces)) if base is not None]
    roles = []
    if any(ref == source.model.bare for piece in pieces for source in piece.sources):
        roles.append("input")
    if any(ref == base.bare for base in bases):
        roles.append("base")
    if any(ref == source.lora for source in recipe.sources):
        roles.append("adapter")
    if ref == recipe.config_source.bare:
        roles.append("config and tokenizer")
    return tuple(roles)
