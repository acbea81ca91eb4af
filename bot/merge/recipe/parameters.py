"""Which value a setting has for one tensor. merging.md 1.3.

Resolution is by level, first hit wins: source, slice, module, recipe, the method's default. A level whose
conditions do not match falls through to the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bot.merge.methods import Absent, Parameter
from bot.merge.recipe.spec import Conditions, Gradient, Parameters, Scalar


def resolve(parameter: Parameter, levels: Iterable[Parameters], tensor: str, u: float) -> Scalar | Absent:
    """The value of `parameter` for `tensor` at layer position `u` in [0, 1].

    `Absent.REQUIRED` means that no level gives a value and the method has none; `Absent.NONE` that it stays unset.
    """
    value = written(parameter.name, levels, tensor)
    if value is None:
        return parameter.default
    return at(value.values, u) if isinstance(value, Gradient) else value


def written(name: str, levels: Iterable[Parameters], tensor: str) -> Scalar | Gradient | None:
    """The recipe's value of the parameter `name` for `tensor`: the first level's that applies, None without one."""
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
    """Layer position u of layer `layer` of a slice of `layers`: 0 for the first, 1 for the last (and an only one)."""
    return layer / (layers - 1) if layers > 1 else 1.0


def at(gradient: Sequence[Scalar], u: float) -> Scalar:
    """Value of a gradient at `u`: linear between neighbours, the element at int(u*k) where entries are not numbers."""
    s = u * (len(gradient) - 1)
    j = int(s)
    low, high = gradient[j], gradient[min(len(gradient) - 1, j + 1)]
    if any(isinstance(value, bool | str) for value in gradient):
        return low
    return (1 - (s - j)) * float(low) + (s - j) * float(high)
