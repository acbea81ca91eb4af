"""slerp: spherical interpolation between the base and one other model."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from bot.merge.methods.gram import Vector, combination, gram

STRAIGHT_COSINE = 0.9995  # above this cosine the arc is a straight line for all purposes; mergekit's constant
TINY_NORM = 1e-8


def slerp(x: Sequence[Tensor], b: Tensor, *, t: float) -> Tensor:
    """sin((1-t)th)/sin(th) b + sin(t th)/sin(th) x, th the angle between the flattened tensors.

    K. Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985. Colinear or antipodal: (1-t) b + t x.
    """
    return combination([b, x[0]], coefficients(gram([b, x[0]]), t))


def coefficients(g: Vector, t: float) -> tuple[float, float]:
    """The factors of base and other, from their Gram matrix; a zero tensor counts as orthogonal."""
    product, norm_a, norm_c = g[0, 1], math.sqrt(g[0, 0]), math.sqrt(g[1, 1])
    safe_a = norm_a if norm_a > TINY_NORM else 1.0
    safe_c = norm_c if norm_c > TINY_NORM else 1.0
    cosine = max(-1.0, min(1.0, product / safe_a / safe_c))
    if abs(cosine) > STRAIGHT_COSINE:
        return 1 - t, t
    theta = math.acos(cosine)
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)
