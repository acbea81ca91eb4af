"""Layout of the output: its tensors, each with its source tensors. docs/design/merging.md 1.4, 1.5.

A Slot is a tensor of the output before a method is chosen: a name, its inputs, and its position in the stack.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bot.errors import Refused, Where
from bot.merge.checkpoints.architecture import Architecture, Stack, may_count_tokens, tied_in
from bot.merge.checkpoints.checkpoint import Checkpoint
from bot.merge.checkpoints.header import TensorInfo
from bot.merge.checkpoints.modules import Part, counterpart, layered, parts, require, with_loose
from bot.merge.checkpoints.ties import is_head
from bot.merge.planning.planning_budget import PlanningBudget
from bot.merge.planning.spellings import find, spelling, under_prefix
from bot.merge.recipe.parameters import position
from bot.merge.recipe.spec import ModelRef, Module, Parameters, Recipe, Slice, Source

_HEAD_BIAS = re.compile(r"(^|\.)(lm_head|embed_out)\.bias$")
Checkpoints = Mapping[ModelRef, Checkpoint]
Architectures = Mapping[ModelRef, Architecture]


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a slot: the source and its tensor, None if the source lacks it. `path` is its YAML path."""

    source: Source
    tensor: TensorInfo | None
    path: str


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of the output, its inputs in recipe order, its position `u`, the levels of shared parameters."""

    name: str
    inputs: tuple[Input, ...]
    base: int | None
    u: float
    shared_levels: tuple[Parameters, ...]
    loose: bool
    vocabulary: bool = False  # dimension 0 counts tokens
    extras: tuple[tuple[ModelRef, TensorInfo], ...] = ()  # the same tensor in sources that are not inputs here


@dataclass(frozen=True, slots=True)
class Stacked:
    """One stack of the output: the config keys that count it, its original depth, and the origin of each layer."""

    depths: tuple[tuple[str, ...], ...]
    source_layers: int
    layers: tuple[tuple[ModelRef, int], ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """The output's tensors in order, its depth, and from which source layer each output layer takes its config."""

    slots: tuple[Slot, ...]
    layers: tuple[tuple[ModelRef, int], ...]
    has_head: bool
    notices: tuple[tuple[str, str], ...]
    stacks: tuple[Stacked, ...] = ()
    unpredictive: bool = False  # prediction layers of a source are left out


@dataclass(frozen=True, slots=True)
class _Piece:
    """A slice with resolved inputs: models, first layers and names."""

    sources: tuple[Source, ...]
    base: int | None
    starts: tuple[int, ...]
    length: int
    levels: tuple[Parameters, ...]
    path: str


def arrange(recipe: Recipe, checkpoints: Checkpoints, architectures: Architectures, budget: PlanningBudget) -> Layout:
    """Lay out the output. Raises `Refused` for modules, ranges and depths that do not match, and beyond `budget`."""
    modules = {module.name: module for module in recipe.modules}
    whole = modules.get("default")
    if not recipe.modular or (whole is not None and whole.layout == "models" and len(modules) == 1):
        only = _Arrangement(recipe, recipe.modules[0], checkpoints, architectures)
        budget.output(only.depth, only.counts())
        return only.layout()
    found = {ref: parts(checkpoints[ref], architectures[ref]) for ref in recipe.sources}
    arrangements: list[_Arrangement] = []
    for module, part in _assigned(recipe, found[recipe.config_source]):
        views = {}
        for ref, theirs in found.items():
            match = part if ref == recipe.config_source else _matching_module(part, theirs)
            if match is not None:
                views[ref] = match.of(architectures[ref])
        for source in (source for piece in module.slices for source in recipe.inputs(module, piece)[0]):
            if source.model not in views:
                raise Refused(
                    "TENSOR_MISSING",
                    f"{source.model} has no module `{part.name}`.",
                    f"Name models that have one under `modules.{module.name}`.",
                    value=module.name,
                )
        arrangements.append(_Arrangement(recipe, module, checkpoints, views, part.depths))
    budget.output(sum(one.depth for one in arrangements), (count for one in arrangements for count in one.counts()))
    return _joined([one.layout() for one in arrangements])


