"""Which elements of a delta survive: largest (ties), a middle band (breadcrumbs), chance (dare, della).

Random masks come from SplitMix64 keyed by seed, source and tensor (`planning/draws.py`), so element i of a tensor has
the same draw whatever the order, the chunking, the device or the number of threads. merging.md 1.7 and 2.2.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bot.merge.methods.reductions import first_largest
from bot.merge.planning.memory import CHUNK

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def splitmix64(key: int, start: int, count: int) -> NDArray[np.uint64]:
    """Elements start .. start+count-1 of the stream of `key`; element 0 of key 0 is 0xE220A8397B1DCDAF."""
    z = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z *= GOLDEN
        z += np.uint64(key)
        z ^= z >> np.uint64(30)
        z *= MIX_1
        z ^= z >> np.uint64(27)
        z *= MIX_2
        z ^= z >> np.uint64(31)
    return z


def uniform(key: int, count: int, first: int = 0) -> Tensor:
    """Elements first .. first+count-1 of the stream as numbers in [0, 1) with 24 bits each, float32, on the CPU."""
    out = np.empty(count, dtype=np.float32)
    for start in range(0, count, CHUNK):
        part = splitmix64(key, first + start, min(CHUNK, count - start))
        np.multiply(part >> np.uint64(40), 2.0**-24, out=out[start : start + len(part)], casting="unsafe")
    return torch.from_numpy(out)


def largest(delta: Tensor, density: float) -> Tensor:
    """Keep the max(1, int(density*n)) largest elements; of equal ones those of the lowest index."""
    if density >= 1:
        return delta
    flat = delta.reshape(-1)
    keep = first_largest(flat.abs(), kept(flat.numel(), density))
    return (flat * keep).reshape(delta.shape)


def kept(n: int, density: float) -> int:
    """How many of n elements ties keeps."""
    return max(1, int(density * n)) if density > 0 else 0


def middle(delta: Tensor, density: float, gamma: float) -> Tensor:
    """Drop the int(gamma*n) largest elements, of the rest keep the int(density*n) largest. arXiv:2312.06795."""
    if density >= 1:
        return delta
    flat = delta.reshape(-1)
    inner, outer = band(flat.numel(), density, gamma)
    sizes = flat.abs()
    inside = first_largest(sizes, outer) & ~first_largest(sizes, inner)
    return (flat * inside).reshape(delta.shape)


def band(n: int, density: float, gamma: float) -> tuple[int, int]:
    """Breadcrumbs keeps the elements that are among the `outer` largest and not among the `inner` largest of n."""
    keep = int(density * n)
    bottom = max(0, n - keep - int(gamma * n))
    return n - bottom - keep, n - bottom


def by_chance(delta: Tensor, density: float, key: int, first: int = 0) -> Tensor:
    """Keep each element with probability `density`; the delta's first element is number `first` of its tensor.

    DARE, arXiv:2311.03099.
    """
    if density >= 1:
        return delta
    keep = uniform(key, delta.numel(), first).double() < density
    return delta * keep.reshape(delta.shape).to(delta.device)


def by_rank(delta: Tensor, density: float, epsilon: float, key: int, first: int = 0) -> Tensor:
    """Keep with a probability that grows with the rank within the row. DELLA, arXiv:2406.11617.

    Rows of length m along the last dimension, rank r = number of strictly smaller magnitudes:
    p = density - epsilon + 2 epsilon r / (m - 1); a row of one element: p = density.
    """
    if density >= 1:
        return delta
    if density <= 0:
        return torch.zeros_like(delta)
    width = delta.shape[-1] if delta.dim() else 1
    sizes = delta.abs().reshape(-1, width)
    ranks = torch.searchsorted(sizes.sort(-1).values, sizes)
    if width > 1:
        p = (density - epsilon) + 2 * epsilon * ranks.double() / (width - 1)
    else:
        p = torch.full(ranks.shape, density, dtype=torch.float64, device=delta.device)
    draws = uniform(key, delta.numel(), first).to(delta.device).double().reshape(p.shape)
    return delta * (draws < p).reshape(delta.shape)
