"""Choice between one thread and several: on a shared machine, several can be slower."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def steadiest_threads(device: str) -> Iterator[None]:
    """Use one thread inside the block if several are slower, as on a shared machine."""
    threads = torch.get_num_threads()
    try:
        if device == "cpu" and threads > 1:
            several_s = _products_s()
            torch.set_num_threads(1)
            if several_s < _products_s():
                torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _products_s(products: int = 40, repeats: int = 5) -> float:
    """Median seconds of matrix products of the size of a few tokens in a small model."""
    weight, rows = torch.ones(1536, 576), torch.ones(8, 576)
    spent = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(products):
            torch.nn.functional.linear(rows, weight)
        spent.append(time.perf_counter() - began)
    return sorted(spent)[repeats // 2]
