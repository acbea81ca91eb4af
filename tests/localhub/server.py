"""A local Hub on a real loopback socket, for any test.

    def test_x(local_hub): ...           a fresh Hub for one test (fixture below; import it into a conftest.py)

    with running_hub(root) as hub:
        hub.url                      http://127.0.0.1:<port>
        hub.token_of("mergebot")     a write token; users: alice, bob, mergebot (admin of `mergebot-org`)
        hub.env(home)                environment of a child process that talks to this Hub and to nothing else
        hub.client(code, home)       runs Python code in such a child, returns what it printed as JSON
        hub.faults.add("GET", "/api/models/*", status=503, times=2)     the next two such requests fail (faults.py)

huggingface_hub, datasets and transformers read their settings when they are imported, so tests of *those* clients run
them in a child with `env()`: that is right whatever this process has imported before. Our own `bot.hub` takes its
endpoint and token as arguments and may be used in the test process itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bot.localhub import add_user
from bot.localhub.app import create_app
from bot.localhub.serve import running
from tests.localhub.faults import Faults

REPO = Path(__file__).resolve().parent.parent.parent
USERS = ("alice", "bob", "mergebot")
ORG = "mergebot-org"


@dataclass(frozen=True, slots=True)
class RunningHub:
    """A Hub that answers at `url` and keeps everything below `root`."""

    url: str
    root: Path
    faults: Faults = field(default_factory=lambda: Faults(None))  # no use when the Hub is another process

    def token_of(self, user: str) -> str:
        return token_of(user)

    def env(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The environment of hub.md 7; `home` holds the child's caches."""
        kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "TMPDIR") if key in os.environ}
        settings = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_EXPERIMENTAL_WARNING": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0" if token else "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPO),
        }
        return kept | settings | ({"HF_TOKEN": token} if token else {})

    def client(self, code: str, home: Path, user: str | None = None, *, timeout_s: float = 120) -> Any:
        """Run `code` in a child against this Hub. It sees `api` (an HfApi) and sets `result`, which is returned."""
        prelude = f"""
            import json, socket, sys
            real = socket.getaddrinfo
            def guarded(host, *args, **kwargs):
                name = host.decode() if isinstance(host, bytes) else host
                if name not in (None, "", "127.0.0.1", "localhost"):
                    raise AssertionError(f"tried to reach {{name}}")
                return real(host, *args, **kwargs)
            socket.getaddrinfo = guarded
            from huggingface_hub import HfApi
            HOME = {str(home)!r}
            api = HfApi()
            result = None
        """
        ending = '\nprint("RESULT " + json.dumps(result))\n'
        token = token_of(user) if user else None
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(code) + ending],
            env=self.env(home, token),
            cwd=REPO,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if done.returncode or not lines:
            raise AssertionError(
                f"the client failed ({done.returncode}):\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
            )
        return json.loads(lines[-1].removeprefix("RESULT "))

    def unknown(self) -> list[str]:
        """Requests below /api/ that the Hub has no route for."""
        with urllib.request.urlopen(f"{self.url}/_local/unknown") as answer:
            return list(json.load(answer))

    def journal(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.root / "journal.ndjson").read_text().splitlines()]


def token_of(user: str) -> str:
    return f"hf_{user}WriteTokenForTestsOnly0000"


def add_usual_users(root: Path) -> None:
    for user in USERS:
        add_user(root, user, token_of(user), orgs=(ORG,) if user == "mergebot" else ())


@contextmanager
def running_hub(root: Path, *, page_size: int = 100) -> Iterator[RunningHub]:
    """A Hub in a thread of this process: starts in milliseconds."""
    root.mkdir(parents=True, exist_ok=True)
    add_usual_users(root)
    faults = Faults(create_app(root, page_size=page_size, scripted_logins=True))
    with running(faults) as url:
        yield RunningHub(url, root, faults)


@pytest.fixture
def local_hub(tmp_path: Path) -> Iterator[RunningHub]:
    """A fresh Hub with the usual users and nothing on it; lists come in pages of 2, so that every test turns pages."""
    with running_hub(tmp_path / "hub", page_size=2) as hub:
        yield hub


_SERVE = """
import sys
from pathlib import Path
from bot.localhub import serve
serve(Path(sys.argv[1]), on_ready=lambda url: print(url, flush=True))
"""


@contextmanager
def hub_process(root: Path) -> Iterator[tuple[RunningHub, subprocess.Popen[str]]]:
    """A Hub in a process of its own, for tests that kill it."""
    root.mkdir(parents=True, exist_ok=True)
    add_usual_users(root)
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE, str(root)], stdout=subprocess.PIPE, text=True, cwd=REPO, env={**os.environ}
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise RuntimeError("the local Hub did not start")
        yield RunningHub(url, root), process
    finally:
        process.kill()
        process.wait(20)
        if process.stdout is not None:
            process.stdout.close()
