"""Values of a recipe, frozen. From text, only `reading.parse` builds them.

A recipe has modules of slices; a slice has sources: a model, its layers, its parameters. Parameters map names to
settings: a scalar, a `Gradient` or `Conditions`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from bot.merge.methods import METHODS, Base

Scalar = float | bool | str
Document = dict[str, object] | list[dict[str, object]]


@dataclass(frozen=True, slots=True, order=True)
class ModelRef:
    """A model: `path[@revision][+adapter[@revision]]`, by Hub id or local folder."""

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


@dataclass(frozen=True, slots=True)
class Gradient:
    """Values spread evenly over the layers of a slice. docs/design/merging.md 1.3."""

    values: tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class Condition:
    """`value` for the tensors whose name contains `filter`; None matches every tensor."""

    filter: str | None
    value: Scalar | Gradient


@dataclass(frozen=True, slots=True)
class Conditions:
    """Conditions in order: the first that matches decides."""

    items: tuple[Condition, ...]


Setting = Scalar | Gradient | Conditions
Parameters = Mapping[str, Setting]


@dataclass(frozen=True, slots=True)
class Source:
    """One input of a slice: a model, a half-open range of its layers (None: all), its own parameters."""

    model: ModelRef
    layers: tuple[int, int] | None = None
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Slice:
    """Layers of the output that are merged from the same sources."""

    sources: tuple[Source, ...]
    base: ModelRef | None = None
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Module:
    """One stack of layers. A model with a single stack has one module, named `default`."""

    name: str
    layout: Literal["models", "slices"]
    slices: tuple[Slice, ...]  # exactly one when layout is "models"
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TokenSource:
    """Source of the row of one token: a model's row of a token, or zeros."""

    kind: Literal["model", "model_token", "zero"]
    model: ModelRef | None = None
    token: str | None = None
    token_id: int | None = None


@dataclass(frozen=True, slots=True)
class TokenRule:
    """The entry of `tokenizer.tokens` for one token; `force` also replaces rows that sources have."""

    token: str
    source: TokenSource | None
    force: bool = False


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The requested vocabulary: `union`, `base` or a model's; rules for single tokens; padding of the rows."""

    source: Literal["union", "base"] | ModelRef
    tokens: tuple[TokenRule, ...] = ()
    pad_to_multiple_of: int | None = None
    legacy: bool = False  # written with the key `tokenizer_source`


