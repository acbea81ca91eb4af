"""A LoRA adapter seen through its headers, and a model seen through an adapter. No weight is read, no torch imported.

    Checkpoint of m + Adapter l  ->  Checkpoint of m+l: the same tensors, some with a `LowRank` patch, some replaced

`open_source` opens whatever lies in a folder or repo. The arithmetic is in `operands/lora_rows.py`. merging.md 5.3.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from bot.errors import Refused
from bot.merge.checkpoints.adapter_config import LoraConfig, lora_config, odd
from bot.merge.checkpoints.checkpoint import (
    INDEX,
    OPERATOR,
    Checkpoint,
    Files,
    Limits,
    open_checkpoint,
    read_header,
    read_json,
    shard_like,
)
from bot.merge.checkpoints.header import TensorInfo, refuse
from bot.merge.checkpoints.patterns import BadPattern
from bot.merge.recipe.spec import ModelRef, Recipe

_HEAD = "lm_head"
_PREFIXES_LIMIT = 10_000
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?P<leaf>\.weight|\.bias)?"
)
_SAVED = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer)(?=\.)")
_LAYER = re.compile(r"(?:^|(?<=\.))\d+\.")
_VOCABULARY = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|shared|tok_embeddings|lm_head|embed_out)\.")


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to a stored weight W of shape (rows, cols): `scale` times the product of two factors.

    `a` (r, in) and `b` (out, r) lie in the folder of `adapter`. The sum is `W + scale * b a`; `transposed` where W is
    stored (in, out), as embeddings and GPT-2's Conv1D are: `W + scale * (b a)^T`. With a `magnitude` (out) every
    output's vector is then scaled to that length (DoRA). Convolutions count as matrices (out, everything else).
    """

    adapter: ModelRef
    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool = False
    magnitude: TensorInfo | None = None

    @property
    def reads(self) -> tuple[TensorInfo, ...]:
        """The adapter's tensors to read."""
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """What is known of a LoRA adapter before its weights are read. `digest` covers its config."""

    name: str
    config: LoraConfig
    tensors: Mapping[str, TensorInfo]
    headers: Mapping[str, tuple[int, str]]
    sizes: Mapping[str, int]
    files: Files
    digest: str

    @property
    def header_ends(self) -> dict[str, int]:
        """File -> bytes before its first tensor."""
        return {WEIGHTS: min(tensor.start for tensor in self.tensors.values())}


def open_source(files: Files, *, limits: Limits = OPERATOR, name: str | None = None) -> Checkpoint | Adapter:
    """Open a model or an adapter by its config and headers. A folder that holds both counts as the model.

    Raises `bot.errors.Refused` as `open_checkpoint` and `open_adapter` do.
    """
    sizes = files.sizes()
    whole = "config.json" in sizes and (INDEX in sizes or any(shard_like(file) for file in sizes))
    if CONFIG in sizes and not whole:
        return open_adapter(files, limits=limits, name=name)
    return open_checkpoint(files, limits=limits, name=name)


def open_adapter(files: Files, *, limits: Limits = OPERATOR, name: str | None = None) -> Adapter:
    """Read the config and the header of an adapter. Raises `Refused`: BAD_CHECKPOINT, NOT_SUPPORTED,
    SOURCE_NOT_SAFETENSORS."""
    label = name or str(files)
    sizes = files.sizes()
    loaded, text = read_json(files, sizes, CONFIG, label, limits)
    meaning = lora_config(loaded, label)
    if WEIGHTS not in sizes:
        only = next((file for file in sorted(sizes) if file.startswith("adapter_model")), None)
        raise Refused(
            "SOURCE_NOT_SAFETENSORS", f"{label} has {'only ' + only if only else 'no ' + WEIGHTS}.",
            "Ask its author for safetensors.", value=label,
        )  # fmt: skip
    tensors, digest = read_header(files, WEIGHTS, sizes[WEIGHTS], label, limits)
    stray = next((tensor for tensor in tensors if not tensor.startswith(PREFIX)), None)
    if stray is not None:
        refuse(f"{label}: {WEIGHTS}", f"has the tensor `{stray[:80]}`, whose name does not start with {PREFIX}")
    coded = next((t for t in tensors.values() if not t.dtype.floating or t.dtype.quantised), None)
    if coded is not None:
        refuse(f"{label}: {WEIGHTS}", f"stores `{coded.name[:80]}` as {coded.dtype.name}.")
    known = hashlib.sha256(text.encode()).hexdigest()
    return Adapter(label, meaning, tensors, {WEIGHTS: (sizes[WEIGHTS], digest)}, sizes, files, known)


