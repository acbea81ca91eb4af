"""Responses of the server: errors in the client's format, times, and addresses."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

from starlette.responses import JSONResponse, Response


class HubError(Exception):
    """An answer other than success. `code` is the X-Error-Code the client turns into its own exception type."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        headers: dict[str, str] | None = None,
        body: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = headers or {}
        self.body = body or {}

    def response(self) -> Response:
        text = re.sub(r"[^\x20-\x7e]", "?", self.message)
        headers = {**self.headers, "X-Error-Message": text}
        if self.code:
            headers["X-Error-Code"] = self.code
        return JSONResponse({"error": self.message, **self.body}, self.status, headers=headers)


def bad_request(message: str) -> HubError:
    return HubError(400, message)


def entry_not_found(path: str, commit: str) -> HubError:
    # The client remembers an absence per commit, so this error carries the commit like a success does.
    return HubError(404, f"{path} does not exist on this revision", "EntryNotFound", headers={"X-Repo-Commit": commit})


def revision_not_found(revision: str) -> HubError:
    return HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def stamp(moment: datetime) -> str:
    """UTC time with a final Z, the format that the client parses."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"
