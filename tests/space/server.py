"""A Space in a process of its own: uvicorn on a free port, under settings given by its environment."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
START_S = 90.0


@contextmanager
def running_space(home: Path, hub: str, *, log: Path, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """The address of a Space whose database is in `home` and that asks `hub`; it runs no jobs unless told to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "TMPDIR") if key in os.environ}
    settings = {
        "MERGEBOT_HOME": str(home),
        "MERGEBOT_HUB": hub,
        "MERGEBOT_SCHEDULE": "false",
        "MERGEBOT_SUITE": "demo-skills",
        "PYTHONPATH": str(REPO),
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(home / "huggingface"),
    }
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "--factory",
        "space.app:create",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--log-level",
        "warning",
        "--timeout-graceful-shutdown",
        "1",
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=home, env=kept | settings | dict(environment or {}), stdout=output, stderr=subprocess.STDOUT
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, process, log)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once `/healthz` answers."""
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"the Space ended with {process.returncode}:\n{log.read_text()[-4000:]}")
        try:
            with urllib.request.urlopen(f"{address}/healthz", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise RuntimeError(f"the Space did not start within {START_S} s:\n{log.read_text()[-4000:]}")
