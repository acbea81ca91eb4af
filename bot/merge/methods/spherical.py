"""Averages on the sphere: nuslerp, multislerp, karcher."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bot.merge.methods.gram import Vector, combination, gram, length, row_dot

STRAIGHT_SINE2 = 6e-8  # 1 - cos^2 of a pair that float32 cannot tell from a straight line
TINY_NORM = 1e-7
ANTIPODAL = 1e-4
VANISHES = 1e-6


def nuslerp(
    x: Sequence[Tensor],
    b: Tensor | None,
    *,
    weight: Sequence[float],
    nuslerp_flatten: bool,
    nuslerp_row_wise: bool,
) -> Tensor:
    """Interpolation along the arc between two models, or between their deltas to a base; t = w_2 / (w_1 + w_2).

    Whole tensors as vectors, or (not flattened) vectors along the last dimension, or with row_wise along the first.
    """
    t = interpolation(weight)
    first, second = (x_i if b is None else x_i - b for x_i in x)
    if nuslerp_flatten:
        out = combination([first, second], flat_arc(gram([first, second]), t))
    else:
        across = nuslerp_row_wise and first.dim() > 1
        if across:
            first, second = first.transpose(0, -1).contiguous(), second.transpose(0, -1).contiguous()
        c_1, c_2 = arc(row_dot(first, first), row_dot(second, second), row_dot(first, second), t)
        out = first * c_1.to(first.dtype) + second * c_2.to(second.dtype)
        out = out.transpose(0, -1).contiguous() if across else out
    return out if b is None else out + b


def flat_arc(g: Vector, t: float) -> tuple[float, float]:
    """Factors of two vectors from their Gram matrix."""
    products = torch.from_numpy(g)
    first, second = arc(products[0, 0], products[1, 1], products[0, 1], t)
    return float(first), float(second)


def interpolation(weight: Sequence[float]) -> float:
    """t = w_2 / (w_1 + w_2), the middle if the weights cancel."""
    total = weight[0] + weight[1]
    return 0.5 if abs(total) < 1e-6 else weight[1] / total


def arc(square_1: Tensor, square_2: Tensor, product: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Factors of both ends (float64, elementwise) from squared lengths and inner product."""
    cosine = product / square_1.sqrt().clamp(min=TINY_NORM) / square_2.sqrt().clamp(min=TINY_NORM)
    cosine = cosine.clamp(-1, 1)
    straight = 1 - cosine**2 <= STRAIGHT_SINE2
    theta = torch.acos(cosine)
    sine = torch.where(straight, torch.ones_like(theta), torch.sin(theta))
    first = torch.where(straight, torch.full_like(theta, 1 - t), torch.sin((1 - t) * theta) / sine)
    second = torch.where(straight, torch.full_like(theta, t), torch.sin(t * theta) / sine)
    return first, second


def multislerp(
    x: Sequence[Tensor], b: Tensor | None, *, weight: Sequence[float], normalize_weights: bool, eps: float
) -> Tensor:
    """Weighted mean direction of any number of models, one step on the sphere, with their mean length.

    Cf. S. Buss and J. Fillmore, Spherical averages and applications to spherical splines, ACM TOG 2001. With a base
    it works on deltas. A single model is returned as it is.
    """
    if len(x) == 1:
        return x[0]
    v = [x_i if b is None else x_i - b for x_i in x]
    out = combination(v, one_step(gram(v), weight, normalize_weights, eps))
    return out if b is None else out.add_(b)


def one_step(g: Vector, weight: Sequence[float], normalize_weights: bool, eps: float) -> Vector:
    """Factors of the vectors of multislerp from their Gram matrix; a vanishing mean falls back to the weighted sum."""
    w = np.array(weight, dtype=np.float64)
    if normalize_weights:
        w = w / w.sum()
    norms = np.sqrt(np.diag(g))
    units = 1.0 / (norms + eps)
    mean = w * units
    size = length(g, mean)
    if size < VANISHES:
        return w
    mean = mean / size
    cosines = units * (g @ mean)
    tau = w * units - float(w @ cosines) * mean
    phi = length(g, tau) + eps
    result: Vector = (mean * math.cos(phi) + tau * math.sin(phi) / phi) * float(w @ norms)
    return result


def vanishes(g: Vector, weight: Sequence[float], normalize_weights: bool, eps: float) -> bool:
    """Whether the weighted mean direction is too short to be one."""
    w = np.array(weight, dtype=np.float64)
    return length(g, (w / w.sum() if normalize_weights else w) / (np.sqrt(np.diag(g)) + eps)) < VANISHES


def karcher(x: Sequence[Tensor], b: None, *, max_iter: int, tol: float) -> Tensor:
    """Riemannian centre of mass of the directions, times the mean length. arXiv:2603.04972.

    Tensors no longer than `tol` give no direction; none left: zeros.
    """
    if len(x) == 1:
        return x[0]
    return combination(x, centre(gram(x), max_iter, tol)[0])


def centre(g: Vector, max_iter: int, tol: float) -> tuple[Vector, bool]:
    """Factors of the vectors of karcher from their Gram matrix, and whether a vector opposite the mean was skipped."""
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
