"""Storage types of tensors: safetensors code, torch name, bytes per element.

Planning must not import torch and reads this table instead. The codes are those of the safetensors format.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Dtype:
    """One storage type. `quantised` marks types whose values need a scale that is stored elsewhere."""

    code: str
    name: str
    itemsize: int
    floating: bool
    quantised: bool = False


_ALL = (
    Dtype("F64", "float64", 8, True),
    Dtype("F32", "float32", 4, True),
    Dtype("F16", "float16", 2, True),
    Dtype("BF16", "bfloat16", 2, True),
    Dtype("I64", "int64", 8, False),
    Dtype("I32", "int32", 4, False),
    Dtype("I16", "int16", 2, False),
    Dtype("I8", "int8", 1, False),
    Dtype("U8", "uint8", 1, False),
    Dtype("BOOL", "bool", 1, False),
    Dtype("U16", "uint16", 2, False),
    Dtype("U32", "uint32", 4, False),
    Dtype("U64", "uint64", 8, False),
    Dtype("F8_E4M3", "float8_e4m3fn", 1, True, quantised=True),
    Dtype("F8_E5M2", "float8_e5m2", 1, True, quantised=True),
)
BY_CODE = {dtype.code: dtype for dtype in _ALL}
BY_NAME = {dtype.name: dtype for dtype in _ALL}
MERGEABLE = ("float16", "bfloat16", "float32", "float64")


def promote(dtypes: Iterable[Dtype]) -> Dtype:
    """The floating type that holds all values of several types (float16 with bfloat16 gives float32)."""
    kinds = {dtype.name for dtype in dtypes}
    if len(kinds) == 1:
        return BY_NAME[kinds.pop()]
    return BY_NAME["float64" if "float64" in kinds else "float32"]
