"""Slot -> Step: the method's contract, every parameter's value, shapes and dtypes, checked before a weight is read."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from bot.errors import Refused, Where
from bot.merge.checkpoints.architecture import is_optional
from bot.merge.checkpoints.checkpoint import Checkpoint
from bot.merge.checkpoints.float32 import stays_float32
from bot.merge.checkpoints.header import TensorInfo
from bot.merge.checkpoints.patches import Patch
from bot.merge.checkpoints.ties import is_head
from bot.merge.methods import METHODS, Absent, Base, Kind, Method, Missing, Parameter
from bot.merge.planning import classic_tensors
from bot.merge.planning.layout import Input, Slot
from bot.merge.recipe.dtypes import BY_NAME, Dtype, promote
from bot.merge.recipe.notices import Notes
from bot.merge.recipe.parameters import resolve, written
from bot.merge.recipe.spec import Gradient, ModelRef, Parameters, Recipe
from bot.merge.streaming.operation import Value
from bot.merge.tokenizer.rows import RowMap, row_maps
from bot.merge.tokenizer.tokenizer import Alignment


@dataclass(frozen=True, slots=True)
class Operand:
    """One tensor to read: `nbytes` bytes at `tensor.start` of `tensor.file` of `model`, the bare reference.

    `source` is the input as the recipe writes it, adapter included; `patch` is what the adapter adds.
    """

    source: ModelRef
    model: ModelRef
    tensor: TensorInfo
    patch: Patch | None = None

    @property
    def reads(self) -> tuple[tuple[ModelRef, TensorInfo], ...]:
        """All tensors to read, with the bare reference of their folder."""
        added = () if self.patch is None else tuple((self.patch.adapter, tensor) for tensor in self.patch.reads)
        return ((self.model, self.tensor), *added)

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(tensor.nbytes for _, tensor in self.reads)


@dataclass(frozen=True, slots=True, eq=False)
class Aligned:
    """Operands that are re-indexed to the output's vocabulary before the method sees them.

    `maps` has one entry per operand; their matrix numbers count the operands first, then `extra`.
    """

    maps: tuple[RowMap, ...]
    extra: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """Computation of one output tensor.

    `merge` applies `method`; `copy` takes the only operand; `equal` copies the first and fails unless all operands are
    equal bit for bit (tensors that are not floating point). `per_input` holds one value per operand, None for the base;
    `keys` the mask keys of random methods.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Dtype
    action: Literal["merge", "copy", "equal"]
    method: str
    operands: tuple[Operand, ...]
    base: int | None = None
    per_input: Mapping[str, tuple[Value | None, ...]] = field(default_factory=dict)
    shared: Mapping[str, Value] = field(default_factory=dict)
    keys: tuple[int, ...] = ()
    aligned: Aligned | None = None

    @property
    def reads(self) -> tuple[Operand, ...]:
        """Everything to read: the operands, then the matrices that only give rows."""
        return self.operands if self.aligned is None else (*self.operands, *self.aligned.extra)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes to write."""
        return self.elements * self.dtype.itemsize


def work_of(
    slot: Slot,
    recipe: Recipe,
    models: Mapping[ModelRef, Checkpoint],
    seed: int,
    notes: Notes,
    alignment: Alignment | None = None,
) -> Work | None:
    """Work for one slot; None if the tensor is left out. `models` are the sources as written. Raises `Refused`."""
    method = METHODS[recipe.method]
    if recipe.classic is not None:
        found = classic_tensors.fitted(slot, recipe, notes)
        if found is None:
            return None
        slot = found
    present = tuple(i for i, one in enumerate(slot.inputs) if one.tensor is not None)
    action = _presence(slot, method, present, notes)
    if action == "leave out":
        return None
    inputs = [slot.inputs[i] for i in present]
    tensors = [one.tensor for one in inputs if one.tensor is not None]
    operands = tuple(_operand(one.source.model, tensor, models) for one, tensor in zip(inputs, tensors, strict=True))
    aligned = _aligned(slot, operands, models, alignment) if alignment is not None and slot.vocabulary else None
    _same_shape(slot, inputs, tensors, rows_too=aligned is None)
    shape = tensors[0].shape
    if aligned is not None and alignment is not None:
        shape = (alignment.rows, *shape[1:])
    if any(not tensor.dtype.floating for tensor in tensors):
        return _unmixable(slot, shape, operands, tensors)
    wanted = recipe.out_dtype or recipe.dtype
    dtype = BY_NAME[wanted] if wanted else promote(tensor.dtype for tensor in tensors)
    stored = {tensor.dtype.name for tensor in tensors}
    if stored == {"float32"} and stays_float32(slot.name, dtype.name, models[recipe.config_source].config):
        dtype = BY_NAME["float32"]
    if recipe.classic is not None:
        dtype = BY_NAME["float32"] if slot.name in classic_tensors.FLOAT32 else dtype
        action = "copy" if classic_tensors.must_copy(slot, recipe) else action
    if action == "copy" or 0 in shape:
        return Work(slot.name, shape, dtype, "copy", recipe.method, operands[:1], aligned=aligned)
    base = present.index(slot.base) if slot.base in present else None
    per_input = _per_input(slot, method, inputs, base)
    shared = _shared(slot, method)
    if recipe.classic is not None and recipe.classic.naive_count and method.name == "ties":
        shared["naive_count"] = True
    _note_gradient(slot, method, notes)
    keys = tuple(mask_key(seed, str(operand.source), slot.name) for operand in operands) if method.draws else ()
    work = Work(slot.name, shape, dtype, "merge", recipe.method, operands, base, per_input, shared, keys, aligned)
    _check(work, method, inputs, notes)
    return work


def _operand(source: ModelRef, tensor: TensorInfo, models: Mapping[ModelRef, Checkpoint]) -> Operand:
    seen = models[source]
    return Operand(source, seen.elsewhere.get(tensor.name, source.bare), tensor, seen.patches.get(tensor.name))


def _aligned(
    slot: Slot, operands: tuple[Operand, ...], models: Mapping[ModelRef, Checkpoint], alignment: Alignment
) -> Aligned | None:
    present = {operand.source for operand in operands}
    extra = tuple(_operand(source, tensor, models) for source, tensor in slot.extras if source not in present)
    matrices = {operand.source: operand.tensor.shape[0] for operand in (*operands, *extra)}
    maps = row_maps(alignment, [operand.source for operand in operands], matrices)
    if maps is None:
        return None
    used = {number for row_map in maps for fill in row_map.fills for number in fill.matrices}
    return Aligned(maps, extra if any(number >= len(operands) for number in used) else ())


def _presence(
    slot: Slot, method: Method, present: tuple[int, ...], notes: Notes
) -> Literal["merge", "copy", "leave out"]:
    """Rule of the method for a tensor that only some inputs have (column "missing" of docs/design/merging.md 2.1)."""
    if len(present) == len(slot.inputs):
        return "copy" if len(present) == 1 and method.base is not Base.IGNORED else "merge"
    if not (is_optional(slot.name) or is_head(slot.name)):
        _refuse_missing(slot, "is a weight every source must have")
    others = len(present) - (slot.base in present)
    alone = present == (slot.base,)
    notes.add("PARTLY_MISSING", f"{slot.name} is not in every source")
    if alone and method.missing is not Missing.ONE and method.base is Base.REQUIRED:
        return "copy"
    if method.missing is Missing.ONE and len(present) == 1:
        return "copy"
    if method.missing is Missing.STOCK and len(present) < 3:
        notes.add("LEFT_OUT", f"{slot.name} is in fewer than three inputs and is left out")
        return "leave out"
    base_missing = method.base is Base.REQUIRED and slot.base not in present
    if base_missing or others < method.least or method.missing in (Missing.BASE,):
        _refuse_missing(slot, f"{method.name} cannot do without")
    return "merge"


def _refuse_missing(slot: Slot, why: str) -> None:
    lacking = [str(one.source.model) for one in slot.inputs if one.tensor is None]
    raise Refused(
        "TENSOR_MISSING",
        f"{', '.join(lacking)} lacks {slot.name}, which {why}.",
        "Use models of one architecture, or take those layers by `slices:` from a model that has them.",
        value=slot.name,
    )


def _same_shape(slot: Slot, inputs: list[Input], tensors: list[TensorInfo], *, rows_too: bool) -> None:
    if len({tensor.shape if rows_too else tensor.shape[1:] for tensor in tensors}) == 1:
        return
    shapes = ", ".join(f"{one.source.model} {list(t.shape)}" for one, t in zip(inputs, tensors, strict=True))
    rows_only = slot.loose and len({tensor.shape[1:] for tensor in tensors}) == 1
    hint = (
        "Give `tokenizer: {source: base}` so that the vocabularies are aligned."
        if rows_only and len(tensors[0].shape) == 2
        else "Only models of the same width can be merged."
    )
    raise Refused("SHAPE_MISMATCH", f"{slot.name} differs in shape: {shapes}.", hint, value=slot.name)


def _unmixable(slot: Slot, shape: tuple[int, ...], operands: tuple[Operand, ...], tensors: list[TensorInfo]) -> Work:
    if len({tensor.dtype for tensor in tensors}) > 1:
        kinds = ", ".join(f"{o.source} {o.tensor.dtype.name}" for o in operands)
        raise Refused(
            "SHAPE_MISMATCH",
            f"{slot.name} is not floating point in every source: {kinds}.",
            "Use models that store it alike.",
            value=slot.name,
        )
    return Work(slot.name, shape, tensors[0].dtype, "equal", "copy", operands)


def _typed(value: object, parameter: Parameter) -> Value:
    if parameter.kind is Kind.BOOLEAN:
        return bool(value)
    return int(float(str(value))) if parameter.kind is Kind.INTEGER else float(str(value))


def _per_input(
    slot: Slot, method: Method, inputs: list[Input], base: int | None
) -> dict[str, tuple[Value | None, ...]]:
    out: dict[str, tuple[Value | None, ...]] = {}
    for parameter in method.per_input:
        if not parameter.used:
            continue
        values: list[Value | None] = []
        for i, one in enumerate(inputs):
            if i == base:
                values.append(None)
                continue
            tensor = one.tensor.name if one.tensor is not None else slot.name
            value = resolve(parameter, (one.source.parameters, *slot.shared_levels), tensor, slot.u)
            if value is Absent.REQUIRED:
                _refuse_parameter(slot, parameter, f"for {one.source.model}", f"{one.path}.parameters.{parameter.name}")
            values.append(None if isinstance(value, Absent) else _typed(value, parameter))
        out[parameter.name] = tuple(values)
    return out


def _shared(slot: Slot, method: Method) -> dict[str, Value]:
    out: dict[str, Value] = {}
    for parameter in method.shared:
        if not parameter.used:
            continue
        value = resolve(parameter, slot.shared_levels, slot.name, slot.u)
        if isinstance(value, Absent):
            _refuse_parameter(slot, parameter, "", f"parameters.{parameter.name}")
        out[parameter.name] = _typed(value, parameter)
    return out


def _refuse_parameter(slot: Slot, parameter: Parameter, whom: str, path: str) -> None:
    raise Refused(
        "MISSING_KEY",
        f"`{path}` is missing: no value{' ' if whom else ''}{whom} applies to {slot.name}.",
        f"Add `{parameter.name}:`, or a last condition without `filter`.",
        where=Where("recipe", None, path),
    )


def _check(work: Work, method: Method, inputs: list[Input], notes: Notes) -> None:
    """Refuse or note combinations that show once every parameter is resolved."""
    for finding in method.check(work, [one.path for one in inputs]):
        if finding.next_step:
            raise Refused(finding.code, finding.message, finding.next_step, value=work.name)
        notes.add(finding.code, finding.message)


def _note_gradient(slot: Slot, method: Method, notes: Notes) -> None:
    if not slot.loose or slot.u != 0.0:
        return
    inputs: list[tuple[Parameters, str]] = [
        (one.source.parameters, slot.name if one.tensor is None else one.tensor.name)
        for i, one in enumerate(slot.inputs)
        if i != slot.base
    ]
    for parameter in (*method.per_input, *method.shared):
        levels = inputs if parameter in method.per_input else [({}, slot.name)]
        values = (written(parameter.name, (level, *slot.shared_levels), tensor) for level, tensor in levels)
        if parameter.used and any(isinstance(value, Gradient) for value in values):
            notes.add("GRADIENT_AT_ZERO", f"{slot.name} takes the first entry of the gradient of `{parameter.name}`")


def mask_key(seed: int, model: str, tensor: str) -> int:
    """64-bit key of the random mask for the delta of `model` (pinned reference) in the output tensor `tensor`.

    docs/design/merging.md 1.7.
    """
    text = "\0".join(("mask/1", str(seed), model, tensor)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
