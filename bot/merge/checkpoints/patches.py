"""Changes that an adapter makes to single stored tensors; `operands/lora_rows.py` has the arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bot.merge.checkpoints.header import TensorInfo
from bot.merge.recipe.spec import ModelRef


@dataclass(frozen=True, slots=True)
class LowRank:
    """The change of a stored weight W of shape (rows, cols) by an adapter: `scale` times the product of two factors.

    `a` (r, in) and `b` (out, r) lie in the folder of `adapter`. The sum is `W + scale * b a`; `transposed` where W is
    stored (in, out), as embeddings and GPT-2's Conv1D are: `W + scale * (b a)^T`. With a `magnitude` (out) every
    output's vector is then scaled to that length (DoRA). Convolutions count as matrices (out, everything else).
    """

    adapter: ModelRef
    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool = False
    magnitude: TensorInfo | None = None

    @property
    def reads(self) -> tuple[TensorInfo, ...]:
        """The adapter's tensors to read."""
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)


@dataclass(frozen=True, slots=True)
class Addend:
    """A vector that an adapter adds to a stored bias of the same shape: `bias + scale * vector` (PEFT's lora_bias)."""

    adapter: ModelRef
    vector: TensorInfo
    scale: float

    @property
    def reads(self) -> tuple[TensorInfo, ...]:
        """The adapter's tensor to read."""
        return (self.vector,)


@dataclass(frozen=True, slots=True)
class NewRows:
    """Rows of a stored matrix (rows, cols) that an adapter replaces: row `rows[i]` becomes row i of `values`."""

    adapter: ModelRef
    values: TensorInfo
    rows: tuple[int, ...]
    scale: float = 1.0

    @property
    def reads(self) -> tuple[TensorInfo, ...]:
        """The adapter's tensor to read."""
        return (self.values,)


Patch = LowRank | Addend | NewRows


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a weight taken as a matrix: its first dimension, and all others together."""
    return (shape[0] if shape else 1, math.prod(shape[1:]))