def models_of(recipe: Recipe, opened: Mapping[ModelRef, Checkpoint | Adapter]) -> dict[ModelRef, Checkpoint]:
    """Every source of a recipe as written, models with an adapter seen through it. `opened` is keyed by bare refs.

    Raises `Refused`: NOT_SUPPORTED where a model is an adapter or an adapter a model; SHAPE_MISMATCH and
    TENSOR_MISSING where an adapter does not fit.
    """
    return {ref: _model(ref, opened) for ref in recipe.sources}


def _model(ref: ModelRef, opened: Mapping[ModelRef, Checkpoint | Adapter]) -> Checkpoint:
    model = opened[ref.bare]
    if isinstance(model, Adapter):
        base = model.config.trained_on or "its base"
        raise Refused(
            "NOT_SUPPORTED", f"{ref.bare} is a LoRA adapter, not a model.",
            f"Name the model it belongs to: `{base[:80]}+{ref.bare}`.", value=str(ref),
        )  # fmt: skip
    if ref.lora is None:
        return model
    adapter = opened[ref.lora]
    if not isinstance(adapter, Adapter):
        raise Refused(
            "NOT_SUPPORTED", f"{ref.lora} is a whole model, not a LoRA adapter.",
            "Behind the `+` stands an adapter: a repo with adapter_config.json and adapter_model.safetensors.",
            value=str(ref),
        )  # fmt: skip
    return through(model, adapter, ref)


def through(model: Checkpoint, adapter: Adapter, ref: ModelRef) -> Checkpoint:
    """`model` seen through `adapter`; `ref` is the reference as written, `m+l`."""
    assert ref.lora is not None
    return _Fitting(model, adapter, ref, ref.lora).fitted()


@dataclass(slots=True)
class _Module:
    """The adapter's tensors for one module, by part."""

    parts: dict[str, TensorInfo] = field(default_factory=dict)


