"""One output tensor as its merge method sees it, and the sizes that bound its memory. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

CHUNK = 2**18  # elements per chunk, and per sum in one data type; part of the numerics version
GATHER_LIMIT = 2**22  # elements gathered around one threshold
MASK_LIMIT_BYTES = 2**25  # bits kept of one random mask; a longer mask is drawn twice

Value = float | int | bool


class Operand(Protocol):
    """An input tensor; `str(source)` names its model."""

    @property
    def source(self) -> object: ...


class Operation(Protocol):
    """A method with every parameter resolved, for one output tensor.

    `per_input` holds one value per operand, None for the base; `keys` the mask keys of methods that draw.
    """

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def elements(self) -> int: ...
    @property
    def operands(self) -> Sequence[Operand]: ...
    @property
    def base(self) -> int | None: ...
    @property
    def per_input(self) -> Mapping[str, tuple[Value | None, ...]]: ...
    @property
    def shared(self) -> Mapping[str, Value]: ...
    @property
    def keys(self) -> tuple[int, ...]: ...


def row_width(operation: Operation) -> int:
    """Elements per row: the size of the last dimension."""
    return max(1, operation.shape[-1]) if operation.shape else 1
