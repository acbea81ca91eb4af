"""slerp: spherical interpolation between the base and one model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from bot.merge.methods.registry import Absent, Base, Finding, Missing, Parameter, merge_method
from bot.merge.streaming.operation import Operation

if TYPE_CHECKING:
    from torch import Tensor

    from bot.merge.streaming.inputs import Chunk, Inputs, Kernel
    from bot.merge.streaming.sums import Vector

STRAIGHT_COSINE = 0.9995  # above this cosine the arc counts as a straight line; mergekit's constant
TINY_NORM = 1e-8


def _check(operation: Operation, paths: Sequence[str]) -> Iterator[Finding]:
    t = operation.shared["t"]
    if not 0 <= t <= 1:
        yield Finding("EXTRAPOLATES", f"t = {t:g} in {operation.name} is outside [0, 1]")


@merge_method(
    "slerp",
    base=Base.REQUIRED,
    inputs=(1, 1),
    shared=(Parameter("t", Absent.REQUIRED),),
    missing=Missing.ONE,
    reference="K. Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985",
    check=_check,
)
def slerp(inputs: Inputs) -> Kernel:
    """sin((1-t) th)/sin(th) b + sin(t th)/sin(th) x, with the angle th between the flattened tensors.

    Colinear or antipodal tensors: (1-t) b + t x. A zero tensor counts as orthogonal.
    """
    import numpy as np

    from bot.merge.streaming.sums import combination, gram

    def ends(chunk: Chunk) -> list[Tensor]:
        return [chunk.b, *chunk.x]

    g = gram(inputs, ends, 2)
    inputs.corner_case("ZERO_TENSOR", int(bool((np.diag(g) <= TINY_NORM**2).any())))
    factors = coefficients(g, inputs.number("t"))
    return lambda chunk: combination(ends(chunk), factors)


def coefficients(g: Vector, t: float) -> tuple[float, float]:
    """Factors of base and model from their Gram matrix (2, 2)."""
    product, norm_a, norm_c = g[0, 1], math.sqrt(g[0, 0]), math.sqrt(g[1, 1])
    safe_a = norm_a if norm_a > TINY_NORM else 1.0
    safe_c = norm_c if norm_c > TINY_NORM else 1.0
    cosine = max(-1.0, min(1.0, product / safe_a / safe_c))
    if abs(cosine) > STRAIGHT_COSINE:
        return 1 - t, t
    theta = math.acos(cosine)
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)