@dataclass(frozen=True, slots=True)
class Notice:
    """A remark for the user that does not stop the work. `code` is stable, `count` is the number of equal notices."""

    code: str
    text: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Classic:
    """Options of a merge as the 2023 `main.py` did it, with lenient shapes and names and float32 embeddings.

    naive_count: ties elects by the number of signs; layer_gradient: values over embeddings, layers and final norm.
    """

    naive_count: bool = False
    copy_tokenizer: bool = True
    layer_gradient: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Stage:
    """An intermediate merge in a recipe of several documents; later documents use it as the model `name`."""

    name: str
    recipe: Recipe

    @property
    def ref(self) -> ModelRef:
        """The reference by which later documents name the result."""
        return ModelRef(self.name)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One requested merge. `digest` identifies the work once the references are pinned.

    A recipe of several documents is its final document; `stages` are the others, each after those it uses.
    """

    method: str
    modules: tuple[Module, ...]
    base: ModelRef | None
    parameters: Parameters
    dtype: str | None
    out_dtype: str | None
    vocabulary: Vocabulary | None
    chat_template: str | None
    modular: bool = False  # written with the key `modules`
    stages: tuple[Stage, ...] = ()
    classic: Classic | None = None
    notices: tuple[Notice, ...] = field(default=(), compare=False)
    original: str | None = field(default=None, compare=False)  # text of a trusted recipe

    @property
    def documents(self) -> tuple[Recipe, ...]:
        """The recipes of the stages in their order, then this one."""
        return (*(stage.recipe for stage in self.stages), self)

    @property
    def sources(self) -> tuple[ModelRef, ...]:
        """Every model of this document as written, each once; the base keeps its place or comes last."""
        models: dict[ModelRef, None] = {}
        for piece in (piece for module in self.modules for piece in module.slices):
            models.update(dict.fromkeys(source.model for source in piece.sources))
            if piece.base is not None:
                models.setdefault(piece.base)
        if self.base is not None:
            models.setdefault(self.base)
        if self.vocabulary is not None:
            if isinstance(self.vocabulary.source, ModelRef):
                models.setdefault(self.vocabulary.source)
            for rule in self.vocabulary.tokens:
                if rule.source is not None and rule.source.model is not None:
                    models.setdefault(rule.source.model)
        return tuple(models)

    @property
    def repos(self) -> tuple[ModelRef, ...]:
        """Every model and adapter to resolve, each once and bare, those of the stages first."""
        results = {stage.ref for stage in self.stages}
        models: dict[ModelRef, None] = {}
        for ref in (ref for part in self.documents for ref in part.sources):
            models.update(
                dict.fromkeys(part for part in (ref.bare, ref.lora) if part is not None and part not in results)
            )
        return tuple(models)

    @property
    def config_source(self) -> ModelRef:
        """Source of config and tokenizer: the base, else the first source."""
        return self.base or self.sources[0]

    def inputs(self, module: Module, piece: Slice) -> tuple[tuple[Source, ...], int | None]:
        """The inputs of a slice in order, and the index of the base among them (None: no base).

        Under `models` an unlisted base is appended; under `slices` it is not (docs/design/merging.md 1.2).
        """
        sources, base = piece.sources, piece.base or self.base
        if base is not None and module.layout == "models" and all(source.model != base for source in sources):
            sources = (*sources, Source(base))
        if METHODS[self.method].base is Base.IGNORED:
            return sources, None
        return sources, next((i for i, source in enumerate(sources) if source.model == base), None)

    def passes_through(self, module: Module, piece: Slice) -> bool:
        """True if the only input of this slice or module is copied, whatever the parameters of the method.

        As in mergekit, in a part of a model a method for two inputs copies a single one, base or not. A method that
        adds task vectors to a base copies only the base.
        """
        method = METHODS[self.method]
        sources, base = self.inputs(module, piece)
        if len(sources) != 1 or method.base is Base.IGNORED:
            return False
        adds_to_base = method.base is Base.REQUIRED and method.most is None
        if adds_to_base and (base is None or method.least == 1):
            return base is not None
        return sum(len(each.slices) for each in self.modules) > 1

    def pinned(self, commits: Mapping[ModelRef, ModelRef]) -> Recipe:
        """The recipe with every bare reference found in `commits` replaced, including stages and adapters."""
        return replace(
            self,
            stages=tuple(replace(stage, recipe=stage.recipe.pinned(commits)) for stage in self.stages),
            modules=tuple(
                replace(module, slices=tuple(_pinned_slice(piece, commits) for piece in module.slices))
                for module in self.modules
            ),
            base=None if self.base is None else self.base.pinned(commits),
            vocabulary=None if self.vocabulary is None else _pinned_vocabulary(self.vocabulary, commits),
        )

    def document(self) -> Document:
        """The recipe as plain JSON values in mergekit's language; parsing them gives an equal recipe.

        With stages it is a list of documents, each stage with its name, the final document last.
        """
        if not self.stages:
            return self._own_document()
        stages = [{"name": stage.name, **stage.recipe._own_document()} for stage in self.stages]
        return [*stages, self._own_document()]

    def _own_document(self) -> dict[str, object]:
        out: dict[str, object] = {"merge_method": self.method}
        if self.base is not None:
            out["base_model"] = self.base.document()
        if self.modular:
            out["modules"] = {module.name: _module_json(module) for module in self.modules}
        else:
            out.update(_module_json(self.modules[0]))
        out.update(_parameters_json(self.parameters))
        for key in ("dtype", "out_dtype", "chat_template"):
            if getattr(self, key) is not None:
                out[key] = getattr(self, key)
        if self.vocabulary is not None:
            out.update(_vocabulary_json(self.vocabulary))
        if self.classic is not None:
            out["classic"] = _classic_json(self.classic)
        return out

    def canonical(self) -> str:
        """Canonical JSON: sorted keys, no spaces, whole numbers without a fraction (as RFC 8785)."""
        return json.dumps(self.document(), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    @property
    def digest(self) -> str:
        """SHA-256, 64 hex digits, of `recipe/1` and the canonical JSON."""
        return hashlib.sha256(b"recipe/1\n" + self.canonical().encode()).hexdigest()


def plain_number(value: float) -> float | int:
    """A whole number without its fraction, so that 1 and 1.0 give the same text."""
    return int(value) if float(value).is_integer() and abs(value) < 2**53 else float(value)


def _pinned_slice(piece: Slice, commits: Mapping[ModelRef, ModelRef]) -> Slice:
    base = None if piece.base is None else piece.base.pinned(commits)
    sources = tuple(replace(source, model=source.model.pinned(commits)) for source in piece.sources)
    return replace(piece, base=base, sources=sources)


def _pinned_vocabulary(vocabulary: Vocabulary, commits: Mapping[ModelRef, ModelRef]) -> Vocabulary:
    source = vocabulary.source
    rules = tuple(
        rule
        if rule.source is None or rule.source.model is None
        else replace(rule, source=replace(rule.source, model=rule.source.model.pinned(commits)))
        for rule in vocabulary.tokens
    )
    pinned = source.pinned(commits) if isinstance(source, ModelRef) else source
    return replace(vocabulary, source=pinned, tokens=rules)


def _classic_json(classic: Classic) -> dict[str, object]:
    block: dict[str, object] = {"naive_count": classic.naive_count, "copy_tokenizer": classic.copy_tokenizer}
    if classic.layer_gradient:
        block["layer_gradient"] = [plain_number(value) for value in classic.layer_gradient]
    return block


def _value_json(value: Scalar | Gradient) -> object:
    if isinstance(value, Gradient):
        return [_value_json(each) for each in value.values]
    return value if isinstance(value, bool | str) else plain_number(value)


def _setting_json(setting: Setting) -> object:
    if not isinstance(setting, Conditions):
        return _value_json(setting)
    return [
        {**({} if item.filter is None else {"filter": item.filter}), "value": _value_json(item.value)}
        for item in setting.items
    ]


def _parameters_json(parameters: Parameters) -> dict[str, object]:
    """The key `parameters`, left out if there are none."""
    values = {name: _setting_json(setting) for name, setting in parameters.items()}
    return {"parameters": values} if values else {}


def _source_json(source: Source) -> dict[str, object]:
    layers = {} if source.layers is None else {"layer_range": list(source.layers)}
    return {"model": source.model.document(), **layers, **_parameters_json(source.parameters)}


def _slice_json(piece: Slice) -> dict[str, object]:
    base = {} if piece.base is None else {"base_model": piece.base.document()}
    sources = [_source_json(source) for source in piece.sources]
    return {"sources": sources, **base, **_parameters_json(piece.parameters)}


def _module_json(module: Module) -> dict[str, object]:
    models = [_source_json(source) for source in module.slices[0].sources]
    layers = models if module.layout == "models" else [_slice_json(piece) for piece in module.slices]
    return {module.layout: layers, **_parameters_json(module.parameters)}


def _token_json(rule: TokenRule) -> dict[str, object]:
    source, force = rule.source, {"force": True} if rule.force else {}
    if source is None:
        return {**force}
    if source.kind == "zero" or source.model is None:
        return {"source": {"kind": "zero"}, **force}
    model = source.model.document()
    if source.kind == "model":
        return {"source": model, **force}
    token = {"token": source.token} if source.token is not None else {"token_id": source.token_id}
    return {"source": {"kind": "model_token", "model": model, **token}, **force}


def _vocabulary_json(vocabulary: Vocabulary) -> dict[str, object]:
    source = vocabulary.source.document() if isinstance(vocabulary.source, ModelRef) else vocabulary.source
    if vocabulary.legacy:
        return {"tokenizer_source": source}
    block: dict[str, object] = {"source": source}
    if vocabulary.tokens:
        block["tokens"] = {rule.token: _token_json(rule) for rule in vocabulary.tokens}
    if vocabulary.pad_to_multiple_of is not None:
        block["pad_to_multiple_of"] = vocabulary.pad_to_multiple_of
    return {"tokenizer": block}
