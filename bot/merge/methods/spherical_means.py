"""multislerp and karcher: means of directions on the sphere, times a mean length."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from bot.merge.methods.linear import zero_sum
from bot.merge.methods.registry import WEIGHT, Base, Finding, Kind, Parameter, flag, merge_method
from bot.merge.streaming.operation import Operation

if TYPE_CHECKING:
    from bot.merge.streaming.inputs import Inputs, Kernel
    from bot.merge.streaming.sums import Vector

VANISHES = 1e-6  # length of a weighted mean direction that counts as zero
ANTIPODAL = 1e-4  # angle to the antipode of the mean within which a vector is skipped


def _check(operation: Operation, paths: Sequence[str]) -> Iterator[Finding]:
    return zero_sum(operation, "normalize_weights", "multislerp")


@merge_method(
    "multislerp",
    base=Base.OPTIONAL,
    inputs=(1, None),
    per_input=(WEIGHT,),
    shared=(flag("normalize_weights", True), Parameter("eps", 1e-8, low=0, low_open=True)),
    reference="S. Buss and J. Fillmore, Spherical averages and applications to spherical splines, ACM TOG 2001",
    check=_check,
)
def multislerp(inputs: Inputs) -> Kernel:
    """Weighted mean direction, one step on the sphere from it, times the mean length.

    With a base it works on deltas. A single model is returned unchanged.
    """
    from bot.merge.streaming.inputs import Chunk
    from bot.merge.streaming.sums import combined_deltas, gram

    if inputs.n == 1:
        return lambda chunk: chunk.x[0]
    weight, normalize, eps = inputs.values("weight"), inputs.flag("normalize_weights"), inputs.number("eps")
    g = gram(inputs, Chunk.deltas, inputs.n, weight)
    factors, vanishes = one_step(g, weight, normalize, eps)
    inputs.corner_case("MEAN_VANISHES", int(vanishes))
    return combined_deltas(factors)


def one_step(g: Vector, weight: Sequence[float], normalize: bool, eps: float) -> tuple[Vector, bool]:
    """Factors of the vectors from their Gram matrix, and True if the mean direction vanishes (then a weighted sum)."""
    import numpy as np

    from bot.merge.streaming.sums import length

    w = np.array(weight, dtype=np.float64)
    if normalize:
        w = w / w.sum()
    norms = np.sqrt(np.diag(g))
    units = 1.0 / (norms + eps)
    mean = w * units
    size = length(g, mean)
    if size < VANISHES:
        return w, True
    mean = mean / size
    cosines = units * (g @ mean)
    tau = w * units - float(w @ cosines) * mean
    phi = length(g, tau) + eps
    result: Vector = (mean * math.cos(phi) + tau * math.sin(phi) / phi) * float(w @ norms)
    return result, False


@merge_method(
    "karcher",
    base=Base.IGNORED,
    inputs=(1, None),
    shared=(Parameter("max_iter", 10, Kind.INTEGER, low=0), Parameter("tol", 1e-5, low=0, low_open=True)),
    reference="arXiv:2603.04972",
)
def karcher(inputs: Inputs) -> Kernel:
    """Riemannian centre of mass of the directions, times the mean length.

    Tensors no longer than `tol` give no direction; if none is left, the result is zeros.
    """
    from bot.merge.streaming.inputs import Chunk
    from bot.merge.streaming.sums import combined_deltas, gram

    if inputs.n == 1:
        return lambda chunk: chunk.tensors[0]
    g = gram(inputs, Chunk.deltas, inputs.n)
    factors, skipped = centre(g, int(inputs.number("max_iter")), inputs.number("tol"))
    inputs.corner_case("ANTIPODAL", int(skipped))
    return combined_deltas(factors)


def centre(g: Vector, max_iter: int, tol: float) -> tuple[Vector, bool]:
    """Factors of the vectors from their Gram matrix, and True if a vector opposite the mean was skipped."""
    import numpy as np

    from bot.merge.streaming.sums import length

    norms = np.sqrt(np.diag(g))
    part = norms > tol
    if not part.any():
        return np.zeros(len(g)), False
    share = 1.0 / part.sum()
    unit = np.where(part, 1.0 / np.where(part, norms, 1.0), 0.0)
    mu = share * unit
    if length(g, mu) < tol:
        mu = np.where(np.arange(len(norms)) == int(part.argmax()), unit, 0.0)
    mu = mu / length(g, mu)
    skipped = False
    for _ in range(max_iter):
        cosines = np.clip(unit * (g @ mu), -1.0, 1.0)
        angles = np.arccos(cosines)
        use = part & (angles >= tol) & (math.pi - angles >= ANTIPODAL)
        skipped |= bool((part & (math.pi - angles < ANTIPODAL)).any())
        pull = np.where(use, share * angles / np.where(use, np.sin(angles), 1.0), 0.0)
        tangent = pull * unit - float(pull @ cosines) * mu
        size = length(g, tangent)
        if size < tol:
            break
        mu = math.cos(size) * mu + math.sin(size) * tangent / size
        mu = mu / length(g, mu)
    result: Vector = mu * norms.mean()
    return result, skipped
