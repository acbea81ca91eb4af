"""Policy: licenses, gating, sizes, quotas. Pure functions of facts, without I/O.

The license table is an engineer's reading, not a lawyer's, and refuses in case of doubt. A merge carries the strictest
license of its sources; two different restricted licenses cannot be combined.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from bot.errors import Refused
from bot.jobs.job import Source
from bot.storage import size_text

# From the freest to the strictest: a mix of these carries the strictest one.
PERMISSIVE = (
    "cc0-1.0", "unlicense", "0bsd", "wtfpl", "mit", "isc", "bsd", "bsd-2-clause", "bsd-3-clause", "ms-pl", "zlib",
    "apache-2.0", "cc-by-4.0",
)  # fmt: skip
# These demand that what is made from them carries the same terms: they mix with permissive ones and with themselves.
RESTRICTED = frozenset(
    {
        "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "openrail", "openrail++",
        "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0", "bigcode-openrail-m",
        "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "mpl-2.0",
    }
)  # fmt: skip


def result_licence(sources: Iterable[Source]) -> str:
    """The licence a merge of `sources` carries. Raises Refused LICENCE_CONFLICT."""
    by_licence: dict[str, Source] = {}
    for source in sources:
        licence = _known(source.licence)
        if licence is None:
            shown = source.licence or "no licence"
            raise Refused(
                "LICENCE_CONFLICT",
                f"{source.repo} declares {shown}, and a merge of it cannot be published.",
                "Ask its author for a licence that allows derived models, or take another source.",
                value=source.repo,
            )
        by_licence.setdefault(licence, source)
    restricted = sorted(RESTRICTED.intersection(by_licence))
    if len(restricted) > 1:
        first, second = (by_licence[licence] for licence in restricted[:2])
        raise Refused(
            "LICENCE_CONFLICT",
            f"{first.licence} ({first.repo}) and {second.licence} ({second.repo}) cannot be published as one model.",
            "Take sources whose licences agree.",
            value=f"{first.licence} + {second.licence}",
        )
    return restricted[0] if restricted else max(by_licence, key=PERMISSIVE.index)


def _known(licence: str | None) -> str | None:
    """The entry of the table that a card's license means: itself, or a restricted one that was named under `other`."""
    named = (licence or "").removeprefix("other (").removesuffix(")")
    return named if named in RESTRICTED or licence in PERMISSIVE else None


def check_size(plan: Mapping[str, Any], *, disk_limit_bytes: int, memory_limit_bytes: int) -> None:
    """Refuse work that cannot fit: `plan` is a plan's summary. Raises Refused TOO_LARGE."""
    disk = int(plan["disk_bytes"]) + int(plan["bytes_in"])
    for need, limit, what in (
        (disk, disk_limit_bytes, "disk"),
        (int(plan["peak_memory_bytes"]), memory_limit_bytes, "memory"),
    ):
        if need > limit:
            raise Refused(
                "TOO_LARGE",
                f"This merge needs {size_text(need)} of {what}; the limit is {size_text(limit)}.",
                "Merge smaller models, or ask the operator for a larger limit.",
            )


def check_quota(*, open_jobs: int, requests_today: int, open_limit: int, day_limit: int) -> None:
    """Refuse a user with too many open jobs or requests. Raises Refused LIMIT_REACHED."""
    if open_jobs >= open_limit:
        raise Refused(
            "LIMIT_REACHED",
            f"You have {open_jobs} requests at work, and {open_limit} is the limit.",
            "Wait for one to end, or cancel one.",
        )
    if requests_today >= day_limit:
        raise Refused(
            "LIMIT_REACHED",
            f"You have sent {requests_today} requests in 24 hours; the limit is {day_limit}.",
            "Try again tomorrow.",
        )
