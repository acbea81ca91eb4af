"""Serving the local Hub on a real socket."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from bot.errors import Failed, Refused
from bot.localhub.app import create_app

START_TIMEOUT_S = 30


class Server(uvicorn.Server):
    """uvicorn server with a callback after its start."""

    def __init__(self, config: uvicorn.Config, url: str, on_ready: Callable[[str], None] | None) -> None:
        super().__init__(config)
        self._url, self._on_ready = url, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._on_ready is not None:
            self._on_ready(self._url)


def listen(root: Path, host: str, port: int, on_ready: Callable[[str], None] | None) -> tuple[Server, socket.socket]:
    """A server for the Hub at `root`, bound but not running. Port 0 selects a free port."""
    return listen_app(create_app(root), host, port, on_ready)


def listen_app(
    app: ASGIApp, host: str, port: int, on_ready: Callable[[str], None] | None
) -> tuple[Server, socket.socket]:
    """A bound server for any ASGI application (tests wrap the Hub to inject faults)."""
    # asyncio sets TCP_NODELAY only on sockets that name their protocol; without it small answers wait 40 ms for an ACK
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise Refused(
            "VALUE_OUT_OF_RANGE",
            f"The local Hub cannot listen on {host}:{port}: {error.strerror}.",
            "Choose another port, or 0 for a free one.",
        ) from error
    named = f"[{host}]" if ":" in host else host
    url = f"http://{named}:{listener.getsockname()[1]}"
    config = uvicorn.Config(
        app, lifespan="off", log_level="warning", access_log=False, timeout_graceful_shutdown=3, server_header=False
    )
    return Server(config, url, on_ready), listener


def serve(root: Path, host: str = "127.0.0.1", port: int = 0, on_ready: Callable[[str], None] | None = None) -> None:
    """Serve the Hub at `root` until interrupted; `on_ready(url)` is called once it answers."""
    server, listener = listen(root, host, port, on_ready)
    with listener, contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


@contextlib.contextmanager
def running(app: ASGIApp, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """The application on a socket, in a thread of this process; yields its address."""
    ready = threading.Event()
    addresses: list[str] = []

    def on_ready(url: str) -> None:
        addresses.append(url)
        ready.set()

    server, listener = listen_app(app, host, port, on_ready)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="local-hub", daemon=True)
    thread.start()
    try:
        if not ready.wait(START_TIMEOUT_S):
            raise Failed(
                "HUB_UNAVAILABLE",
                f"The local Hub did not start within {START_TIMEOUT_S} s.",
                "Check the load of this machine.",
            )
        yield addresses[0]
    finally:
        server.should_exit = True
        thread.join(START_TIMEOUT_S)
        listener.close()
