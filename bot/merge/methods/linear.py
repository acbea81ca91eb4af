"""linear and passthrough."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def linear(x: Sequence[Tensor], b: None, *, weight: Sequence[float], normalize: bool) -> Tensor:
    """Weighted average sum(w_i x_i) / sum(w_i), or the bare sum. Model soups, arXiv:2203.05482.

    x: tensors of one shape. The division comes last, so that weights are not rounded twice.
    """
    out = torch.zeros_like(x[0])
    for x_i, w_i in zip(x, weight, strict=True):
        out.add_(x_i, alpha=w_i)
    return out.div_(sum(weight)) if normalize else out


def passthrough(x: Sequence[Tensor], b: None, *, scale: Sequence[float | None]) -> Tensor:
    """The only input, times `scale` where one is given. Depth up-scaling, cf. arXiv:2312.15166."""
    return x[0] if scale[0] is None else x[0] * scale[0]
