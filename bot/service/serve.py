"""Serves the Space. It is imported by name, since the bot may not import the Space."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI
from uvicorn.importer import import_from_string

from bot.settings import Settings

SPACE = "space.app:create"


class _Server(uvicorn.Server):
    """uvicorn that announces its address once it listens."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(f"The Space is at http://{self.config.host}:{self.config.port}  (Ctrl-C ends it)", flush=True)


def serve(settings: Settings, host: str, port: int) -> None:
    """Serve the Space under `settings` until interrupted. Raises Refused when it must not be served so."""
    create: Callable[[Settings], FastAPI] = import_from_string(SPACE)
    app = create(settings)
    # Browsers keep a connection open for progress; without a limit they would hold the end up for many seconds.
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=2)
    server = _Server(config)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    if not server.started:  # uvicorn has logged the reason
        raise SystemExit(1)
