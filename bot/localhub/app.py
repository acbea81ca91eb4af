"""The local Hub as an ASGI application: routing, authentication, errors in the client's format, journal."""

from __future__ import annotations

import inspect
import logging
import re
import secrets
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.types import Receive, Scope, Send

from bot.localhub import (
    routes_commit,
    routes_content,
    routes_discussions,
    routes_lfs,
    routes_oauth,
    routes_pages,
    routes_repos,
)
from bot.localhub.answers import HubError, stamp
from bot.localhub.journal import Journal
from bot.localhub.page import page
from bot.localhub.routes_oauth import Logins
from bot.localhub.routing import Call, Route, Routes
from bot.localhub.storage import Store
from bot.localhub.users import Users, Visitor

_log = logging.getLogger(__name__)
_ANONYMOUS_LIMIT_BYTES = 2 << 20
_HOST = re.compile(r"[A-Za-z0-9.\-]+(:\d{1,5})?|\[[0-9a-fA-F:]+\](:\d{1,5})?")
# Pages last: their patterns "/{ns}" and "/{ns}/{name}" match nearly anything.
_TABLES = (routes_repos, routes_content, routes_commit, routes_lfs, routes_discussions, routes_oauth, routes_pages)


class LocalHub:
    """A Hub over the folder `root` (see storage.py). `page_size`: entries per page of lists and discussions.

    `scripted_logins` lets a test log users in without a browser. `unknown` collects requests below /api/ (and LFS) that
    no route handles: a client uses something outside the contract.
    """

    def __init__(
        self, root: Path, *, page_size: int = 100, scripted_logins: bool = False, store: Store | None = None
    ) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.store = store or Store(root)
        self.store.sweep()
        self.users = Users(root)
        self.journal = Journal(root)
        self.logins = Logins(scripted_logins)
        self.page_size = page_size
        self.unknown: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"the local Hub does not support {scope['type']}")
        request = Request(scope, receive)
        entry = _Entry(self, request)

        async def counted(message: MutableMapping[str, Any]) -> None:
            entry.note(message)
            await send(message)

        try:
            try:
                entry.visitor = await run_in_threadpool(self._visitor, request)
                response = await self._answer(request, entry.visitor)
            except HubError as error:
                response = _error_response(request, error)
            except ClientDisconnect:
                entry.status = 499  # the client has disconnected
                return
            except Exception:
                _log.exception("%s %s", request.method, scope["raw_path"])
                response = HubError(500, "Internal Error").response()
            response.headers["X-Request-Id"] = secrets.token_hex(8)
            await response(scope, receive, counted)
        finally:
            entry.write()

    def _visitor(self, request: Request) -> Visitor:
        authorization = request.headers.get("authorization")
        if authorization and authorization.lower().startswith("basic"):
            return Visitor()  # the client id of an OAuth call
        return self.users.visitor(authorization)

    async def _answer(self, request: Request, visitor: Visitor) -> Response:
        found = await run_in_threadpool(_route, request.method, request.scope["raw_path"])
        if found is None:
            return self._not_found(request)
        route, params = found
        call = Call(
            store=self.store,
            users=self.users,
            request=request,
            visitor=visitor,
            endpoint=_endpoint(request),
            params=params,
            page_size=self.page_size,
            notes={"logins": self.logins, "unknown": self.unknown},
        )
        if route.limit_bytes and request.method not in ("GET", "HEAD"):
            # Anonymous requests get a small buffer on every route.
            limit = route.limit_bytes if visitor.name else min(route.limit_bytes, _ANONYMOUS_LIMIT_BYTES)
            call.body = await _body(request, limit)
        if inspect.iscoroutinefunction(route.handler):
            answer: Response = await route.handler(call)
            return answer
        response = await run_in_threadpool(route.handler, call)
        assert isinstance(response, Response)
        return response

    def _not_found(self, request: Request) -> Response:
        path = request.scope["raw_path"].decode("ascii", "replace")
        if path.startswith("/api/") or "/info/lfs/" in path:
            self.unknown.append(f"{request.method} {path}")
        return HubError(404, "Sorry, we can't find the page you are looking for.").response()


class _Entry:
    """One line of the journal, written before the last byte of the response: what a client has received is journaled. A
    client counts the promised bytes and does not wait for the end of the message."""

    def __init__(self, hub: LocalHub, request: Request) -> None:
        self._hub, self._request = hub, request
        self.visitor = Visitor()
        self.status = 500
        self._sent_bytes = 0
        self._promised_bytes: int | None = None
        self._written = False

    def note(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            lengths = [int(value) for name, value in message.get("headers", ()) if name.lower() == b"content-length"]
            self._promised_bytes = lengths[0] if lengths else None
        elif message["type"] == "http.response.body":
            self._sent_bytes += len(message.get("body", b""))
            if not message.get("more_body", False) or self._sent_bytes == self._promised_bytes:
                self.write()

    def write(self) -> None:
        if self._written:
            return
        self._written = True
        self._hub.journal.record(
            time=stamp(self._hub.store.clock()),
            method=self._request.method,
            path=self._request.scope["raw_path"].decode("ascii", "replace"),
            user=self.visitor.name,
            status=self.status,
            sent_bytes=self._sent_bytes,
        )


def _route(method: str, raw_path: bytes) -> tuple[Route, dict[str, str]] | None:
    for table in _TABLES:
        routes: Routes = table.routes
        found = routes.match(method, raw_path)
        if found is not None:
            return found
    return None


def _endpoint(request: Request) -> str:
    """Address of this server as the client wrote it: the client refuses responses with another spelling."""
    host = request.headers.get("host", "")
    if not _HOST.fullmatch(host):
        raise HubError(400, "the Host header is not a host")
    return f"{request.scope.get('scheme', 'http')}://{host}"


async def _body(request: Request, limit_bytes: int) -> bytes:
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit_bytes:
            raise HubError(413, f"the body is larger than {limit_bytes} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def _error_response(request: Request, error: HubError) -> Response:
    path = request.scope["raw_path"]
    wants_page = "text/html" in request.headers.get("accept", "") and not path.startswith((b"/api/", b"/_lfs/"))
    if wants_page and error.status in (400, 401, 403, 404) and b"/resolve/" not in path:
        status = 404 if error.status == 401 else error.status
        return HTMLResponse(page("Not found", "<h1>There is nothing here</h1><p>Or it is not public.</p>"), status)
    return error.response()


def create_app(root: Path, *, page_size: int = 100, scripted_logins: bool = False) -> LocalHub:
    """The ASGI application over the Hub at `root`; the folder is created if missing."""
    return LocalHub(root, page_size=page_size, scripted_logins=scripted_logins)
