"""Every merge method once more, slowly, in float64, element by element where that is clearest.

Written from merging.md 2 and independent of `bot.merge.methods`: flat Python lists and plain loops, no
selection by threshold, no coefficient space. Inputs are numpy arrays of one shape, in float64 if not said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

A = NDArray[np.float64]


def norm(v: A) -> float:
    return math.sqrt(math.fsum(float(e) * float(e) for e in v.ravel()))


def inner(v: A, u: A) -> float:
    return math.fsum(float(a) * float(c) for a, c in zip(v.ravel(), u.ravel(), strict=True))


def linear(x: Sequence[A], b: None, *, weight: Sequence[float], normalize: bool) -> A:
    out = sum((w * v for w, v in zip(weight, x, strict=True)), start=np.zeros_like(x[0]))
    return out / sum(weight) if normalize else out


def passthrough(x: Sequence[A], b: None, *, scale: Sequence[float | None]) -> A:
    return x[0] if scale[0] is None else x[0] * scale[0]


def slerp(x: Sequence[A], b: A, *, t: float) -> A:
    na, nc = (n if n > 1e-8 else 1.0 for n in (norm(b), norm(x[0])))
    q = min(1.0, max(-1.0, inner(b / na, x[0] / nc)))
    if abs(q) > 0.9995:
        return (1 - t) * b + t * x[0]
    th = math.acos(q)
    return (math.sin((1 - t) * th) * b + math.sin(t * th) * x[0]) / math.sin(th)


def _arc(v: A, u: A, t: float) -> A:
    q = min(1.0, max(-1.0, inner(v / max(norm(v), 1e-7), u / max(norm(u), 1e-7))))
    if 1 - q * q <= 6e-8:
        return (1 - t) * v + t * u
    th = math.acos(q)
    return (math.sin((1 - t) * th) * v + math.sin(t * th) * u) / math.sin(th)


def nuslerp(
    x: Sequence[A], b: A | None, *, weight: Sequence[float], nuslerp_flatten: bool, nuslerp_row_wise: bool
) -> A:
    t = 0.5 if abs(sum(weight)) < 1e-6 else weight[1] / sum(weight)
    v, u = (e if b is None else e - b for e in x)
    if nuslerp_flatten:
        out = _arc(v, u, t)
    else:
        axis = 0 if nuslerp_row_wise else -1
        v, u = np.moveaxis(v, axis, -1), np.moveaxis(u, axis, -1)
        out = np.empty_like(v)
        for at in np.ndindex(v.shape[:-1]):
            out[at] = _arc(v[at], u[at], t)
        out = np.moveaxis(out, -1, axis)
    return out if b is None else out + b


def multislerp(x: Sequence[A], b: A | None, *, weight: Sequence[float], normalize_weights: bool, eps: float) -> A:
    if len(x) == 1:
        return x[0]
    v = [e if b is None else e - b for e in x]
    w = [e / sum(weight) for e in weight] if normalize_weights else list(weight)
    n = [norm(e) for e in v]
    y = [e / (k + eps) for e, k in zip(v, n, strict=True)]
    m = sum((k * e for k, e in zip(w, y, strict=True)), start=np.zeros_like(v[0]))
    if norm(m) < 1e-6:
        out = sum((k * e for k, e in zip(w, v, strict=True)), start=np.zeros_like(v[0]))
    else:
        m = m / norm(m)
        tau = sum((k * (e - inner(e, m) * m) for k, e in zip(w, y, strict=True)), start=np.zeros_like(m))
        phi = norm(tau) + eps
        out = (m * math.cos(phi) + tau * math.sin(phi) / phi) * sum(k * e for k, e in zip(w, n, strict=True))
    return out if b is None else out + b


def karcher(x: Sequence[A], b: None, *, max_iter: int, tol: float) -> A:
    if len(x) == 1:
        return x[0]
    n = [norm(e) for e in x]
    y = [e / k for e, k in zip(x, n, strict=True) if k > tol]
    if not y:
        return np.zeros_like(x[0])
    mu = sum(y, start=np.zeros_like(x[0])) / len(y)
    mu = y[0] if norm(mu) < tol else mu / norm(mu)
    for _ in range(max_iter):
        step = np.zeros_like(mu)
        for e in y:
            q = min(1.0, max(-1.0, inner(mu, e)))
            th = math.acos(q)
            if th >= tol and math.pi - th >= 1e-4:
                step = step + th / math.sin(th) * (e - q * mu) / len(y)
        if norm(step) < tol:
            break
        mu = math.cos(norm(step)) * mu + math.sin(norm(step)) * step / norm(step)
        mu = mu / norm(mu)
    return mu * sum(n) / len(n)


def _order(d: A) -> list[int]:
    """Indices by falling magnitude, equal ones by index."""
    return sorted(range(d.size), key=lambda i: (-abs(float(d.flat[i])), i))


def _only(d: A, kept: Sequence[int]) -> A:
    out = np.zeros_like(d)
    for i in kept:
        out.flat[i] = d.flat[i]
    return out


def _stream(key: int, count: int) -> list[float]:
    mask, out = 2**64 - 1, []
    for i in range(count):
        z = (key + (i + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(((z ^ (z >> 31)) >> 40) * 2.0**-24)
    return out


def _masked(method: str, d: A, i: int, p: dict[str, Any]) -> A:
    density = p["density"][i] if "density" in p else 1.0
    if density >= 1:
        return d
    n = d.size
    if method == "ties":
        return _only(d, _order(d)[: max(1, int(density * n)) if density else 0])
    if method.startswith("breadcrumbs"):
        top, keep = int(p["gamma"][i] * n), int(density * n)
        bottom = max(0, n - keep - top)
        return _only(d, _order(d)[::-1][bottom : bottom + keep])
    draws = _stream(p["keys"][i], n)
    if method.startswith("dare"):
        return _only(d, [j for j in range(n) if draws[j] < density])
    eps, width = p["epsilon"][i], d.shape[-1]
    kept = []
    for j in range(n):
        row = d.reshape(-1, width)[j // width]
        rank = sum(abs(e) < abs(d.flat[j]) for e in row)
        chance = density if width == 1 else density - eps + 2 * eps * rank / (width - 1)
        if density > 0 and draws[j] < chance:
            kept.append(j)
    return _only(d, kept)


def task_vectors(method: str, x: Sequence[A], b: A, **p: Any) -> A:
    votes = []
    for i, e in enumerate(x):
        d = e - b
        m = _masked(method, d, i, p)
        whole, rest = np.abs(d).sum(), np.abs(m).sum()
        scale = whole / rest if p.get("rescale") and whole >= 1e-7 and rest >= 1e-7 else 1.0
        votes.append(p["weight"][i] * scale * m)
    out = b.copy()
    elects = method.endswith("ties") or method == "della"
    for j in range(b.size):
        cast = [float(v.flat[j]) for v in votes]
        total, size = sum(cast), sum(abs(v) for v in cast)
        weights = p["weight"]
        if elects:
            sign = 1 if total >= 0 or abs(total) <= 1e-6 * size else -1
            agree = [v * sign > 0 for v in cast]
            total = sum(v for v, a in zip(cast, agree, strict=True) if a)
            weights = [w for w, a in zip(weights, agree, strict=True) if a]
        divisor = sum(weights)
        if p["normalize"] and abs(divisor) >= (0 if elects else 1e-8) and divisor != 0:
            total /= divisor
        out.flat[j] += p["lambda"] * total
    return out


def model_stock(x: Sequence[A], b: A, *, filter_wise: bool) -> A:
    if filter_wise and b.ndim > 1:
        rows = [model_stock([e[i] for e in x], b[i], filter_wise=True) for i in range(len(b))]
        return np.stack(rows)
    d = [e - b for e in x]
    n = len(x)
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    q = sum(min(1.0, max(-1.0, inner(d[i], d[j]) / max(norm(d[i]) * norm(d[j]), 1e-6))) for i, j in pairs) / len(pairs)
    t = 0.0 if abs(1 + (n - 1) * q) < 1e-6 else n * q / (1 + (n - 1) * q)
    return t * sum(x, start=np.zeros_like(b)) / n + (1 - t) * b


def nearswap(x: Sequence[A], b: A, *, t: float) -> A:
    w = np.clip(t / np.maximum(np.abs(b - x[0]), 1e-6), 0, 1)
    return w * x[0] + (1 - w) * b


def arcee_fusion(x: Sequence[A], b: A) -> A:
    """Importances in float32, as the method says: the divergence of close rows is rounding noise."""
    tuned, base = torch.from_numpy(x[0]).float(), torch.from_numpy(b).float()
    p, q = (torch.softmax(e, -1) + 1e-8 for e in (tuned, base))
    importance = (tuned - base).abs() * ((p / q).log() * p).sum(-1, keepdim=True)
    ordered = importance.flatten().sort().values
    median, low, high = (float(ordered[int(f * (len(ordered) - 1))]) for f in (0.5, 0.25, 0.75))
    return np.where((importance >= median + 1.5 * (high - low)).numpy(), x[0], b)


def sce(x: Sequence[A], b: A, *, select_topk: float) -> A:
    d = [e - b for e in x]
    if select_topk < 1:
        variance = np.var(np.stack(d), axis=0)
        k = int(int((variance != 0).sum()) * select_topk)
        d = [_only(e, _order(variance)[:k]) for e in d]
    energy = [float((e * e).mean()) for e in d]
    g = [1 / len(d)] * len(d) if sum(energy) < 1e-6 else [e / sum(energy) for e in energy]
    out = b.copy()
    for j in range(b.size):
        cast = [float(e.flat[j]) for e in d]
        total = sum(cast)
        sign = 1 if total >= 0 or abs(total) <= 1e-6 * sum(abs(v) for v in cast) else -1
        agree = [v * sign > 0 for v in cast]
        top = sum(k * v for k, v, a in zip(g, cast, agree, strict=True) if a)
        out.flat[j] += top / max(sum(k for k, a in zip(g, agree, strict=True) if a), 1e-6)
    return out


def ram(x: Sequence[A], b: A, *, epsilon: float, r: float = 0.0, alpha: float = 0.0) -> A:
    d = [e - b for e in x]
    on = [np.abs(e) > epsilon for e in d]
    count = sum(o.astype(int) for o in on)
    total = np.zeros_like(b)
    for e, o in zip(d, on, strict=True):
        rho = (o & (count > 1)).sum() / max((o & (count == 1)).sum(), epsilon or 1e-300)
        total += np.where(o, e * np.where(count == 1, 1 + r * min(max(rho, 0), alpha), 1), 0)
    return b + total / np.maximum(count, 1)
