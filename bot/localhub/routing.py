"""Routing by the *raw* path of a request.

The client quotes a revision and a tree path as one segment each (`/tree/refs%2Fpr%2F1/sub%2Fd`), which is ambiguous
once decoded. So the raw path is split on "/" first and each segment unquoted afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import Response

from bot.localhub.answers import HubError, bad_request
from bot.localhub.names import KINDS, RepoId, repo_id
from bot.localhub.storage import Repo, Store
from bot.localhub.users import Users, Visitor

JSON_LIMIT_BYTES = 16 << 20
Handler = Callable[["Call"], Response | Awaitable[Response]]


def _no_json(word: str) -> None:
    """Refuse NaN and Infinity, which Python reads but JSON does not have."""
    raise ValueError(f"{word} is not JSON")


@dataclass(slots=True)
class Call:
    """A request and its context. `endpoint` is the address that the client used for this server."""

    store: Store
    users: Users
    request: Request
    visitor: Visitor
    endpoint: str
    params: dict[str, str]
    page_size: int
    body: bytes = b""
    notes: dict[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        try:
            value = json.loads(self.body or b"{}", parse_constant=_no_json)
        except (ValueError, RecursionError):
            raise bad_request("the body is not JSON") from None
        if not isinstance(value, dict):
            raise bad_request("the body is not a JSON object")
        return value

    def query(self, name: str, default: str | None = None) -> str | None:
        return self.request.query_params.get(name, default)

    def flag(self, name: str) -> bool:
        return (self.query(name) or "").lower() in ("true", "1")

    def queries(self, name: str) -> list[str]:
        return self.request.query_params.getlist(name) + self.request.query_params.getlist(f"{name}[]")

    @property
    def id(self) -> RepoId:
        return repo_id(self.params["kind"], self.params["ns"], self.params["name"])

    def user(self) -> str:
        """Name of the user; 401 for anonymous requests."""
        if self.visitor.name is None:
            raise HubError(401, "Invalid username or password.")
        return self.visitor.name

    def require_write_token(self) -> str:
        """Name of a user who may comment and propose: any user whose token can write somewhere."""
        name = self.user()
        if self.visitor.role not in ("write", "fineGrained"):
            raise HubError(403, "This token cannot write.")
        return name

    def repo(self) -> Repo:
        """The repo of the path if it is visible to the visitor (hub.md 5.1: error codes matter, not statuses)."""
        repo = self.store.find(self.id)
        if repo is not None and self.users.may_see(self.visitor, repo):
            if repo.disabled:
                raise HubError(403, "Access to this resource is disabled.")
            return repo
        self._follow_move()
        raise self.not_found()

    def not_found(self) -> HubError:
        if self.visitor.name is None:
            return HubError(401, "Invalid username or password.", "RepoNotFound")
        return HubError(404, "Repository not found", "RepoNotFound")

    def writable_repo(self) -> Repo:
        repo = self.repo()
        self.require_write(repo.id.namespace)
        return repo

    def require_write(self, namespace: str) -> None:
        if self.visitor.name is None:
            raise HubError(401, "Invalid username or password.")
        if not self.users.may_write(self.visitor, namespace):
            raise HubError(403, f"You don't have the rights to write to the namespace {namespace}.")

    def _follow_move(self) -> None:
        new = self.store.moved_to(self.id)
        target = None if new is None else self.store.find(new)
        if new is None or target is None or not self.users.may_see(self.visitor, target):
            return
        if self.request.method in ("GET", "HEAD"):
            path = self.request.scope["raw_path"].decode("ascii").replace(str(self.id), str(new), 1)
            query = self.request.url.query
            location = self.endpoint + path + (f"?{query}" if query else "")
            raise HubError(307, f"moved to {new}", headers={"Location": location})


@dataclass(frozen=True, slots=True)
class Route:
    method: str
    pattern: tuple[str, ...]
    handler: Handler
    fixed: tuple[tuple[str, str], ...]
    limit_bytes: int  # of the body; 0: the handler reads the stream itself


class Routes:
    """Table of routes; the first match is called."""

    def __init__(self) -> None:
        self.table: list[Route] = []

    def add(self, methods: str, pattern: str, *, limit_bytes: int = JSON_LIMIT_BYTES) -> Callable[[Handler], Handler]:
        """Register a handler for "GET HEAD" etc.

        `{x}` is one segment, `{x*}` the rest; a leading `{P}` stands for the three URL prefixes of repos ("" for
        models, "datasets/", "spaces/").
        """

        def register(handler: Handler) -> Handler:
            for method in methods.split():
                if pattern.startswith("/{P}"):
                    for kind in KINDS:
                        prefix = "/" if kind == "models" else f"/{kind}/"
                        parts = _parts(prefix + pattern.removeprefix("/{P}"))
                        self.table.append(Route(method, parts, handler, (("kind", kind),), limit_bytes))
                else:
                    self.table.append(Route(method, _parts(pattern), handler, (), limit_bytes))
            return handler

        return register

    def match(self, method: str, raw_path: bytes) -> tuple[Route, dict[str, str]] | None:
        try:
            segments = [unquote(part, errors="strict") for part in raw_path.decode("ascii").split("/")[1:]]
        except UnicodeDecodeError:
            raise bad_request("the path is not UTF-8") from None
        for route in self.table:
            if route.method == method:
                params = _match(route.pattern, segments)
                if params is not None:
                    return route, {**dict(route.fixed), **params}
        return None


def _parts(pattern: str) -> tuple[str, ...]:
    return tuple(pattern.split("/")[1:])


def _match(pattern: tuple[str, ...], segments: list[str]) -> dict[str, str] | None:
    params: dict[str, str] = {}
    for index, part in enumerate(pattern):
        if part.endswith("*}"):
            params[part[1:-2]] = "/".join(segments[index:])
            return params if len(segments) > index else None
        if index >= len(segments):
            return None
        segment = segments[index]
        if not part.startswith("{"):
            if part != segment:
                return None
        else:
            name, _, suffix = part[1:].partition("}")
            if not segment.endswith(suffix) or len(segment) <= len(suffix):
                return None
            if name == "kind" and segment not in KINDS:
                return None
            params[name] = segment.removesuffix(suffix) if suffix else segment
    return params if len(segments) == len(pattern) else None
