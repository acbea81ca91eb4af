"""Layout of a head checkpoint, derived from its keys and shapes and never from its config.

The published 7B config states two heads for a file with five, so a config that disagrees is only a warning. After
`examine` every tensor that is copied exists, has the right shape for this base and a floating point type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from evaluators.medusa.drafting.heads import HeadSpec
from evaluators.medusa.formats.reading import INSIDE, MODEL, Stored, refused
from evaluators.medusa.model.causal_lm import Base

Layout = Literal["medusa", "vllm"]
_NAMES: dict[Layout, tuple[re.Pattern[str], re.Pattern[str]]] = {
    "medusa": (
        re.compile(r"([0-9]{1,9})\.([0-9]{1,9})\.linear\.(weight|bias)"),
        re.compile(r"([0-9]{1,9})\.([0-9]{1,9})\.weight"),
    ),
    "vllm": (
        re.compile(r"blocks\.([0-9]{1,9})\.layers\.([0-9]{1,9})\.(weight|bias)"),
        re.compile(r"lm_heads\.([0-9]{1,9})\.weight"),
    ),
}
_KEEP = {"medusa": "keep", "vllm": "token_map"}
_WRAPPERS = (INSIDE, "medusa_heads.")


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """Tensor names in the file by (head, block) or head, and the shape `spec` of the heads."""

    stored: Stored
    spec: HeadSpec
    weights: Mapping[tuple[int, int], str]
    biases: Mapping[tuple[int, int], str]
    projections: Mapping[int, str]
    warnings: list[str] = field(default_factory=list)

    def read(self, name: str) -> Tensor:
        """Read a tensor in float32. Raises EvaluationError BAD_HEADS if it is not finite."""
        tensor = self.stored.read(name).to(torch.float32)
        if not bool(torch.isfinite(tensor).all()):
            raise refused(f"{name} holds NaN or infinity.")
        return tensor

    def projection(self, head: int) -> Tensor:
        """[V', H]; of a projection with all rows, those of the draft vocabulary."""
        rows = self.read(self.projections[head])
        keep = self.spec.keep
        return rows if keep is None or len(rows) == len(keep) else rows[list(keep)]


def examine(stored: Stored, config: Mapping[str, Any], base: Base) -> HeadLayout:
    """Derive the layout. Raises EvaluationError BAD_HEADS with the reason if the heads do not fit `base`."""
    names, warnings = _unwrapped(stored)
    layout = _layout(names, stored)
    block, projection = _NAMES[layout]
    parts = {name: match for name in names if (match := block.fullmatch(name))}
    places = {name: (int(match[1]), int(match[2])) for name, match in parts.items()}
    heads, layers = (max(numbers) + 1 for numbers in zip(*places.values(), strict=True))
    if heads * layers > len(parts):
        raise refused(f"The head file names head {heads - 1} and block {layers - 1}, but holds {len(parts)} tensors.")
    weights = {places[name]: names[name] for name, match in parts.items() if match[3] == "weight"}
    biases = {places[name]: names[name] for name, match in parts.items() if match[3] == "bias"}
    projections = {
        int(match[1]): names[name]
        for name in names
        if (match := projection.fullmatch(name)) and (layout == "vllm" or int(match[2]) == layers)
    }
    known = {*weights.values(), *biases.values(), *projections.values(), names.get(_KEEP[layout], "")}
    if ignored := sorted(set(names.values()) - known):
        warnings.append(f"the file holds {len(ignored)} tensors that belong to no head, such as {ignored[0][:80]}")
    keep = _keep(stored, names.get(_KEEP[layout]), base)
    _check_types(stored, [*weights.values(), *biases.values(), *projections.values()], warnings)
    # vLLM stores the one shared output embedding as the projection of head 0.
    shared = not projections or (layout == "vllm" and heads > 1 and set(projections) == {0})
    conditioned = _check_blocks(stored, weights, biases, heads, layers, base.hidden)
    _check_projections(stored, projections, 1 if shared else heads, keep, base, names, layout, layers)
    spec = HeadSpec("shared" if shared else "own", heads, layers, conditioned, keep)
    if layout == "vllm" and not projections:
        warnings.append("the file holds no `lm_heads.0.weight`: the model's own output embedding is used")
    warnings += _disagreements(spec, config, layout, base)
    return HeadLayout(stored, spec, weights, biases, projections, warnings)


def _unwrapped(stored: Stored) -> tuple[dict[str, str], list[str]]:
    """({name without prefix: name in the file}, warnings). Of a full model only tensors under `medusa_head.` count."""
    inside = [name for name in stored.shapes if name.startswith(INSIDE)]
    if inside and len(inside) < len(stored.shapes):
        others = len(stored.shapes) - len(inside)
        return {name.removeprefix(INSIDE): name for name in inside}, [
            f"the heads come from a full model with {others} other tensors, which may have been trained with them"
        ]
    names = {}
    for name in stored.shapes:
        wrapper = next((wrapper for wrapper in _WRAPPERS if name.startswith(wrapper)), "")
        names[name.removeprefix(wrapper)] = name
    return names, []


def _layout(names: Mapping[str, str], stored: Stored) -> Layout:
    found: list[Layout] = [
        layout for layout, (block, _) in _NAMES.items() if any(block.fullmatch(name) for name in names)
    ]
    if not found and stored.file == MODEL:
        raise refused(
            f"{stored.folder.name} is a model without heads: none of its {len(names)} tensors belongs to a head.",
            "Train heads on it (`mergebot medusa train`), or name a folder that holds heads.",
        )
    if not found:
        raise refused("The head file holds no `{i}.{j}.linear.weight` and no `blocks.{i}.layers.{j}.weight`.")
    if len(found) == 2:
        raise refused("The head file mixes the names of Medusa and of vLLM, so its layout is ambiguous.")
    return found[0]


def _check_blocks(
    stored: Stored,
    weights: Mapping[tuple[int, int], str],
    biases: Mapping[tuple[int, int], str],
    heads: int,
    layers: int,
    width: int,
) -> bool:
    """Check the shapes of the blocks. Returns True if the heads are conditioned."""
    first = stored.shapes.get(weights.get((0, 0), ""), ())
    conditioned = first == (width, 2 * width)
    for head in range(heads):
        for block in range(layers):
            name = weights.get((head, block))
            if name is None:
                raise refused(f"The head file lacks {head}.{block}.linear.weight.")
            entering = 2 * width if conditioned and block == 0 else width
            found = stored.shapes[name]
            made_for = f": it was made for hidden size {found[0]}" if found and found[0] != width else ""
            _expect(stored, name, (width, entering), made_for)
            if (head, block) in biases:
                _expect(stored, biases[head, block], (width,))
    return conditioned


def _check_projections(
    stored: Stored,
    projections: Mapping[int, str],
    wanted: int,
    keep: tuple[int, ...] | None,
    base: Base,
    names: Mapping[str, str],
    layout: Layout,
    layers: int,
) -> None:
    if not projections:
        return
    for head in range(wanted):
        if head not in projections:
            lacking = f"{head}.{layers}.weight" if layout == "medusa" else f"lm_heads.{head}.weight"
            raise refused(f"The head file lacks {lacking}, the projection of head {head}, but has those of others.")
        found = stored.shapes[projections[head]]
        rows = base.vocab if keep is None or (layout == "vllm" and found[:1] == (base.vocab,)) else len(keep)
        other = f": the heads have {found[0]} tokens, the model {rows}" if found and found[0] != rows else ""
        _expect(stored, projections[head], (rows, base.hidden), other)


def _expect(stored: Stored, name: str, shape: tuple[int, ...], why: str = "") -> None:
    found = stored.shapes[name]
    if found != shape:
        raise refused(f"{name} has shape {found}, but this model needs {shape}{why}.")


def _keep(stored: Stored, name: str | None, base: Base) -> tuple[int, ...] | None:
    if name is None:
        return None
    shape, dtype = stored.shapes[name], stored.dtypes[name]
    whole = dtype is not None and not dtype.is_floating_point
    ids = stored.read(name).tolist() if len(shape) == 1 and shape[0] <= base.vocab and whole else []
    if not ids or len(set(ids)) != len(ids) or min(ids) < 0 or max(ids) >= base.vocab:
        raise refused(f"The draft vocabulary of the heads is not a list of different tokens below {base.vocab}.")
    return tuple(ids)


def _check_types(stored: Stored, names: list[str], warnings: list[str]) -> None:
    for name in names:
        dtype = stored.dtypes[name]
        if dtype is None or not dtype.is_floating_point:
            raise refused(f"{name} is not stored as a 16, 32 or 64 bit float ({dtype or 'unknown'}).")
    found = sorted({str(stored.dtypes[name]).removeprefix("torch.") for name in names})
    if len(found) > 1:
        warnings.append(f"the file mixes {' and '.join(found)}: everything is computed in float32")


def _disagreements(spec: HeadSpec, config: Mapping[str, Any], layout: Layout, base: Base) -> list[str]:
    """Warnings for values of the config that differ from the file."""
    ours = config.get("mergebot_heads")
    found: list[tuple[str, Any, Any]] = [
        ("medusa_num_heads", config.get("medusa_num_heads"), spec.heads),
        ("medusa_num_layers", config.get("medusa_num_layers"), spec.layers),
    ]
    if layout == "vllm":
        cut = base.vocab if spec.keep is None else len(spec.keep)
        found += [
            ("num_heads", config.get("num_heads"), spec.heads),
            ("num_hidden_layers", config.get("num_hidden_layers"), spec.layers),
            ("vocab_size", config.get("vocab_size"), base.vocab),
            ("truncated_vocab_size", config.get("truncated_vocab_size"), cut),
        ]
    if isinstance(ours, dict):
        found += [("conditioned", ours.get("conditioned"), spec.conditioned)]
    return [
        f"the config says {repr(configured)[:80]} for {key}, the file holds {stored!r}: the file's value is used"
        for key, configured, stored in found
        if configured is not None and configured != stored
    ]
