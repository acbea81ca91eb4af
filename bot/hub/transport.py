"""Transport to a Hub: timeouts, a total deadline, one address, and typed failures only.

huggingface_hub shares one HTTP client per process, by default without any timeout; its own retries obey `Retry-After`
without bound (docs/design/hub.md 8.1). The factory installed here adds timeouts for all calls. Within a
`HubSession.call`, hooks turn a request to come back later, a lost connection and a passed deadline into exceptions that
the library's retry loop does not catch, so that all waiting is decided in one place, by docs/design/reliability.md 8.2.
"""

from __future__ import annotations

import contextlib
import errno
import random
import re
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import set_client_factory
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers
from huggingface_hub.utils._http import hf_request_event_hook

from bot.errors import Failed, HubAnswerInvalid, HubUnavailable, MergebotError, Refused, Transient
from bot.settings import LIVE_HUB

T = TypeVar("T")
TIMEOUT = httpx2.Timeout(connect=10, read=60, write=60, pool=10)
MAX_TRIES, FIRST_WAIT_S, LONGEST_WAIT_S = 6, 1.0, 60.0
INVALID_ANSWER_TRIES = 3
_LONGEST_ASKED_S = 24 * 3600
_RETRIED = frozenset({408, 429, 500, 502, 503, 504})
# Where the live Hub keeps large files (unverified list; reliability.md 5). A local Hub keeps them itself.
_STORAGE = (".huggingface.co", ".hf.co", ".amazonaws.com")


class Unavailable(Exception):
    """The Hub cannot answer now; `wait_s` is the wait that it asks for, if any."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class ForeignHost(Exception):
    """A request to another host than the configured Hub."""


class FileNotFoundOnHub(Exception):
    """The file is not in the repo at that commit."""


# Requests that may be sent twice: uploads are addressed by content, the others only check.
_REPEATABLE = re.compile(r"/(preupload/[^/]+|info/lfs/objects/batch|info/lfs/verify|validate-yaml|paths-info/[^/]+)$")


@dataclass(slots=True)
class _CurrentCall:
    endpoint: str
    until: float  # time.monotonic()
    wrote: bool = False  # a request was sent that must not be sent twice


_current: ContextVar[_CurrentCall | None] = ContextVar("bot_hub_call", default=None)


class _Client(httpx2.Client):
    """The shared client. Within a `HubSession.call`, a lost connection leaves the library's own retry loop at once."""

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        try:
            return super().send(request, **options)
        except httpx2.TransportError as error:
            if _current.get() is None:
                raise
            raise Unavailable(f"no connection ({type(error).__name__})") from error


def _before(request: httpx2.Request) -> None:
    call = _current.get()
    if call is None:
        return
    if time.monotonic() > call.until:
        raise Unavailable("it did not answer in time")
    if not _is_hub(call.endpoint, str(request.url)):
        raise ForeignHost(f"a request to {request.url.host} was stopped")
    if request.method not in ("GET", "HEAD", "PUT") and not _REPEATABLE.search(request.url.path):
        call.wrote = True


def _is_hub(endpoint: str, url: str) -> bool:
    home, target = urlsplit(endpoint), urlsplit(url)
    if (home.scheme, home.netloc) == (target.scheme, target.netloc):
        return True
    host = (target.hostname or "").lower()
    return endpoint == LIVE_HUB and target.scheme == "https" and (host == "hf.co" or host.endswith(_STORAGE))


def _after(response: httpx2.Response) -> None:
    if _current.get() is not None and response.status_code in _RETRIED:
        raise Unavailable(f"it answered {response.status_code}", requested_wait_s(response.headers))


def requested_wait_s(headers: Any, now: datetime | None = None) -> float | None:
    """Wait in seconds that the Hub asks for: `RateLimit` when used up, else `Retry-After` as seconds or as a date."""
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(min(limit.reset_in_seconds, _LONGEST_ASKED_S))
    text = (headers.get("retry-after") or "").strip()
    if text.isascii() and text.isdigit():  # isdigit alone accepts "²"
        return float(min(int(text[:9]), _LONGEST_ASKED_S))
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return min(max(0.0, (moment - (now or datetime.now(UTC))).total_seconds()), float(_LONGEST_ASKED_S))


def new_client() -> httpx2.Client:
    return _Client(
        event_hooks={"request": [hf_request_event_hook, _before], "response": [_after]},
        follow_redirects=True,
        timeout=TIMEOUT,
    )


set_client_factory(new_client)


