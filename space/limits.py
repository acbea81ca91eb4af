"""Limits on every request: size of the body, no files, no foreign hosts in the page."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# A recipe of 64 KiB, quoted as JSON, with room for the rest of the form. The recipe's own limit is told apart later,
# with a sentence of its own.
BODY_LIMIT_BYTES = 256 * 1024

# Gradio evaluates its templates, hence unsafe-eval; the Hub shows a Space in a frame.
POLICY = "; ".join(
    (
        "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:",
        "connect-src 'self' data: blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self' https://huggingface.co",
    )
)


class _Middleware:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app


class BodyLimit(_Middleware):
    """413 for a body past the limit, whatever length it declares."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > BODY_LIMIT_BYTES:
            await _refuse(413, "The request is larger than 256 KiB.")(scope, receive, send)
            return
        seen = 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > BODY_LIMIT_BYTES:
                # The length was a lie or absent. For the application the visitor has hung up.
                return {"type": "http.disconnect"}
            return message

        await self.app(scope, bounded, send)


class NoUploads(_Middleware):
    """The page takes no files, so Gradio's upload routes stay shut."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].rstrip("/").endswith(("/upload", "/upload_progress")):
            await _refuse(403, "This page takes no files.")(scope, receive, send)
            return
        await self.app(scope, receive, send)


class SecurityHeaders(_Middleware):
    """Headers that keep the browser from loading anything from elsewhere."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "same-origin"
            await send(message)

        await self.app(scope, receive, headed)


def _refuse(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"error": sentence}, status_code=status)
