"""Serving the Space: found by name, because the bot knows nothing of the page that shows it."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI

from bot.settings import Settings

SPACE = "space.app:create"


def serve(settings: Settings, host: str, port: int) -> None:
    """Serve the Space under `settings` until interrupted. Raises Refused when it must not be served so."""
    import uvicorn
    from uvicorn.importer import import_from_string

    create: Callable[[Settings], FastAPI] = import_from_string(SPACE)
    # Browsers keep a connection open for progress; without a limit they would hold the end up for many seconds.
    uvicorn.run(create(settings), host=host, port=port, log_level="warning", timeout_graceful_shutdown=2)
