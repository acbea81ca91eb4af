"""Faults in front of the local Hub: rules that answer, cut or delay chosen requests (hub.md 5.6).

Faults are middleware around the application, never code in the server.
"""

from __future__ import annotations

import contextlib
import fnmatch
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send


@dataclass(slots=True)
class Rule:
    """Applies to matching requests `first` … `first + times - 1` (counted from 1).

    `status`: answer this (with `headers`, `body`) instead of asking the Hub. `lost`: let the Hub act, then drop its
    answer. `cut_after`: send only so many bytes of the body. `flip`: change one byte of the body.
    """

    method: str
    path: str
    first: int = 1
    times: int = 10**9
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b'{"error": "a fault of the test"}'
    lost: bool = False
    cut_after: int | None = None
    flip: bool = False
    seen: int = 0

    def applies(self, method: str, path: str) -> bool:
        if method != self.method or not fnmatch.fnmatchcase(path, self.path):
            return False
        self.seen += 1
        return self.first <= self.seen < self.first + self.times


class Lost(Exception):
    """Makes the server drop the connection: its answer never arrives."""


class Faults:
    """The application, with rules in front of it."""

    def __init__(self, app: Any) -> None:
        self._app: ASGIApp = app
        self.rules: list[Rule] = []

    def add(self, method: str, path: str, **how: Any) -> Rule:
        rule = Rule(method, path, **how)
        self.rules.append(rule)
        return rule

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["raw_path"].decode()
        rule = next((rule for rule in self.rules if rule.applies(scope["method"], path)), None)
        if rule is None:
            await self._app(scope, receive, send)
        elif rule.status is not None:
            await Response(rule.body, rule.status, rule.headers)(scope, receive, send)
        else:
            # The server closes the connection of an answer that was begun and not ended.
            with contextlib.suppress(Lost):
                await self._app(scope, receive, _bent(rule, send))


def _bent(rule: Rule, send: Send) -> Send:
    sent = 0

    async def bent(message: Any) -> None:
        nonlocal sent
        if message["type"] == "http.response.body":
            if rule.lost:
                raise Lost
            body = message.get("body", b"")
            if rule.cut_after is not None and sent + len(body) > rule.cut_after:
                await send({**message, "body": body[: rule.cut_after - sent], "more_body": True})
                raise Lost
            if rule.flip and body:
                message = {**message, "body": bytes([body[0] ^ 1]) + body[1:]}
            sent += len(body)
        await send(message)

    return bent