class _Fitting:
    """Finds the model's tensor for every tensor of an adapter."""

    def __init__(self, model: Checkpoint, adapter: Adapter, ref: ModelRef, lora: ModelRef) -> None:
        self.model, self.adapter, self.ref, self.lora = model, adapter, ref, lora
        self.tensors = dict(model.tensors)
        self.elsewhere: dict[str, ModelRef] = {}
        self.notices: list[str] = []
        self.config: Mapping[str, Any] = model.config

    def fitted(self) -> Checkpoint:
        modules, saved = self._sorted()
        for module in modules:
            if module.endswith(_HEAD) and f"{module}.weight" not in self.tensors:
                self._give_head(f"{module}.weight")
        wanted = [*(f"{module}.weight" for module in modules), *saved]
        names = _located(wanted, self.tensors)
        self._note_names(names)
        for name, tensor in saved.items():
            self._replace(names.get(name), name, tensor)
        patches: dict[str, LowRank] = {}
        turned = self._stored_turned(modules, names)
        for module, found in modules.items():
            own = names.get(f"{module}.weight")
            if own is None:
                self._stray(next(iter(found.parts.values())).name)
            patches[own] = self._patch(module, found, self.tensors[own], turned)
        self._note_base()
        return replace(
            self.model,
            name=str(self.ref),
            config=self.config,
            tensors=self.tensors,
            patches=patches,
            elsewhere=self.elsewhere,
            notices=(*self.model.notices, *self.notices),
        )

    def _sorted(self) -> tuple[dict[str, _Module], dict[str, TensorInfo]]:
        """The low-rank factors by module, and the tensors saved whole by their names in the model."""
        modules: dict[str, _Module] = {}
        saved: dict[str, TensorInfo] = {}
        for full, tensor in self.adapter.tensors.items():
            name = full.removeprefix(PREFIX)
            match = _FACTOR.fullmatch(name)
            if match is not None and match["leaf"] != ".bias":
                parts = modules.setdefault(match["module"], _Module()).parts
                self._once(match["part"] in parts, full)
                parts[match["part"]] = tensor
            elif "lora_" in name or "token_adapter" in name:
                self._stray(full)
            else:
                own = _SAVED.sub("", name)
                self._once(own in saved, full)
                saved[own] = tensor
        return modules, saved

    def _once(self, twice: bool, name: str) -> None:
        if twice:
            refuse(f"{self.adapter.name}: {WEIGHTS}", f"gives `{name[:120]}` twice, under two spellings.")

    def _patch(self, module: str, found: _Module, weight: TensorInfo, turned: bool) -> LowRank:
        embedding = "lora_embedding_A" in found.parts
        a, b = (found.parts.get(f"lora_{'embedding_' if embedding else ''}{part}") for part in "AB")
        if a is None or b is None:
            lacking = "A" if a is None else "B"
            refuse(f"{self.adapter.name}: {WEIGHTS}", f"lacks lora_{lacking} of `{module[:80]}`.")
        try:
            rank, scale = self.adapter.config.rank_of(module), self.adapter.config.scale_of(module)
        except BadPattern as bad:
            odd(self.adapter.name, "rank_pattern and alpha_pattern", f"hold a pattern that {bad}")
        if a.shape[:1] != (rank,) or b.shape[1:2] != (rank,):
            refuse(
                f"{self.adapter.name}: {WEIGHTS}",
                f"has factors {list(a.shape)} and {list(b.shape)} for `{module[:80]}`, its config says rank {rank}.",
            )
        if max(b.shape[2:], default=1) > 1 or (len(a.shape) > 2 and a.shape[1:] != weight.shape[1:]):
            self._misfit(weight, f"factors {list(a.shape)} and {list(b.shape)}")  # of a convolution B is (out, r, 1, 1)
        sides = (b.shape[0], a.elements // rank)
        straight, other = as_matrix(weight.shape), as_matrix(weight.shape)[::-1]
        if len(weight.shape) < 2 or sides not in (straight, other) or rank > max(sides):
            self._misfit(weight, f"factors {list(a.shape)} and {list(b.shape)}")
        transposed = embedding or sides != straight or (straight == other and turned and bool(_LAYER.search(module)))
        if embedding and sides != other:
            self._misfit(weight, f"factors {list(a.shape)} and {list(b.shape)}")
        return LowRank(self.lora, a, b, scale, transposed, self._magnitude(found, module, weight, sides[0]))

    def _magnitude(self, found: _Module, module: str, weight: TensorInfo, outputs: int) -> TensorInfo | None:
        magnitude = found.parts.get("lora_magnitude_vector")
        if magnitude is None and self.adapter.config.dora:
            refuse(f"{self.adapter.name}: {WEIGHTS}", f"lacks the magnitudes of `{module[:80]}`; its config says DoRA.")
        if magnitude is not None and (magnitude.elements != outputs or max(magnitude.shape, default=1) != outputs):
            self._misfit(weight, f"magnitudes {list(magnitude.shape)}")
        return magnitude

    def _stored_turned(self, modules: Mapping[str, _Module], names: Mapping[str, str]) -> bool:
        """Whether the layers' matrices are stored (in, out), as GPT-2's are.

        PEFT decides module by module from its class and writes only the last answer into the config; a matrix that
        is not square tells the truth.
        """
        for module, found in modules.items():
            own, a, b = names.get(f"{module}.weight"), found.parts.get("lora_A"), found.parts.get("lora_B")
            if own is None or a is None or b is None or not _LAYER.search(module):
                continue
            shape = self.model.tensors[own].shape
            if len(shape) == 2 and shape[0] != shape[1]:
                return (b.shape[0], a.shape[-1]) == shape[::-1]
        return self.adapter.config.fan_in_fan_out

    def _replace(self, own: str | None, name: str, tensor: TensorInfo) -> None:
        """Put a tensor that the adapter saved whole in the place of the model's."""
        if own is None and name.endswith(f"{_HEAD}.weight") and self._untie(name, tensor):
            own = name
        elif own is None:
            self._stray(tensor.name)
        elif self.tensors[own].shape != tensor.shape:
            self._misfit(self.tensors[own], f"a saved tensor {list(tensor.shape)}")
        self.tensors[own] = replace(tensor, name=own)
        self.elsewhere[own] = self.lora

    def _untie(self, name: str, head: TensorInfo) -> bool:
        """A head saved for a model that ties its own: the two part ways."""
        rows = {tensor.shape for key, tensor in self.model.tensors.items() if _VOCABULARY.search(key)}
        if head.shape not in rows:
            return False
        self._note_untied(name)
        return True

    def _give_head(self, name: str) -> None:
        """An adapted head of a model that ties its own: the embedding, adapted as a head only."""
        embeddings = [tensor for key, tensor in self.model.tensors.items() if _VOCABULARY.search(key)]
        if len(embeddings) == 1:
            self.tensors[name] = replace(embeddings[0], name=name)
            self._note_untied(name)

    def _note_untied(self, name: str) -> None:
        self.config = {**self.config, "tie_word_embeddings": False}
        self.notices.append(f"{self.ref}: the adapter changes {name} by itself, so the head is no longer tied")

    def _note_base(self) -> None:
        told, here = self.adapter.config.trained_on, self.ref.bare.path
        if told is None or told.rstrip("/").split("/")[-1].lower() != here.rstrip("/").split("/")[-1].lower():
            said = "does not say on which model it was trained" if told is None else f"was trained on {told[:80]!r}"
            self.notices.append(f"{self.adapter.name} {said}; its shapes fit {here}")

    def _note_names(self, names: Mapping[str, str]) -> None:
        moved = next(((wanted, own) for wanted, own in names.items() if wanted != own), None)
        if moved is not None:
            self.notices.append(f"{self.ref}: the adapter's {moved[0]} is taken to be {moved[1]}")

    def _stray(self, name: str) -> NoReturn:
        raise Refused(
            "TENSOR_MISSING", f"{self.adapter.name} has `{name[:120]}`, for which {self.ref.bare} has no tensor.",
            self._next_step(), value=name,
        )  # fmt: skip

    def _misfit(self, weight: TensorInfo, brought: str) -> NoReturn:
        raise Refused(
            "SHAPE_MISMATCH",
            f"{self.adapter.name} brings {brought} for {weight.name}, {self.ref.bare} has {list(weight.shape)}.",
            self._next_step(), value=weight.name,
        )  # fmt: skip

    def _next_step(self) -> str:
        told = self.adapter.config.trained_on
        return f"Use it on the model it was trained on{f', {told[:80]}' if told else ''}."


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a weight taken as a matrix: its first dimension, and all others together."""
    return (shape[0] if shape else 1, math.prod(shape[1:]))


def _located(wanted: Iterable[str], stored: Mapping[str, TensorInfo]) -> dict[str, str]:
    """The model's name for every wanted name that it has, also where the two differ by one constant prefix.

    A checkpoint may leave out the prefix of the class it was saved from (`transformer.` in GPT-2), or carry another.
    """
    missing: dict[str, list[str]] = {}
    found: dict[str, str] = {}
    for name in wanted:
        if name in stored:
            found[name] = name
        else:
            match = _LAYER.search(name)
            missing.setdefault(name[: match.start()] if match else "", []).append(name)
    stacks = {name[: match.start()] for name in stored if (match := _LAYER.search(name)) is not None}
    for prefix, names in missing.items():
        if not prefix:
            found.update(_by_their_ends(names, stored))
            continue
        if len(missing) * len(stacks) > _PREFIXES_LIMIT:
            continue  # no model has so many stacks
        fitting = [s for s in sorted(stacks) if all(s + name.removeprefix(prefix) in stored for name in names)]
        if len(fitting) == 1:
            found.update({name: fitting[0] + name.removeprefix(prefix) for name in names})
    return found


def _by_their_ends(names: Iterable[str], stored: Iterable[str]) -> dict[str, str]:
    """For each name the stored one that ends with it, or that it ends with, if there is exactly one."""
    whole = set(stored)
    longer: dict[str, list[str]] = {}
    for own in whole:
        for end in _ends(own):
            longer.setdefault(end, []).append(own)
    found = {name: [*longer.get(name, ()), *(end for end in _ends(name) if end in whole)] for name in names}
    return {name: own[0] for name, own in found.items() if len(own) == 1}


def _ends(name: str) -> Iterator[str]:
    """What follows each dot of a name, up to eight parts of it."""
    parts = name.split(".")
    for i in range(max(1, len(parts) - 8), len(parts) - 1):
        yield ".".join(parts[i:])
