"""What can go wrong, as a tree.

    MergebotError              one sentence, one next step, one stable code
    |-- Refused                what was asked for cannot be done; asking again unchanged will not help
    |-- Failed                 accepted work cannot be finished; the job ends with this reason
    `-- Transient              something outside is in the way; the same work may succeed later

What the evaluators cannot measure, they raise as EvaluationError with a code of the list below;
`bot.stages.evaluator_errors` makes it a Failed or a Refused.

Anything else that is raised is a defect of ours: it is logged with its traceback and reaches a person as
`INTERNAL` with the request's id only.

The codes below are a stable interface (they stand in job pages and in JSON answers): new
ones may be added, old ones keep their meaning.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """The place in a text of the requester's that an error speaks of (`line` counts from 1)."""

    file: str
    line: int | None = None
    path: str | None = None  # YAML path such as "models[1].parameters.weight"


class MergebotError(Exception):
    """One thing that went wrong: a stable `code`, a `message` of one sentence, a `next_step`.

    `value` is the offending value where there is one; it is shortened to 80 characters and never interpreted.
    """

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
        """The JSON shape every door of the bot answers with."""
        where = (
            None if self.where is None else {"file": self.where.file, "line": self.where.line, "path": self.where.path}
        )
        return {"code": self.code, "message": self.message, "value": self.value, "where": where, "next": self.next_step}


class Refused(MergebotError):
    """What was asked for cannot be done; asking again unchanged will not help."""


class Failed(MergebotError):
    """Accepted work cannot be finished."""


class Transient(MergebotError):
    """Something outside is in the way; `retry_after_s` is when to try again."""

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
