"""Fixtures every test may use. Tests start real servers and real processes; none of them reaches the internet."""

from __future__ import annotations

import os

# Two test processes with a thread per core each would fight over the cores; read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden merges and public benchmark data that lies beside the checkout."""
    folder = REPO.parent / "shared"
    if not (folder / "golden").is_dir():
        pytest.skip("the shared/ folder with golden merges and benchmark data is not beside this checkout")
    return folder


@pytest.fixture(autouse=True, scope="session")
def no_foreign_hosts() -> Iterator[None]:
    """Fail any test that resolves a host other than this machine (reliability.md, side traffic)."""
    real = socket.getaddrinfo

    def guarded(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in (None, "", "127.0.0.1", "localhost", "::1", "0.0.0.0", socket.gethostname()):
            raise AssertionError(f"a test tried to reach {name}")
        return real(host, *args, **kwargs)

    socket.getaddrinfo = guarded
    yield
    socket.getaddrinfo = real
