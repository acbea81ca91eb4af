"""Views of stored weights with a LoRA adapter applied chunk by chunk, without the whole sum or product in memory.

    W + s B A              LoRA, arXiv:2106.09685; s = alpha/r, or alpha/sqrt(r): rsLoRA, arXiv:2312.03732
    m_o (W + s B A)_o / |(W + s B A)_o|     for every output o: DoRA, arXiv:2402.09353

    bias + s b             PEFT's lora_bias
    single rows replaced   PEFT's trainable tokens

All arithmetic uses the compute dtype (float32; float64 for float64 tensors); the worker rounds once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bot.merge.checkpoints.checkpoint import LocalFiles
from bot.merge.checkpoints.header import TensorInfo
from bot.merge.checkpoints.patches import Addend, LowRank, NewRows, Patch, as_matrix
from bot.merge.execution.views import StoredView
from bot.merge.streaming.inputs import View
from bot.merge.streaming.operation import CHUNK


def patched(weight: View, patch: Patch, tensors: Callable[[TensorInfo], Tensor]) -> View:
    """View of a weight with its adapter; `tensors` reads a tensor of the adapter, flat, in the compute dtype."""
    if isinstance(patch, Addend):
        return AddedView(weight, patch, tensors)
    return RowsView(weight, patch, tensors) if isinstance(patch, NewRows) else PatchedView(weight, patch, tensors)


class AddedView:
    """View of a bias plus a scaled vector."""

    unit = 1

    def __init__(self, bias: View, patch: Addend, tensors: Callable[[TensorInfo], Tensor]) -> None:
        self.shape = bias.shape
        self._bias, self._added = bias, tensors(patch.vector) * patch.scale

    def read(self, start: int, stop: int) -> Tensor:
        return self._bias.read(start, stop) + self._added[start:stop]


class RowsView:
    """View of a matrix with single rows replaced. Its unit is a row."""

    def __init__(self, weight: View, patch: NewRows, tensors: Callable[[TensorInfo], Tensor]) -> None:
        self.shape = weight.shape
        self.unit = max(1, as_matrix(weight.shape)[1])
        self._weight = weight
        self._rows = torch.tensor(patch.rows, dtype=torch.int64)
        self._values = tensors(patch.values).reshape(len(patch.rows), self.unit)

    def read(self, start: int, stop: int) -> Tensor:
        first, last = start // self.unit, -(-stop // self.unit)
        out = self._weight.read(first * self.unit, last * self.unit).reshape(last - first, self.unit)
        here = (self._rows >= first) & (self._rows < last)
        out[self._rows[here] - first] = self._values[here]
        return out.reshape(-1)[start - first * self.unit : stop - first * self.unit]


class PatchedView:
    """View of a weight with a low-rank adapter. Its unit is a row of the stored matrix."""

    def __init__(self, weight: View, patch: LowRank, tensors: Callable[[TensorInfo], Tensor]) -> None:
        self.shape = weight.shape
        self._weight, self._patch, self._tensors = weight, patch, tensors
        self.unit = max(1, as_matrix(weight.shape)[1])
        self._factors: tuple[Tensor, Tensor] | None = None
        self._lengths: Tensor | None = None  # DoRA's factor per column, where outputs are columns

    def read(self, start: int, stop: int) -> Tensor:
        width = self.unit
        first, last = start // width, -(-stop // width)
        rows = self._rows(first, last)
        if self._patch.magnitude is not None:
            rows = self._scaled(rows, first, last)
        return rows.reshape(-1)[start - first * width : stop - first * width]

    def _rows(self, first: int, last: int) -> Tensor:
        """Rows [first, last) of the weight plus the product, before any scaling."""
        left, right = self._factor_pair()
        stored = self._weight.read(first * self.unit, last * self.unit).reshape(last - first, self.unit)
        return torch.addmm(stored, left[first:last], right, alpha=self._patch.scale)

    def _factor_pair(self) -> tuple[Tensor, Tensor]:
        """Return the factors as (rows, r) and (r, columns) of the stored matrix."""
        if self._factors is None:
            patch = self._patch
            rank = patch.a.shape[0]
            a, b = self._tensors(patch.a).reshape(rank, -1), self._tensors(patch.b).reshape(-1, rank)
            self._factors = (a.T.contiguous(), b.T.contiguous()) if patch.transposed else (b, a)
        return self._factors

    def _scaled(self, rows: Tensor, first: int, last: int) -> Tensor:
        assert self._patch.magnitude is not None
        magnitude = self._tensors(self._patch.magnitude).reshape(-1)
        if not self._patch.transposed:
            lengths = rows.double().square().sum(1).sqrt()
            return rows * _ratio(magnitude[first:last], lengths)[:, None]
        if self._lengths is None:
            self._lengths = _ratio(magnitude, self._column_lengths())
        return rows * self._lengths

    def _column_lengths(self) -> Tensor:
        """Euclidean length per column of the sum, float64: one pass over the tensor."""
        height = self.shape[0]
        step = max(1, CHUNK // self.unit)
        squares = torch.zeros(self.unit, dtype=torch.float64)
        for first in range(0, height, step):
            squares += self._rows(first, min(height, first + step)).double().square().sum(0)
        return squares.sqrt()


def stored_tensor(files: LocalFiles, tensor: TensorInfo, wide: torch.dtype) -> Tensor:
    """Read a whole small tensor, flat, in the compute dtype."""
    return StoredView(files, tensor, wide).read(0, tensor.elements).clone()


def _ratio(magnitude: Tensor, lengths: Tensor) -> Tensor:
    """Return magnitude / length; 0 for a vector of zeros."""
    return torch.where(lengths > 0, magnitude / lengths, torch.zeros_like(lengths)).to(magnitude.dtype)
