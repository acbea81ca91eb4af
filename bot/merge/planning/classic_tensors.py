"""Tensor rules of the 2023 `main.py`: its layer gradient, shapes and types. docs/design/merging.md 4.1.

The output has the first model's tensors. A tensor that another model lacks is merged from the rest; embeddings and head
are cut to a common size and kept in float32. The rest of the engine is stricter, so each of these rules gives a notice.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from bot.errors import Refused
from bot.merge.checkpoints.header import TensorInfo
from bot.merge.checkpoints.ties import is_head
from bot.merge.planning.layout import Input, Slot
from bot.merge.recipe.notices import Notes
from bot.merge.recipe.spec import Condition, Conditions, ModelRef, Recipe, Setting, Source

FLOAT32 = ("model.embed_tokens.weight", "lm_head.weight")
_EMBEDDING, _NORM, _HEAD = "embed_tokens", "model.norm.weight", "lm_head"


def plateaus(gradient: Sequence[float], layers: int) -> list[float]:
    """`layers` + 2 values: for the embeddings, every layer, the final norm.

    Every interval between two neighbours gets the same number of samples with both ends included, so inner values occur
    twice; the last value fills the rest. Raises `Refused` for more intervals than places.
    """
    pieces = len(gradient) - 1
    count = (layers + 2) // pieces
    if not count:
        raise Refused(
            "VALUE_OUT_OF_RANGE",
            f"the layer gradient has {len(gradient)} values for a model of {layers} layers.",
            f"Give at most {layers + 3}.",
        )
    out: list[float] = []
    for low, high in itertools.pairwise(gradient):
        out += [low + (high - low) * (j / (count - 1)) if count > 1 else low for j in range(count)]
    return out + [gradient[-1]] * (layers + 2 - len(out))


def expand_gradient(recipe: Recipe, layers: int, notes: Notes) -> Recipe:
    """The recipe with its layer gradient as conditions on tensor names, for a model of that depth."""
    classic = recipe.classic
    if classic is None or not classic.layer_gradient:
        return recipe
    values = plateaus(classic.layer_gradient, layers)
    after = replace(recipe, classic=replace(classic, layer_gradient=()))
    if recipe.method == "slerp":
        plain = recipe.parameters.get("t", 0.0)
        notes.add("CLASSIC_HEAD", f"{_HEAD} is outside the layer gradient, as in 2023, and takes t = {plain:g}")
        return replace(after, parameters={**recipe.parameters, "t": _by_name(values, plain, None)})
    piece = recipe.modules[0].slices[0]
    sources = []
    for i, source in enumerate(piece.sources):
        own = [value if i else 1 - value for value in values]
        head = own[-1] if recipe.method == "linear" else None
        weight = _by_name(own, source.parameters.get("weight"), head)
        sources.append(Source(source.model, source.layers, {**source.parameters, "weight": weight}))
    if recipe.method == "ties":
        notes.add("CLASSIC_HEAD", f"{_HEAD} is outside the layer gradient, as in 2023, and takes the plain weight")
    else:
        notes.add("CLASSIC_HEAD", f"{_HEAD} takes the last value of the layer gradient; in 2023 this stopped")
    module = replace(recipe.modules[0], slices=(replace(piece, sources=tuple(sources)),))
    return replace(after, modules=(module,))


def _by_name(values: Sequence[float], plain: Setting | None, head: float | None) -> Conditions:
    items = [] if head is None else [Condition(_HEAD, head)]
    items.append(Condition(_EMBEDDING, values[0]))
    items += [Condition(f"layers.{i}.", value) for i, value in enumerate(values[1:-1])]
    items.append(Condition(_NORM, values[-1]))
    if isinstance(plain, float | int):
        items.append(Condition(None, plain))
    return Conditions(tuple(items))


def fitted(slot: Slot, recipe: Recipe, notes: Notes) -> Slot | None:
    """The slot with its inputs cut to one shape; None if the first model lacks the tensor."""
    here = [(i, one) for i, one in enumerate(slot.inputs) if one.tensor is not None and _own_head(slot, one.tensor)]
    if not here or here[0][0] != 0:
        notes.add("CLASSIC_LEFT_OUT", f"{slot.name} is not in the first model and is left out")
        return None
    if len(here) < len(slot.inputs):
        notes.add("CLASSIC_MISSING", f"{slot.name} is not in every model and is merged from the rest")
    reference = next((one for i, one in here if i == slot.base), here[0][1])
    shape = _cut_to(recipe.method, [one.tensor for _, one in here if one.tensor is not None], reference.tensor)
    kept: list[tuple[int, Input]] = []
    for i, one in here:
        assert one.tensor is not None
        cut = _cut(one.tensor, shape) if slot.name in FLOAT32 else one.tensor
        if cut.shape != shape and recipe.method == "ties":
            notes.add("CLASSIC_KEPT_BASE", f"{slot.name} of {one.source.model} has another shape and takes no part")
            continue
        if cut is not one.tensor:
            notes.add(
                "CLASSIC_CUT",
                f"{slot.name} of {one.source.model} is cut from {list(one.tensor.shape)} to {list(shape)}",
            )
        kept.append((i, replace(one, tensor=cut)))
    base = next((position for position, (i, _) in enumerate(kept) if i == slot.base), None)
    return replace(slot, inputs=tuple(one for _, one in kept), base=base)


def must_copy(slot: Slot, recipe: Recipe) -> bool:
    """Return whether the method has nothing to combine: one input, or no base."""
    return recipe.method in ("slerp", "ties") and (len(slot.inputs) == 1 or slot.base is None)


def with_true_rows(config: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """config.json whose vocabulary has as many entries as the embeddings that were written have rows."""
    loaded, shape = json.loads(config), shapes.get(FLOAT32[0])
    if shape is None or loaded.get("vocab_size") in (None, shape[0]):
        return config
    loaded["vocab_size"] = shape[0]
    return json.dumps(loaded, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _own_head(slot: Slot, tensor: TensorInfo) -> bool:
    """Refuse a tied head: the 2023 program never used the embedding as lm_head."""
    return not is_head(slot.name) or is_head(tensor.name)


def _cut_to(method: str, tensors: Sequence[TensorInfo], reference: TensorInfo | None) -> tuple[int, ...]:
    """The shape to cut to: the base's (ties), else the common part."""
    assert reference is not None
    if method == "ties" or any(len(tensor.shape) != len(reference.shape) for tensor in tensors):
        return reference.shape
    return tuple(min(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True))


def _cut(tensor: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    """The first rows of a matrix: its first bytes. Columns are never cut: no such models could be merged anyway."""
    if len(shape) != 2 or tensor.shape[1:] != shape[1:] or tensor.shape[0] <= shape[0]:
        return tensor
    row_bytes = tensor.nbytes // tensor.shape[0]
    return replace(tensor, shape=shape, nbytes=row_bytes * shape[0])


def first_depth(recipe: Recipe, depths: Mapping[ModelRef, int]) -> int:
    """Layers of the model that gives the output its tensors."""
    return depths[recipe.modules[0].slices[0].sources[0].model]
