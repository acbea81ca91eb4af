"""Merge methods as pure functions of whole tensors: the reference every faster path is held against.

The functions in FUNCTIONS run in tests only. What merges is `bot.merge.passes`, which takes from these modules their
constants and the functions that give coefficients, shares and masks, so that a rule stands in one place.

Each takes the inputs x (without the base), the base b (None where the method has none) and its parameters by name,
one per input or shared, and returns a tensor of the inputs' shape. Tensors come in float32, or float64 when an input
is float64; rounding to the output type is the engine's, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from bot.merge.methods.choice import arcee_fusion, nearswap
from bot.merge.methods.linear import linear, passthrough
from bot.merge.methods.model_stock import model_stock
from bot.merge.methods.shares import ram, ramplus_tl, sce
from bot.merge.methods.slerp import slerp
from bot.merge.methods.spherical import karcher, multislerp, nuslerp
from bot.merge.methods.task_vectors import FAMILY

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    **FAMILY,
    "linear": linear,
    "passthrough": passthrough,
    "slerp": slerp,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "model_stock": model_stock,
    "nearswap": nearswap,
    "arcee_fusion": arcee_fusion,
    "sce": sce,
    "ram": ram,
    "ramplus_tl": ramplus_tl,
}


def apply(
    method: str,
    tensors: Sequence[Tensor],
    base: int | None,
    per_input: Mapping[str, Sequence[float | int | bool | None]],
    shared: Mapping[str, float | int | bool],
    keys: Sequence[int] = (),
) -> Tensor:
    """Run `method` on inputs of one shape; `base` is the position of the base among them."""
    others = [i for i in range(len(tensors)) if i != base]
    values: dict[str, object] = {name: [column[i] for i in others] for name, column in per_input.items()}
    values.update({"lambda_" if name == "lambda" else name: value for name, value in shared.items()})
    if keys:
        values["keys"] = [keys[i] for i in others]
    return FUNCTIONS[method]([tensors[i] for i in others], None if base is None else tensors[base], **values)
