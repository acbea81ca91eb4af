"""May this be done? The licence table and the limits, as promises."""

from __future__ import annotations

import re

import pytest

from bot.errors import Refused
from bot.jobs import policy
from bot.jobs.job import Source


def merge_of(*licences: str | None) -> list[Source]:
    return [Source(f"org/m{number}", "a" * 40, licence, 1) for number, licence in enumerate(licences)]


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (("mit",), "mit"),
        (("mit", "apache-2.0"), "apache-2.0"),
        (("apache-2.0", "mit", "bsd-3-clause"), "apache-2.0"),
        (("apache-2.0", "llama3.1"), "llama3.1"),
        (("llama3.1", "llama3.1"), "llama3.1"),
        (("cc-by-nc-4.0", "mit"), "cc-by-nc-4.0"),
    ],
)
def test_the_strictest_licence_wins(licences: tuple[str, ...], expected: str) -> None:
    assert policy.result_licence(merge_of(*licences)) == expected


@pytest.mark.parametrize(
    "licences",
    [(None,), ("other",), ("unknown", "mit"), ("cc-by-nd-4.0",), ("llama3.1", "gemma"), ("llama2", "llama3"), ("",)],
)
def test_what_cannot_be_licensed_is_refused_with_its_name(licences: tuple[str | None, ...]) -> None:
    with pytest.raises(Refused) as refused:
        policy.result_licence(merge_of(*licences))
    assert refused.value.code == "LICENCE_CONFLICT"
    assert "org/m" in str(refused.value)


def test_work_beyond_the_disk_is_refused_with_both_figures() -> None:
    plan = {"disk_bytes": 10**13, "bytes_in": 2 * 10**13, "peak_memory_bytes": 1}
    with pytest.raises(Refused, match="needs 30,000 GB of disk; the limit is 120 GB"):
        policy.check_size(plan, disk_limit_bytes=120 * 10**9, memory_limit_bytes=10**12)


def test_quotas_count_open_jobs_and_requests_of_a_day() -> None:
    policy.check_quota(open_jobs=2, requests_today=19, open_limit=3, day_limit=20)
    for open_jobs, today in ((3, 0), (0, 20)):
        with pytest.raises(Refused) as refused:
            policy.check_quota(open_jobs=open_jobs, requests_today=today, open_limit=3, day_limit=20)
        assert refused.value.code == "LIMIT_REACHED"


def test_a_restricted_license_named_under_other_is_that_license() -> None:
    """As the first cards of Llama 3 say it; a permissive name beside a text of the author's proves nothing."""
    assert policy.result_licence(merge_of("other (llama3)", "mit")) == "llama3"
    for declared in ("other (deepseek)", "other (mit)", "mit, apache-2.0"):
        with pytest.raises(Refused, match=re.escape(f"org/m0 declares {declared}")):
            policy.result_licence(merge_of(declared))
