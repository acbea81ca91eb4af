"""A plan in plain JSON values, for printing and for reports; the resolved values of any of its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from bot.errors import Refused

if TYPE_CHECKING:
    from bot.merge.planning.plan import Plan, Step
    from bot.merge.planning.work import Operand, Value


def summary(plan: Plan) -> dict[str, object]:
    """The plan in plain values. Bytes read, disk and memory are those of all stages together."""
    out: dict[str, object] = {
        "method": plan.recipe.method,
        "recipe_digest": plan.recipe.digest,
        "plan_digest": plan.digest,
        "sources": _sources(plan),
        "tensors": len(plan.steps),
        "layers": plan.layers,
        "parameters": plan.parameters,
        "dtypes": _dtype_bytes(plan.steps),
        "shards": [{"file": shard.file, "bytes": shard.nbytes} for shard in plan.shards],
        "copied_files": [copied.file for copied in plan.copies],
        "bytes_in": sum(part.bytes_in for part in plan.parts),
        "bytes_out": plan.bytes_out,
        "peak_memory_bytes": max(part.peak_memory_bytes for part in plan.parts),
        "disk_bytes": sum(part.disk_bytes for part in plan.parts),
        "values": _value_ranges(plan.steps),
        "notices": [
            {"code": n.code, "text": n.text, "count": n.count} for part in plan.parts for n in part.notices
        ],
    }  # fmt: skip
    if plan.stages:
        out["stages"] = [
            {"name": str(ref), "method": made.recipe.method, "plan_digest": made.digest, "bytes_out": made.bytes_out}
            for ref, made in plan.stages
        ]
    return out


def values_of(plan: Plan, tensor: str) -> dict[str, object]:
    """What the recipe comes to for one output tensor: inputs, the value of every parameter, shape and type.

    Raises `bot.errors.Refused(TENSOR_MISSING)` with the nearest names when the output has no such tensor.
    """
    step = next((step for step in plan.steps if step.name == tensor), None)
    if step is None:
        raise Refused(
            "TENSOR_MISSING",
            f"the output has no tensor {tensor[:120]!r}.",
            names_like(tensor, plan.steps),
            value=tensor,
        )
    work = step.work
    return {
        "tensor": work.name,
        "does": work.method if work.action == "merge" else work.action,
        "shape": list(work.shape),
        "dtype": work.dtype.name,
        "inputs": [
            {
                "model": _label(operand),
                "tensor": operand.tensor.name,
                "dtype": operand.tensor.dtype.name,
                "base": i == work.base,
                **{name: values[i] for name, values in work.per_input.items() if values[i] is not None},
            }
            for i, operand in enumerate(work.operands)
        ],
        "parameters": dict(work.shared),
        "rows_aligned": work.aligned is not None,
    }


def names_like(tensor: str, steps: Iterable[Step]) -> str:
    """A next step for a name no tensor has: the names that contain it or share its last parts."""
    names = [step.name for step in steps]
    for count in range(tensor.count(".") + 1):
        end = ".".join(tensor.split(".")[count:])
        close = [name for name in names if end and end in name]
        if close:
            more = f" and {len(close) - 3} more" if len(close) > 3 else ""
            return "Names like it: " + ", ".join(close[:3]) + more + "."
    return "Name one such as " + ", ".join(names[:3]) + "."


def _label(operand: Operand) -> str:
    return str(operand.source)


def _sources(plan: Plan) -> list[dict[str, object]]:
    """The models read from outside, by any part of the plan."""
    made = {ref for ref, _ in plan.stages}
    roles: dict[str, dict[str, None]] = {}
    sizes: dict[str, int] = {}
    for source in (source for part in plan.parts for source in part.sources if source.model not in made):
        roles.setdefault(str(source.model), {}).update(dict.fromkeys(source.roles))
        sizes[str(source.model)] = sum(size for size, _ in source.headers.values())
    return [{"model": model, "roles": list(given), "bytes": sizes[model]} for model, given in roles.items()]


def _dtype_bytes(steps: Iterable[Step]) -> dict[str, int]:
    out: dict[str, int] = {}
    for step in steps:
        out[step.work.dtype.name] = out.get(step.work.dtype.name, 0) + step.nbytes
    return out


def _value_ranges(steps: Iterable[Step]) -> dict[str, object]:
    """Lowest and highest resolved value of every parameter, per model where it is given per model."""
    spans: dict[str, list[float]] = {}
    for step in steps:
        for name, value in _values(step.work.operands, step.work.per_input, step.work.shared):
            low, high = spans.get(name, [value, value])
            spans[name] = [min(low, value), max(high, value)]
    return {name: span[0] if span[0] == span[1] else span for name, span in spans.items()}


def _values(
    operands: Iterable[Operand], per_input: Mapping[str, tuple[Value | None, ...]], shared: Mapping[str, Value]
) -> Iterable[tuple[str, float]]:
    labels = [_label(operand) for operand in operands]
    yield from ((name, float(value)) for name, value in shared.items())
    for name, values in per_input.items():
        for label, value in zip(labels, values, strict=True):
            if value is not None:
                yield f"{name} of {label}", float(value)
