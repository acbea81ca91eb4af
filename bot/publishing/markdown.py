"""Untrusted text in Markdown, escaped so that it is only shown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from evaluators.comparison.report import joined

UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")


def plain(text: str) -> str:
    """Untrusted text as Markdown that shows it literally and notifies no user."""
    shown = UNSEEN.sub("", text).replace("\n", " ")
    shown = re.sub(r"([\\`*_{}\[\]<>#|~!])", r"\\\1", shown)
    return shown.replace("@", "@\u2060")


def code(text: str) -> str:
    """A name in code style, safe in a sentence and in a table."""
    return f"`{UNSEEN.sub('', text).replace('`', '´').replace('|', '¦')}`"


def fenced(text: str, language: str) -> str:
    """A block of text that cannot end its own fence."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{UNSEEN.sub('', text).rstrip()}\n{fence}"


def listed(names: Sequence[str]) -> str:
    """Names in code style, each once: `a`, `b` and `c`."""
    return joined([code(name) for name in dict.fromkeys(names)])


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """A table of cells that are Markdown already; the first `words` columns are set to the left, the others right."""
    rule = "|---" * words + "|---:" * (len(titles) - words) + "|"
    return "\n".join([f"| {' | '.join(titles)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])