def _assigned(recipe: Recipe, found: Sequence[Part]) -> list[tuple[Module, Part]]:
    """Pairs of a module of the recipe and of the output; modules without layers may join the main one."""
    config_source = str(recipe.config_source)
    assigned: dict[str, tuple[Module, Part]] = {}
    for module in recipe.modules:
        part = require(found, module.name, config_source)
        if part.name in assigned:
            raise Refused(
                "RECIPE_INVALID",
                f"`modules` names {part.name} of {config_source} twice.",
                "Keep one.",
                value=module.name,
                where=Where("recipe", None, f"modules.{module.name}"),
            )
        if part.stack is None and module.layout == "slices":
            raise Refused(
                "RECIPE_INVALID",
                f"`modules.{module.name}` names layers, and {part.name} has none.",
                "Write `models:` there.",
                value=module.name,
                where=Where("recipe", None, f"modules.{module.name}"),
            )
        assigned[part.name] = (module, part)
    missing = [part.name for part in layered(found) if part.name not in assigned]
    if missing:
        raise Refused(
            "MISSING_KEY",
            f"`modules` does not list {', '.join(missing)} of {config_source}.",
            f"Add `{missing[0]}:` with `models:` under `modules`.",
            value=missing[0],
            where=Where("recipe", None, "modules"),
        )
    extra = [part for part in found if part.name not in assigned]
    host = next((part.name for part in found if part.kind in ("text", "decoder")), next(iter(assigned)))
    module, part = assigned[host]
    assigned[host] = (module, with_loose(part, extra))
    return [assigned[part.name] for part in found if part.name in assigned]


def _matching_module(part: Part, found: Sequence[Part]) -> Part | None:
    """The same module of another model, with whatever loose tensors went along in the output."""
    match = counterpart(part, found)
    if match is None:
        return None
    foreign = set(part.before) - set(match.before) - set(match.after)
    return with_loose(match, [each for each in found if each is not match and foreign & {*each.before, *each.after}])


def _joined(layouts: Sequence[Layout]) -> Layout:
    longest = max(layouts, key=lambda layout: len(layout.layers))
    return Layout(
        tuple(slot for layout in layouts for slot in layout.slots),
        longest.layers,
        any(layout.has_head for layout in layouts),
        tuple(dict.fromkeys(notice for layout in layouts for notice in layout.notices)),
        tuple(stack for layout in layouts for stack in layout.stacks),
        any(layout.unpredictive for layout in layouts),
    )


