"""How recipes are written down here: functions that build the mapping a YAML file would hold."""

from __future__ import annotations

from typing import Any

Document = dict[str, Any]
Case = tuple[str, Document]


def flat(
    method: str,
    *models: tuple[str, Document] | str,
    base: str | None = None,
    parameters: Document | None = None,
    dtype: str = "float32",
    suffix: str = "",
    **top: Any,
) -> Document:
    """A recipe with `models:`; a model is a name or (name, its parameters). `suffix` is put behind every name."""
    return {
        "merge_method": method,
        "dtype": dtype,
        **({"base_model": ref(base + suffix)} if base else {}),
        "models": [_source(model, suffix) for model in models],
        **({"parameters": parameters} if parameters else {}),
        **top,
    }


def sliced(
    method: str,
    *slices: list[tuple[Any, ...]] | Document,
    base: str | None = None,
    parameters: Document | None = None,
    dtype: str = "float32",
    **top: Any,
) -> Document:
    """A recipe with `slices:`; a slice is a list of (name, first layer, end[, parameters]) or a whole mapping."""
    made = [part if isinstance(part, dict) else part_of(*part) for part in slices]
    return {
        "merge_method": method,
        "dtype": dtype,
        **({"base_model": ref(base)} if base else {}),
        "slices": made,
        **({"parameters": parameters} if parameters else {}),
        **top,
    }


def part_of(*sources: tuple[Any, ...], **more: Any) -> Document:
    """One slice from (name, first layer, end[, parameters]) of each source."""
    out: Document = {"sources": []}
    for name, start, stop, *own in sources:
        source: Document = {"model": ref(name), "layer_range": [start, stop]}
        if own:
            source["parameters"] = own[0]
        out["sources"].append(source)
    return {**out, **more}


def ref(name: str) -> str:
    return f"parents/{name}"


def _source(model: tuple[str, Document] | str, suffix: str) -> Document:
    if isinstance(model, str):
        return {"model": ref(model + suffix)}
    return {"model": ref(model[0] + suffix), "parameters": model[1]}


def w(weight: Any, **more: Any) -> Document:
    return {"weight": weight, **more}


def where(*conditions: tuple[str | None, Any]) -> list[Document]:
    """A setting by tensor name: (filter or None, value) each."""
    return [{**({"filter": name} if name is not None else {}), "value": value} for name, value in conditions]
