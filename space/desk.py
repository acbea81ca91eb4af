"""Actions of a visitor: check, submit, cancel, read. Page and API both call these functions.

An action raises `bot.errors`; `attempt` turns any error into a `Refusal` for page and API.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bot.errors import MergebotError, Refused, Transient, Where
from bot.hub import Hub
from bot.jobs import request
from bot.jobs.job import Job
from bot.jobs.queue import Queue
from bot.jobs.request import EvaluateOptions
from bot.publishing import leaderboard
from bot.publishing.leaderboard import Row
from bot.service import intake
from bot.service.intake import Checked
from bot.settings import Settings
from space import login

log = logging.getLogger(__name__)
Result = TypeVar("Result")
BOARD_FRESH_S = 10.0
JOBS_SHOWN = 50


@dataclass(frozen=True, slots=True)
class Refusal:
    """A failed action: the reason and the next step. `request_id` finds a defect of ours in the log."""

    code: str
    message: str
    next_step: str
    value: str | None
    where: Where | None
    request_id: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "message": self.message,
            "value": self.value,
            # Gradio's clients take a mapping with the key `path` for a file to fetch.
            "where": self.where and {"file": self.where.file, "line": self.where.line, "key": self.where.path},
            "next": self.next_step,
            "request_id": self.request_id,
        }


class Form(BaseModel):
    """Content of the form or an API call: any JSON before validation."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    recipe: str
    name: str
    suite: Annotated[str, Field(max_length=64)] = "quick"
    tasks: Annotated[list[Annotated[str, Field(max_length=128)]], Field(max_length=64)] = []
    limit: Annotated[int, Field(ge=1, le=10_000)] | None = None
    speed: Literal["off", "medusa"] = "off"


@dataclass(frozen=True, slots=True)
class Board:
    """Published merges, newest first, and the time since which the Hub has not answered (None if it did)."""

    rows: tuple[Row, ...]
    stale: Refusal | None = None


@dataclass(slots=True)
class Desk:
    """The actions, under `settings`. One for the process; safe to share between threads."""

    settings: Settings
    hub: Hub
    queue: Queue
    _board: Board | None = field(default=None, init=False)
    _board_at: float = field(default=float("-inf"), init=False)
    _board_lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def submit(self, visitor: str | None, **form: Any) -> Job:
        """Ask for a merge. Raises Refused or Transient."""
        requester = login.require(visitor)
        fields = read_form(form)
        evaluate = EvaluateOptions(fields.suite, tuple(fields.tasks), fields.limit, speed=fields.speed)
        merge = request.from_form(requester, fields.recipe, fields.name, evaluate)
        return intake.take(merge, self.hub, self.queue, self.settings)

    def check(self, visitor: str | None, recipe: str) -> Checked:
        """Plan of `recipe`, without submitting it. Raises Refused or Transient."""
        login.require(visitor)
        return intake.check(read_form({"recipe": recipe, "name": ""}).recipe, self.hub, self.settings)

    def jobs(self, requester: str | None = None) -> list[Job]:
        return self.queue.jobs(requester=requester, limit=JOBS_SHOWN)

    def job(self, job_id: object) -> Job:
        """Raises Refused JOB_NOT_FOUND."""
        if not isinstance(job_id, str) or not job_id.strip().isalnum() or len(job_id) > 64:
            raise Refused("JOB_NOT_FOUND", "That is not the id of a job.", "See the list of jobs.")
        return self.queue.job(job_id.strip())

    def cancel(self, visitor: str | None, job_id: object) -> Job:
        """Raises Refused LOGIN_REQUIRED, JOB_NOT_FOUND, NOT_YOURS, CANCELLED."""
        return self.queue.cancel(self.job(job_id).id, login.require(visitor))

    def board(self) -> Board:
        """The leaderboard on the Hub, at most 10 s old; the last known one while the Hub is unavailable."""
        with self._board_lock:
            if time.monotonic() - self._board_at > BOARD_FRESH_S:
                rows = attempt(lambda: leaderboard.read(self.hub, self.settings))
                known = self._board.rows if self._board else ()
                self._board = Board(known, rows) if isinstance(rows, Refusal) else Board(rows)
                self._board_at = time.monotonic()
            assert self._board is not None
            return self._board


def read_form(form: dict[str, Any]) -> Form:
    """Raises Refused REQUEST_INVALID, naming the field."""
    try:
        return Form.model_validate(form)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"]) or "request"
        raise Refused(
            "REQUEST_INVALID",
            f"The field `{name[:80]}` cannot be used: {first['msg'][:160].lower()}.",
            "Correct it and send the form again.",
        ) from None


def now() -> datetime:
    return datetime.now(UTC)


def attempt(action: Callable[[], Result]) -> Result | Refusal:
    """Result of `action`, or a Refusal. Defects are logged and shown to the visitor by their id only."""
    request_id = secrets.token_hex(4)
    try:
        return action()
    except MergebotError as error:
        log.info("%s %s: %s", request_id, error.code, error)
        again = error.next_step or ("Try again in a minute." if isinstance(error, Transient) else "")
        return Refusal(error.code, error.message, again, error.value, error.where, request_id)
    except Exception:
        log.exception("request %s stopped on a defect", request_id)
        message = "An internal error of the bot stopped this request."
        return Refusal("INTERNAL", message, f"Tell the operator the request id {request_id}.", None, None, request_id)
