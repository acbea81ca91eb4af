"""Module patterns of an adapter's config, such as `rank_pattern`, matched as PEFT 0.21 matches them but in linear time.

PEFT tries `(.*\\.)?(PATTERN)$` with Python's `re`, which a hostile pattern can keep busy. Here the same text is
matched by RE2 (https://github.com/google/re2/wiki/Syntax), whose time is linear in the name. RE2 has no look-around
and no back-references; such patterns are refused, as is the little that the two engines read differently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

_PLAIN = re.compile(r"\^?[\w.\-]+", re.ASCII)
# valid for both engines with different meanings: (part of a pattern, reason to refuse it)
_AMBIGUOUS = (
    (re.compile(r"\\\d"), "uses a back-reference"),
    (re.compile(r"\[\^?\["), "has a bracket inside brackets"),
    (re.compile(r"\{,"), "leaves out the lower bound of a repetition (write {0,2} for {,2})"),
    (re.compile(r"[^\x20-\x7e]"), "holds a character that is not printable ASCII"),
)
EXPRESSIONS_LIMIT = 256  # patterns that are more than a name
PATTERN_LIMIT = 2_000  # characters of one pattern
MEMORY_LIMIT_BYTES = 2**18  # of one compiled pattern
WORK_LIMIT = 2**28  # characters of expressions times characters of names: a few seconds at worst
_PLAIN_COST = 4  # of trying one plain name, in the same unit


class BadPattern(Exception):
    """A pattern that cannot be matched, or only at too great a cost; its text continues the sentence."""


class Patterns:
    """Values by pattern; the first pattern that matches a module's name decides. Raises `BadPattern`."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self._tests: list[tuple[Callable[[str], bool], float]] = []
        self._known: dict[str, float | None] = {}
        expressions = [pattern for pattern in values if not _PLAIN.fullmatch(pattern)]
        if any(len(pattern) > PATTERN_LIMIT for pattern in values):
            raise BadPattern(f"is longer than {PATTERN_LIMIT:,} characters")
        if len(expressions) > EXPRESSIONS_LIMIT:
            raise BadPattern(f"is one of {len(expressions):,} expressions; the limit is {EXPRESSIONS_LIMIT}")
        self._work, self._per_character, self._per_name = 0, sum(map(len, expressions)), _PLAIN_COST * len(values)
        for pattern, value in values.items():
            self._tests.append((_plain(pattern) if _PLAIN.fullmatch(pattern) else _expression(pattern), value))

    def value(self, module: str) -> float | None:
        """The value for a module by its full name, None if no pattern matches."""
        if module not in self._known:
            self._work += self._per_character * len(module) + self._per_name
            if self._work > WORK_LIMIT:
                raise BadPattern("and its neighbours are too many for the modules they are tried on")
            self._known[module] = next((value for matches, value in self._tests if matches(module)), None)
        return self._known[module]


def _plain(pattern: str) -> Callable[[str], bool]:
    """A pattern of letters and dots; a dot stands for any character, as in every regular expression."""
    ending, start_only = pattern.removeprefix("^"), pattern.startswith("^")
    length, last = len(ending), ending.rpartition(".")[2]

    def matches(name: str) -> bool:
        before = len(name) - length
        if not name.endswith(last) or before < 0 or (before and (start_only or name[before - 1] != ".")):
            return False
        return name[before:] == ending or all(p in (c, ".") for p, c in zip(ending, name[before:], strict=True))

    return matches


def _expression(pattern: str) -> Callable[[str], bool]:
    import re2  # only few adapters have expressions

    for ambiguous, why in _AMBIGUOUS:
        if ambiguous.search(pattern):
            raise BadPattern(why)
    options = re2.Options()
    options.log_errors, options.never_capture, options.max_mem = False, True, MEMORY_LIMIT_BYTES
    whole = rf"(.*\.)?({pattern})$"
    try:
        compiled = re2.compile(whole, options)
    except re2.error as error:
        raise BadPattern(_reason(pattern, error)) from None
    if not _valid(whole):
        raise BadPattern("is not a valid regular expression of Python")

    def matches(name: str) -> bool:
        if not (name.isascii() and name.isprintable()):
            raise BadPattern("is tried on a module whose name is not plain ASCII")
        return compiled.match(name) is not None

    return matches


def _valid(expression: str) -> bool:
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _reason(pattern: str, error: Exception) -> str:
    if re.search(r"\(\?<?[=!]", pattern):
        return "looks ahead or behind, which cannot be matched in linear time"
    reason = error.args[0] if error.args else ""
    text = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
    return f"RE2 cannot read ({text[:80]})"
