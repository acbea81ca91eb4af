"""Carry out row maps: the matrices of the sources in the order of the output's vocabulary. See `rows.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bot.merge.rows import RowMap


def gather(maps: Sequence[RowMap], matrices: Sequence[Tensor]) -> list[Tensor]:
    """One tensor per map. `matrices` (rows_i, ...) are floating point; map i belongs to matrix i."""
    return [_one(row_map, matrices[i], matrices) for i, row_map in enumerate(maps)]


def _one(row_map: RowMap, mine: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    out = mine.new_zeros((len(row_map.own), *mine.shape[1:]))
    own = torch.from_numpy(row_map.own)
    have = own >= 0
    out[have] = mine[own[have]]
    if len(row_map.padding) and len(row_map.real):
        out[torch.from_numpy(row_map.padding)] = mine[torch.from_numpy(row_map.real)].double().mean(0).to(mine.dtype)
    for fill in row_map.fills:
        if not fill.matrices:
            continue
        taken = torch.from_numpy(fill.taken)
        total = sum((matrices[m][taken[:, j]].double() for j, m in enumerate(fill.matrices)), start=torch.tensor(0.0))
        out[torch.from_numpy(fill.rows)] = (total / len(fill.matrices)).to(mine.dtype)
    return out
