"""What a CUDA graph does, on a CPU: the operations of one call recorded, then repeated on the same tensors.

Whatever the host decided or read while recording is frozen, as in a graph; waiting for a value is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
FROM_DEVICE = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}
FROM_HOST = {aten.lift_fresh.default, aten.lift_fresh_copy.default}


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FROM_DEVICE:
            raise RuntimeError("the host waits for a value of the device")
        if func in FROM_HOST:
            raise RuntimeError("a tensor is made from values of the host")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Recorded:
    """A `Capture` that counts what it recorded."""

    def __init__(self) -> None:
        self.captures = 0

    def __call__(self, body: Callable[[], Any], state: Sequence[Tensor]) -> Callable[[], Any]:
        self.captures += 1
        before = [tensor.clone() for tensor in state]
        recorder = _Recorder()
        for mode in (contextlib.nullcontext(), recorder):  # rehearsed once: constants are made in the first call
            with mode:
                out = body()
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)

        def repeat() -> Any:
            for func, args, kwargs, recorded in recorder.calls:
                again = func(*args, **kwargs)
                for old, new in zip(_tensors(recorded), _tensors(again), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)
            return out

        return repeat


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
