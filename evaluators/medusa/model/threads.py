"""Number of threads for a small model: on a shared machine, several can be slower than one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def steadiest_threads(device: str) -> Iterator[None]:
    """Use one thread where more are slower: on a shared machine threads that wait for each other cost tenfold."""
    threads = torch.get_num_threads()
    try:
        if device == "cpu" and threads > 1:
            together = _products_s()
            torch.set_num_threads(1)
            if together < _products_s():
                torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _products_s(products: int = 40, repeats: int = 5) -> float:
    """The median seconds of matrix products like those of a few tokens in a small model."""
    weight, rows = torch.ones(1536, 576), torch.ones(8, 576)
    spent = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(products):
            torch.nn.functional.linear(rows, weight)
        spent.append(time.perf_counter() - began)
    return sorted(spent)[repeats // 2]
