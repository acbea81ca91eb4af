"""CUDA graphs: the kernels of a function recorded once and launched together from then on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
REHEARSALS = 2  # libraries choose kernels and reserve memory in their first calls, which a graph must not record


class Capture(Protocol):
    """Records what a function does to fixed tensors."""

    def __call__(self, body: Callable[[], T], state: Sequence[Tensor]) -> Callable[[], T]:
        """Returns what repeats `body` and hands out the same tensors each time, good until the next repetition.

        `body` reads and writes fixed tensors only and never waits for the device. `state` are the tensors it changes
        that must be as before when this returns.
        """
        ...


class CudaGraphs:
    """Captures into CUDA graphs that share their memory: what one hands out is good until any of them is replayed."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Callable[[], T], state: Sequence[Tensor]) -> Callable[[], T]:
        """Raises RuntimeError where `body` cannot be captured."""
        before = [tensor.clone() for tensor in state]
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(REHEARSALS):
                body()
                for tensor, value in zip(state, before, strict=True):
                    tensor.copy_(value)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = body()

        def replay() -> T:
            graph.replay()
            return out

        return replay
