"""The methods as passes over tensors that are read piece by piece. merging.md 5.3.

A method is a function of the `Inputs` of one step. It makes the passes it needs (inner products, thresholds, norms)
and returns how to compute one piece of the result. The same algebra on whole tensors stands in `bot.merge.methods`,
which the tests hold these against.
"""

from __future__ import annotations

from collections.abc import Callable

from bot.merge.passes import combination, rowwise
from bot.merge.passes.elementwise import linear, nearswap, passthrough, ram, task_arithmetic
from bot.merge.passes.family import ELECTS, family
from bot.merge.passes.fusion import arcee_fusion
from bot.merge.passes.inputs import Emit, Inputs
from bot.merge.passes.shares import ramplus_tl, sce
from bot.merge.planning.memory import by_row

_WHOLE: dict[str, Callable[[Inputs], Emit]] = {
    **dict.fromkeys(ELECTS, family),
    "linear": linear, "passthrough": passthrough, "task_arithmetic": task_arithmetic, "nearswap": nearswap,
    "ram": ram, "ramplus_tl": ramplus_tl, "sce": sce, "arcee_fusion": arcee_fusion, "slerp": combination.slerp,
    "nuslerp": combination.nuslerp, "multislerp": combination.multislerp, "karcher": combination.karcher,
    "model_stock": combination.model_stock,
}  # fmt: skip
_BY_ROW: dict[str, Callable[[Inputs], Emit]] = {"nuslerp": rowwise.nuslerp, "model_stock": rowwise.model_stock}


def prepare(inputs: Inputs) -> Emit:
    """Make the passes the method needs; the result computes the pieces of the output, in order."""
    table = _BY_ROW if by_row(inputs.work) else _WHOLE
    return table[inputs.work.method](inputs)