class _Arrangement:
    def __init__(
        self,
        recipe: Recipe,
        module: Module,
        checkpoints: Checkpoints,
        architectures: Architectures,
        depths: tuple[tuple[str, ...], ...] | None = None,
    ) -> None:
        """`depths`: paths of the config keys for the layer count; None for a model with one module."""
        self.recipe, self.checkpoints, self.architectures = recipe, checkpoints, architectures
        self.model = architectures[recipe.config_source]  # gives the output its names
        self.module = module
        self.alone = depths is None
        own = () if self.model.depth_key is None else (self.model.depth_key,)
        self.depths = own if depths is None else depths
        self._known = {*self.model.before, *self.model.after}
        self._stored: dict[int, set[str]] = {}
        self._positions = {  # of the layers of other stacks; all other loose tensors are at 0
            name: position(i, len(stack.layers))
            for stack in reversed(self.model.others)
            for i, layer in reversed([*enumerate(stack.layers)])
            for name in layer.values()
        }
        self.notices: list[tuple[str, str]] = []
        self.left_out, self.unpredictive = list[str](), False  # tensors that transformers does not load
        self.pieces = [self._piece(piece, i) for i, piece in enumerate(self.module.slices)]

    @property
    def depth(self) -> int:
        """Layers of the output."""
        return sum(piece.length for piece in self.pieces)

    def counts(self) -> Iterator[tuple[int, int]]:
        """(tensors, inputs of each) outside the layers, then of each layer, as `layout` will build them."""
        for piece, side in ((self.pieces[0], "before"), (self.pieces[-1], "after")):
            found = [self.architectures[source.model] for source in piece.sources]
            names = {name for part in found for name in (part.before if side == "before" else part.after)}
            yield len(names), len(found)
        for piece in self.pieces:
            stacks = [self.architectures[source.model].main.layers for source in piece.sources]
            for i in range(piece.length):
                owned = (layers[start + i] for layers, start in zip(stacks, piece.starts, strict=True))
                yield len({suffix for layer in owned for suffix in layer}), len(stacks)

    def layout(self) -> Layout:
        first, last = self.pieces[0], self.pieces[-1]
        if self.module.layout == "slices" and self.alone:
            self._refuse_second_stack()
        slots = list(self._loose(first, "before"))
        layers: list[tuple[ModelRef, int]] = []
        for piece in self.pieces:
            for i in range(piece.length):
                slots += self._layer(piece, i, len(layers))
                layers.append((piece.sources[0].model, piece.starts[0] + i))
        after = list(self._loose(last, "after"))
        slots += after
        self._note_dropped()
        has_head = any(is_head(slot.name) for slot in after)
        stack = Stacked(self.depths, len(self.model.main.layers), tuple(layers))
        return Layout(tuple(slots), tuple(layers), has_head, tuple(self.notices), (stack,), self.unpredictive)

    def _piece(self, piece: Slice, index: int) -> _Piece:
        module, prefix = self.module, f"modules.{self.module.name}." if self.recipe.modular else ""
        path = f"{prefix}slices[{index}].sources"
        sources, base = self.recipe.inputs(module, piece)
        if module.layout == "models":
            path = f"{prefix}models"
            depths = {source.model: len(self.architectures[source.model].main.layers) for source in sources}
            if len(set(depths.values())) > 1:
                raise Refused(
                    "SHAPE_MISMATCH",
                    "the models differ in depth: " + ", ".join(f"{m} has {n} layers" for m, n in depths.items()) + ".",
                    "Use `slices:` to say which layers go together.",
                )
        ranges = [self._range(source, f"{path}[{i}]") for i, source in enumerate(sources)]
        levels = (piece.parameters, module.parameters, self.recipe.parameters)
        return _Piece(sources, base, tuple(a for a, _ in ranges), ranges[0][1] - ranges[0][0], levels, path)

    def _range(self, source: Source, path: str) -> tuple[int, int]:
        depth = len(self.architectures[source.model].main.layers)
        if source.layers is None:
            return 0, depth
        if source.layers[1] > depth:
            raise Refused(
                "VALUE_OUT_OF_RANGE",
                f"`{path}.layer_range` is {list(source.layers)}, but {source.model} has {depth} layers.",
                f"Write a range within [0, {depth}].",
            )
        return source.layers

    def _refuse_second_stack(self) -> None:
        tensors = self.checkpoints[self.recipe.config_source].tensors
        total = sum(tensor.nbytes for tensor in tensors.values())
        for stack in self.model.others:
            own = sum(tensors[name].nbytes for layer in stack.layers for name in layer.values())
            if len(stack.layers) > 1 and 50 * own > total:
                raise Refused(
                    "NOT_SUPPORTED",
                    f"{self.recipe.config_source} has a second stack, {stack.prefix.rstrip('.')}; `slices` means one.",
                    "Use `models:`, which covers every stack, or `modules:` with slices for each.",
                )

    def _layer(self, piece: _Piece, i: int, number: int) -> Iterator[Slot]:
        owned = [
            _tensors(self.architectures[source.model].main, start + i, number)
            for source, start in zip(piece.sources, piece.starts, strict=True)
        ]
        suffixes = dict.fromkeys(spelling(suffix, owned[0]) for layer in owned for suffix in layer)
        for suffix in suffixes:
            names = [find(layer, suffix) for layer in owned]
            name = f"{self.model.main.prefix}{number}.{suffix}"
            yield self._slot(piece, name, names, position(i, piece.length), loose=False)

    def _loose(self, piece: _Piece, side: str) -> Iterator[Slot]:
        """The tensors before or after the stack, from the sources of one slice."""
        parts = [self.architectures[source.model] for source in piece.sources]
        names: dict[str, None] = {}
        for part in parts:
            for name in part.before if side == "before" else part.after:
                names.setdefault(self._in_output(name, part))
        if side == "after" and not any(map(is_head, names)) and self._gives_a_head(piece):
            names["lm_head.weight"] = None  # as llamas call it
        for name in names:
            stored = [self._in_source(name, part) for part in parts]
            if self._left_out(name, stored, parts):
                continue
            names_or_tied = [hit or tied_in(name, part) for hit, part in zip(stored, parts, strict=True)]
            yield self._slot(piece, name, names_or_tied, self._positions.get(name, 0.0), loose=True)

    def _left_out(self, name: str, stored: Sequence[str | None], parts: Sequence[Architecture]) -> bool:
        """True for a tensor that transformers does not load and that cannot be carried along."""
        if not any(hit in part.unused for hit, part in zip(stored, parts, strict=True) if hit is not None):
            return False
        predicts = any(hit in part.predicting for hit, part in zip(stored, parts, strict=True))
        if None not in stored and not (predicts and self._restacked()):
            return False
        self.unpredictive |= predicts
        self.left_out.append(name)
        return True

    def _restacked(self) -> bool:
        """True if the output has other layers than each of its sources, or in another order."""
        depths = {len(self.architectures[source.model].main.layers) for source in self.pieces[0].sources}
        return len(self.pieces) > 1 or {self.depth} != depths

    def _gives_a_head(self, piece: _Piece) -> bool:
        """Return whether a slice without layers takes its head from a tied model and its embeddings from another."""
        first = self.pieces[0].sources[0].model
        return piece.length == 0 and self.architectures[piece.sources[0].model].tied and first != piece.sources[0].model

    def _slot(self, piece: _Piece, name: str, names: list[str | None], u: float, *, loose: bool) -> Slot:
        inputs = tuple(
            Input(
                source, None if found is None else self.checkpoints[source.model].tensors[found], f"{piece.path}[{i}]"
            )
            for i, (source, found) in enumerate(zip(piece.sources, names, strict=True))
        )
        if not (loose and self._counts_tokens(name, inputs)):
            return Slot(name, inputs, piece.base, u, piece.levels, loose)
        return Slot(name, inputs, piece.base, u, piece.levels, loose, True, tuple(self._elsewhere(name, piece)))

    def _counts_tokens(self, name: str, inputs: Sequence[Input]) -> bool:
        """Return whether dimension 0 of a loose tensor is the vocabulary, by its name and rows."""
        if name == self.model.embedding or is_head(name) or _HEAD_BIAS.search(name):
            return True
        return may_count_tokens(name) and all(
            one.tensor is None or one.tensor.shape[:1] == self._rows(one.source.model) for one in inputs
        )

    def _rows(self, ref: ModelRef) -> tuple[int, ...]:
        embedding = self.architectures[ref].embedding
        return () if embedding is None else self.checkpoints[ref].tensors[embedding].shape[:1]

    def _elsewhere(self, name: str, piece: _Piece) -> Iterator[tuple[ModelRef, TensorInfo]]:
        """The tensor in the recipe's other models, which may give single rows."""
        taking_part = {source.model for source in piece.sources}
        for ref in self.recipe.sources:
            part = self.architectures.get(ref)
            if part is None or ref in taking_part:
                continue
            stored = self._in_source(name, part) or tied_in(name, part)
            if stored is not None:
                yield ref, self.checkpoints[ref].tensors[stored]

    def _in_output(self, name: str, part: Architecture) -> str:
        """The output's name for a loose tensor of a source whose names may differ by one constant prefix."""
        aliases = under_prefix(name, part.main.prefix, self.model.main.prefix)
        return next((alias for alias in aliases if alias in self._known), name)

    def _in_source(self, name: str, part: Architecture) -> str | None:
        stored = self._stored.get(id(part))
        if stored is None:
            stored = self._stored[id(part)] = {*part.before, *part.after}
        aliases = under_prefix(name, self.model.main.prefix, part.main.prefix)
        return next((alias for alias in aliases if alias in stored), None)

    def _note_dropped(self) -> None:
        if self.left_out:
            what = f"{len(self.left_out)} tensors such as {self.left_out[0]} are left out"
            self.notices.append(("UNUSED_LEFT_OUT", f"{what}: transformers does not load them"))
        for ref in dict.fromkeys(source.model for piece in self.pieces for source in piece.sources):
            part = self.architectures[ref]
            if part.dropped:
                self.notices.append(("BUFFER_DROPPED", f"{ref}: buffers such as {part.dropped[0]} are not written"))
            if part.unsure:
                self.notices.append(("PLACED_BEFORE", f"{ref}: {part.unsure[0]} is taken to stand before the layers"))
            if part.main.prefix != self.model.main.prefix:
                self.notices.append(
                    ("RENAMED", f"{ref} calls its layers {part.main.prefix}N, the output {self.model.main.prefix}N")
                )


def _tensors(stack: Stack, layer: int, number: int) -> Mapping[str, str]:
    """Suffix -> name of the tensors that layer `layer` gives to layer `number` of the output.

    T5 keeps the position biases of all layers in the first one: they belong to the place, not to the layer.
    """
    own = stack.layers[layer]
    placed = {
        suffix: name
        for suffix, name in stack.layers[0].items()
        if "relative_attention_bias" in suffix and not any(suffix in other for other in stack.layers[1:])
    }
    if not placed:
        return own
    return {**({} if number else placed), **{suffix: name for suffix, name in own.items() if suffix not in placed}}
