"""A plan in plain JSON values, for printing and for reports; the resolved values of any of its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from bot.errors import Refused
from bot.merge.recipe.spec import Condition, Conditions, Gradient, Parameters, Recipe, Scalar

if TYPE_CHECKING:
    from bot.merge.checkpoints.patches import Patch
    from bot.merge.planning.plan import Plan, Step
    from bot.merge.planning.work import Work
    from bot.merge.streaming.operation import Value

_CONDITIONS_SHOWN = 8  # the layer gradients of 2023 become one for every tensor


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
        "values": _parameter_values(plan),
        "notices": [{"code": n.code, "text": n.text, "count": n.count} for part in plan.parts for n in part.notices],
    }
    if plan.stages:
        out["stages"] = [
            {
                "name": str(ref),
                "method": stage.recipe.method,
                "plan_digest": stage.digest,
                "bytes_out": stage.bytes_out,
                "values": _parameter_values(stage),
            }
            for ref, stage in plan.stages
        ]
    return out


def values_of(plan: Plan, tensor: str) -> dict[str, object]:
    """Resolved recipe for one tensor: inputs, value of every parameter, shape and type.

    `stages` holds the same of every stage that has the tensor, by its name; if only one has it, that one alone is
    returned with its name as `stage`. Raises `bot.errors.Refused(TENSOR_MISSING)` with the nearest names for an unknown
    tensor.
    """
    found = [
        {**_values_of(step), **named}
        for part, named in (*((stage, {"stage": str(ref)}) for ref, stage in plan.stages), (plan, {}))
        for step in part.steps
        if step.name == tensor
    ]
    if not found:
        raise Refused(
            "TENSOR_MISSING",
            f"the output has no tensor {tensor[:120]!r}.",
            names_like(tensor, plan.steps),
            value=tensor,
        )
    return {**found[-1], "stages": found[:-1]} if found[:-1] else found[-1]


def _values_of(step: Step) -> dict[str, object]:
    work = step.work
    return {
        "tensor": work.name,
        "does": work.method if work.action == "merge" else work.action,
        "shape": list(work.shape),
        "dtype": work.dtype.name,
        "inputs": [
            {
                "model": str(operand.source),
                "tensor": operand.tensor.name,
                "dtype": operand.tensor.dtype.name,
                "base": i == work.base,
                **{name: values[i] for name, values in work.per_input.items() if values[i] is not None},
                **({} if operand.patch is None else {"adapter": _adapter(operand.patch)}),
            }
            for i, operand in enumerate(work.operands)
        ],
        "parameters": dict(work.shared),
        "rows_aligned": work.aligned is not None,
    }


def _adapter(patch: Patch) -> dict[str, object]:
    """Adapter tensors for one tensor, and the scale of their delta."""
    factors = [{"tensor": t.name, "dtype": t.dtype.name, "shape": list(t.shape)} for t in patch.reads]
    return {"model": str(patch.adapter), "scale": patch.scale, "tensors": factors}


def names_like(tensor: str, steps: Iterable[Step]) -> str:
    """Next step for an unknown tensor: the names that contain it or share its last parts."""
    names = [step.name for step in steps]
    for count in range(tensor.count(".") + 1):
        end = ".".join(tensor.split(".")[count:])
        close = [name for name in names if end and end in name]
        if close:
            more = f" and {len(close) - 3} more" if len(close) > 3 else ""
            return "Names like it: " + ", ".join(close[:3]) + more + "."
    return "Name one such as " + ", ".join(names[:3]) + "."


def _sources(plan: Plan) -> list[dict[str, object]]:
    """The models read from outside, by any part of the plan."""
    stages = {ref for ref, _ in plan.stages}
    roles: dict[str, dict[str, None]] = {}
    sizes: dict[str, int] = {}
    for source in (source for part in plan.parts for source in part.sources if source.model not in stages):
        roles.setdefault(str(source.model), {}).update(dict.fromkeys(source.roles))
        sizes[str(source.model)] = sum(size for size, _ in source.headers.values())
    return [{"model": model, "roles": list(names), "bytes": sizes[model]} for model, names in roles.items()]


def _dtype_bytes(steps: Iterable[Step]) -> dict[str, int]:
    out = Counter[str]()
    for step in steps:
        out[step.work.dtype.name] += step.nbytes
    return dict(out)


def _parameter_values(plan: Plan) -> dict[str, object]:
    """Values of all parameters. A parameter with several values: gradient or conditions as written, else the range."""
    spans: dict[tuple[str, str], tuple[Value, Value]] = {}
    for step in plan.steps:
        for key, value in _values(step.work):
            low, high = spans.get(key, (value, value))
            spans[key] = (min(low, value), max(high, value))
    out: dict[str, object] = {}
    for (name, model), (low, high) in spans.items():
        shown: object = low
        if low != high:
            shown = _as_written(plan.recipe, name, model) or {"lowest": low, "highest": high}
        out[f"{name} of {model}" if model else name] = shown
    return out


def _values(work: Work) -> Iterable[tuple[tuple[str, str], Value]]:
    """((parameter, model or ""), value) of one tensor."""
    yield from (((name, ""), value) for name, value in work.shared.items())
    for name, values in work.per_input.items():
        for operand, value in zip(work.operands, values, strict=True):
            if value is not None:
                yield (name, str(operand.source)), value


def _as_written(recipe: Recipe, name: str, model: str) -> object | None:
    """Gradient or conditions of a parameter; None if slices differ in them."""
    distinct: set[tuple[Condition, ...]] = set()
    for module in recipe.modules:
        for piece in module.slices:
            above = (piece.parameters, module.parameters, recipe.parameters)
            inputs = [one.parameters for one in recipe.inputs(module, piece)[0] if str(one.model) == model]
            distinct |= {_conditions(name, (own, *above)) for own in (inputs if model else [{}])}
    if len(distinct) != 1:
        return None
    [items] = distinct
    if len(items) == 1 and items[0].filter is None:
        return _plain(items[0].value)
    if not 0 < len(items) <= _CONDITIONS_SHOWN:
        return None
    return [({"filter": item.filter} if item.filter else {}) | {"value": _plain(item.value)} for item in items]


def _conditions(name: str, levels: Iterable[Parameters]) -> tuple[Condition, ...]:
    """Conditions of a parameter in the order of evaluation, up to the one that matches every tensor."""
    out: list[Condition] = []
    for level in levels:
        setting = level.get(name)
        if setting is not None:
            out += setting.items if isinstance(setting, Conditions) else [Condition(None, setting)]
        if any(item.filter is None for item in out):
            break
    return tuple(out)


def _plain(value: Scalar | Gradient) -> object:
    return list(value.values) if isinstance(value, Gradient) else value
