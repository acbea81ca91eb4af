"""Errors of mergebot and their stable codes.

    MergebotError              one sentence, one next step, one stable code
    |-- Refused                the request cannot be carried out; repeating it unchanged does not help
    |-- Failed                 accepted work cannot be finished; the job ends with this reason
    |   `-- EvaluationError    a measurement failed
    `-- Transient              an outside cause; the same work may succeed later

Errors that code catches by name are subclasses with one code, such as PublishConflict. `Refused("PUBLISH_CONFLICT",
...)` makes one, so the class follows from the code even where an error is rebuilt from JSON.

Any other exception is a defect: it is logged with its traceback, and a user sees only `INTERNAL` and the request's id.

The codes are a stable interface of job pages and JSON answers: codes may be added, existing ones keep their meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

CODES = frozenset(
    {
        # the request
        "REQUEST_INVALID", "CARD_NO_REQUEST", "CARD_INVALID", "LOGIN_REQUIRED", "NOT_YOURS",
        "LIMIT_REACHED", "QUEUE_FULL", "NOT_A_REPO_ID", "JOB_NOT_FOUND", "CANCELLED",
        # the recipe's text
        "RECIPE_INVALID", "RECIPE_TOO_LARGE", "RECIPE_TOO_DEEP", "RECIPE_USES_ALIASES",
        "DUPLICATE_KEY", "UNKNOWN_KEY", "UNKNOWN_METHOD", "MISSING_KEY", "VALUE_OUT_OF_RANGE", "NOT_SUPPORTED",
        "LAYER_RULE",
        # the sources
        "SOURCE_NOT_FOUND", "SOURCE_GATED", "SOURCE_NOT_SAFETENSORS", "SOURCE_CHANGED_OR_GONE", "NEEDS_REMOTE_CODE",
        "BAD_CHECKPOINT", "BAD_SHARD_NAME", "SHAPE_MISMATCH", "TENSOR_MISSING", "NOT_FINITE", "LICENCE_CONFLICT",
        "CORRUPT_DOWNLOAD", "DOWNLOAD_TOO_LARGE",
        # the work
        "TOO_LARGE", "DISK_LOW", "DISK_FULL", "MEMORY_LIMIT", "TIME_LIMIT", "OUTPUT_EXISTS", "OUTPUT_UNWRITABLE",
        "DEVICE_UNAVAILABLE", "FILE_NOT_FOUND", "LEASE_LOST", "WORKER_DIED", "NOT_VERIFIABLE", "NOT_THE_SAME",
        # the evaluation
        "UNKNOWN_TASK", "SUITE_INVALID", "DATASET_UNAVAILABLE", "DATASET_GATED", "EVALUATION_FAILED",
        "MODEL_UNLOADABLE", "NO_CHAT_TEMPLATE", "BACKEND_UNAVAILABLE", "NOT_COMPARABLE", "MODEL_NONSENSE", "NOT_BETTER",
        "SPEED_CHECK_FAILED", "SPEED_UNSUPPORTED", "PROMPT_TOO_LONG", "BAD_HEADS", "HEADS_UNSUPPORTED",
        # the Hub and publication
        "HUB_UNAVAILABLE", "HUB_ANSWER_INVALID", "HUB_FORBIDDEN", "PUBLISH_CONFLICT", "PUBLISHING_PAUSED",
        # a defect of ours
        "INTERNAL",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Where:
    """Place of an error in a user's text; `line` counts from 1."""

    file: str
    line: int | None = None
    path: str | None = None  # YAML path such as "models[1].parameters.weight"


class MergebotError(Exception):
    """An error with a stable `code`, a `message` of one sentence and a `next_step`.

    `value` is the offending value, if any, shortened to 80 characters and never interpreted.
    """

    _named: ClassVar[dict[str, list[type[MergebotError]]]] = {}

    def __init_subclass__(cls, code: str = "") -> None:
        if code:
            cls._named.setdefault(code, []).append(cls)

    def __new__(cls, code: str, *_: Any, **__: Any) -> Self:
        named = [each for each in cls._named.get(code, ()) if issubclass(each, cls)]
        return super().__new__(named[0] if named else cls)

    def __init__(
        self,
        code: str,
        message: str,
        next_step: str = "",
        *,
        value: str | None = None,
        where: Where | None = None,
    ) -> None:
        if code not in CODES:
            raise ValueError(f"{code} is not in bot.errors.CODES")
        super().__init__(code, message, next_step)
        self.code = code
        self.message = message
        self.next_step = next_step
        self.value = None if value is None else value[:80]
        self.where = where

    def __str__(self) -> str:
        return f"{self.message} {self.next_step}".strip()

    def as_dict(self) -> dict[str, object]:
        """The error as JSON, in the shape of every interface."""
        where = (
            None if self.where is None else {"file": self.where.file, "line": self.where.line, "path": self.where.path}
        )
        return {"code": self.code, "message": self.message, "value": self.value, "where": where, "next": self.next_step}


class Refused(MergebotError):
    """The request cannot be carried out; repeating it unchanged does not help."""


class Failed(MergebotError):
    """Accepted work cannot be finished."""


class Transient(MergebotError):
    """An outside cause stopped the work; it may be repeated after `retry_after_s`."""

    def __init__(
        self,
        code: str,
        message: str,
        next_step: str = "",
        *,
        retry_after_s: float = 60.0,
        value: str | None = None,
        where: Where | None = None,
    ) -> None:
        super().__init__(code, message, next_step, value=value, where=where)
        self.retry_after_s = retry_after_s


class EvaluationError(Failed):
    """A measurement failed."""


class ModelNonsense(EvaluationError, code="MODEL_NONSENSE"):
    """The model fails the sanity check."""


class Cancelled(Failed, code="CANCELLED"):
    """The work was cancelled."""


class LeaseLost(Failed, code="LEASE_LOST"):
    """Another worker has claimed the job."""


class LimitReached(Refused, code="LIMIT_REACHED"):
    """The user has too many jobs at present."""


class QueueFull(Refused, code="QUEUE_FULL"):
    """The queue is at its limit."""


class SourceNotFound(Refused, code="SOURCE_NOT_FOUND"):
    """A repo, revision or folder does not exist or is not visible."""


class PublishConflict(Refused, code="PUBLISH_CONFLICT"):
    """The repo changed between look and commit."""


class HubForbidden(Refused, code="HUB_FORBIDDEN"):
    """The token has no right to do this."""


class HubUnavailable(Transient, code="HUB_UNAVAILABLE"):
    """The Hub does not answer or answers with a server error."""


class HubAnswerInvalid(Transient, code="HUB_ANSWER_INVALID"):
    """The Hub's answer cannot be read."""


class PublishingPaused(Transient, code="PUBLISHING_PAUSED"):
    """The Hub does not accept the write token."""
