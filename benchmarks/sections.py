"""A part of a results page that one program writes and the others leave alone: what stands between two markers."""

from __future__ import annotations


def section(page: str, name: str) -> str:
    """The marked part, markers included; empty where there is none."""
    begin, end = _markers(name)
    return begin + page.split(begin, 1)[1].split(end, 1)[0] + end if begin in page and end in page else ""


def with_section(page: str, name: str, body: str) -> str:
    """`page` with `body` as its marked part, at its old place or else at the end."""
    begin, end = _markers(name)
    new, old = f"{begin}\n\n{body.strip()}\n\n{end}", section(page, name)
    if old:
        return page.replace(old, new)
    return f"{page.rstrip()}\n\n{new}\n" if page.strip() else f"{new}\n"


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