@dataclass(slots=True)
class HubSession:
    """Calls to one Hub. `deadline_s` limits one `call`, waits and repeats included."""

    endpoint: str
    deadline_s: float = 120.0
    sleep: Callable[[float], None] = time.sleep
    random: random.Random = field(default_factory=random.Random)

    def call(
        self, about: str, operation: Callable[[], T], *, repeat: bool = True, deadline_s: float | None = None
    ) -> T:
        """Call `operation()` with typed failures. `about` names the repo, file or address in messages.

        Raises Refused (SOURCE_NOT_FOUND, SOURCE_GATED, HUB_FORBIDDEN, PUBLISH_CONFLICT, NOT_A_REPO_ID), Transient
        (HUB_UNAVAILABLE, HUB_ANSWER_INVALID), or FileNotFoundOnHub for a missing file. With `repeat=False` the call is
        not repeated once its writing request was sent: the caller first checks its effect (docs/design/hub.md 2.4).
        """
        until = time.monotonic() + (self.deadline_s if deadline_s is None else deadline_s)
        with self._within(until) as current:
            for attempt in range(1, MAX_TRIES + 1):
                try:
                    return operation()
                except Exception as error:
                    fault = _typed(error, about)
                    if not isinstance(fault, Transient):
                        raise fault from error
                    tries = INVALID_ANSWER_TRIES if isinstance(fault, HubAnswerInvalid) else MAX_TRIES
                    wait_s = self._wait_s(error, attempt)
                    passing = isinstance(fault, HubUnavailable | HubAnswerInvalid) and attempt < tries
                    may_repeat = repeat or not current.wrote
                    if not (passing and may_repeat) or time.monotonic() + wait_s > until:
                        fault.retry_after_s = max(wait_s, 60.0)
                        raise fault from error
                    self.sleep(wait_s)
        raise AssertionError("unreachable: the last try returns or raises")

    @contextlib.contextmanager
    def _within(self, until: float) -> Iterator[_CurrentCall]:
        current = _CurrentCall(self.endpoint, until)
        token = _current.set(current)
        try:
            yield current
        finally:
            _current.reset(token)

    def _wait_s(self, error: BaseException, attempt: int) -> float:
        cause = _root(error)
        if isinstance(cause, Unavailable) and cause.wait_s is not None:
            return float(cause.wait_s)
        grown = min(FIRST_WAIT_S * 2.0 ** (attempt - 1), LONGEST_WAIT_S)
        return grown * self.random.uniform(0.75, 1.25)


def check_deadline() -> None:
    """Raise if the deadline has passed. Called between the chunks of a long response, which may trickle for ever."""
    call = _current.get()
    if call is not None and time.monotonic() > call.until:
        raise Unavailable("it did not answer in time")


def _root(error: BaseException) -> BaseException:
    """The innermost known exception; the library wraps failures of uploads."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (Unavailable, HfHubHTTPError, MergebotError, ForeignHost)):
            return seen
        seen = seen.__cause__
    return error


def _typed(error: Exception, about: str) -> Exception:
    found = _root(error)
    if isinstance(found, (MergebotError, FileNotFoundOnHub)):
        return found
    if isinstance(found, (Unavailable, httpx2.TransportError, OfflineModeIsEnabled)):
        reason = str(found) if isinstance(found, Unavailable) else type(found).__name__
        return Transient(
            "HUB_UNAVAILABLE", f"The Hub is not available for {about}: {reason}.", "It is tried again automatically."
        )
    if isinstance(found, HfHubHTTPError):  # before OSError and ValueError, which are its base classes
        return _typed_answer(found, about)
    if isinstance(found, HFValidationError):
        return Refused("NOT_A_REPO_ID", f"{about} is not a repo id.", "Write owner/name.", value=about)
    if isinstance(found, OSError) and found.errno in (errno.ENOSPC, errno.EDQUOT):
        return Transient(
            "DISK_LOW", f"The disk is full while reading {about}.", "It continues when disk space is free."
        )
    if isinstance(found, OSError) and found.errno is not None:
        return found  # an error of the local disk, not of the Hub
    return Transient(
        "HUB_ANSWER_INVALID",
        f"The Hub's response about {about} cannot be read ({type(found).__name__}).",
        "It is tried again automatically.",
    )


def _typed_answer(error: HfHubHTTPError, about: str) -> Exception:
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return Refused("SOURCE_GATED", f"{about} is gated.", "Choose an ungated model.")
    if isinstance(error, EntryNotFoundError):
        return FileNotFoundOnHub(about)
    if isinstance(error, RevisionNotFoundError):
        return Refused("SOURCE_NOT_FOUND", f"{about} has no such revision.", "Check the branch, tag or commit.")
    if isinstance(error, (RepositoryNotFoundError, DisabledRepoError)):
        return Refused(
            "SOURCE_NOT_FOUND",
            f"{about} does not exist on the Hub or is not public.",
            "Check the spelling of owner/name.",
        )
    if status in (409, 412):
        return Refused("PUBLISH_CONFLICT", f"{about} was changed at the same time.", "Check the repo and try again.")
    if status in (401, 403):
        return Refused("HUB_FORBIDDEN", f"The token has no permission for {about}.", "Check the token's rights.")
    if status in _RETRIED:
        return Transient(
            "HUB_UNAVAILABLE", f"The Hub answered {status} about {about}.", "It is tried again automatically."
        )
    reason = " ".join((error.server_message or "").split())[:200]
    return Failed("HUB_FORBIDDEN", f"The Hub refused {about} ({status}{': ' + reason if reason else ''}).", "")
