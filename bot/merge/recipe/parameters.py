"""Values of parameters for single tensors. docs/design/merging.md 1.3.

The first level with a value wins: source, slice, module, recipe, the method's default. A level whose conditions do not
match is skipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bot.merge.methods import Absent, Parameter
from bot.merge.recipe.spec import Conditions, Gradient, Parameters, Scalar


def resolve(parameter: Parameter, levels: Iterable[Parameters], tensor: str, u: float) -> Scalar | Absent:
    """The value of `parameter` for `tensor` at layer position `u` in [0, 1].

    `Absent.REQUIRED`: neither a level nor the method has a value. `Absent.NONE`: the parameter stays unset.
    """
    value = written(parameter.name, levels, tensor)
    if value is None:
        return parameter.default
    return at(value.values, u) if isinstance(value, Gradient) else value


def written(name: str, levels: Iterable[Parameters], tensor: str) -> Scalar | Gradient | None:
    """The value of the parameter `name` for `tensor` at the first level that has one, else None."""
    for level in levels:
        setting = level.get(name)
        if not isinstance(setting, Conditions):
            if setting is not None:
                return setting
            continue
        match = next((item for item in setting.items if item.filter is None or item.filter in tensor), None)
        if match is not None:
            return match.value
    return None


def position(layer: int, layers: int) -> float:
    """Position u of layer `layer` in a slice of `layers`: 0 for the first, 1 for the last (and for a single layer)."""
    return layer / (layers - 1) if layers > 1 else 1.0


def at(gradient: Sequence[Scalar], u: float) -> Scalar:
    """Value of a gradient at `u`: linear between neighbours, the element at int(u*k) where entries are not numbers."""
    s = u * (len(gradient) - 1)
    j = int(s)
    low, high = gradient[j], gradient[min(len(gradient) - 1, j + 1)]
    if any(isinstance(value, bool | str) for value in gradient):
        return low
    return (1 - (s - j)) * float(low) + (s - j) * float(high)
