"""The Space as an ASGI application: `uvicorn --factory space.app:create`. Wiring only.

Gradio and huggingface_hub read their settings at import, so nothing of them is imported before `create` has applied
ours.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Response

from bot.settings import Settings, activate
from space.limits import BodyLimit, NoUploads, SecurityHeaders

QUEUED_EVENTS = 50


def create(settings: Settings | None = None) -> FastAPI:
    """The page at `/`, `/healthz` beside it, and the scheduler, if the settings ask for one.

    Raises Refused LOGIN_REQUIRED if the page is public and logins would not be real.
    """
    settings = settings or Settings()
    activate(settings)

    import gradio as gr

    from bot.hub import Hub
    from bot.jobs.queue import open_queue
    from bot.service.scheduler import Scheduler
    from space import login, page, theme
    from space.desk import Desk

    login.check_start(settings)
    desk = Desk(settings, Hub(settings.hub), open_queue(settings))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        scheduler = Scheduler(settings, queue=desk.queue) if settings.schedule else None
        if scheduler is not None:
            scheduler.start()
        yield
        if scheduler is not None:
            scheduler.stop()

    app = FastAPI(title="mergebot", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    def healthz() -> dict[str, object]:
        """The process serves and its database answers."""
        return {"status": "ok", "open_jobs": len(desk.queue.unfinished())}

    @app.get("/favicon.ico", include_in_schema=False)
    def favicon() -> Response:
        return Response(theme.LOGO_SVG, media_type="image/svg+xml")

    blocks = page.build(desk).queue(max_size=QUEUED_EVENTS, default_concurrency_limit=8)
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        footer_links=["api", "settings"],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        show_error=False,
        max_file_size="64kb",
        theme=theme.theme(),
        css=theme.CSS,
    )
    for middleware in (NoUploads, BodyLimit, SecurityHeaders):
        app.add_middleware(middleware)
    return app
