"""HTML from values. Text is escaped unless it was made here, so no page can forget to.

`tag("p", "5 < 6")` -> `<p>5 &lt; 6</p>`. Control, bidirectional and zero-width characters of strangers are dropped
(reliability.md 4.6): they can make one name look like another.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable
from urllib.parse import quote, urlsplit

_VOID = frozenset({"br", "hr", "img", "meter", "input"}) - {"meter"}
# U+00AD and the Cf category hold soft hyphens, zero-width and bidirectional marks; Cc holds ANSI's escape character.
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co"})

Child = "str | Markup | None | Iterable[Child]"


class Markup(str):
    """Text that is HTML already. Only this module makes it from text."""

    __slots__ = ()


def plain(text: object) -> str:
    """`text` without characters that do not show; line breaks and tabs become spaces."""
    spaced = str(text).replace("\n", " ").replace("\t", " ").replace("\r", " ")
    return "".join(each for each in spaced if unicodedata.category(each) not in _HIDDEN_CATEGORIES)


def escape(text: object) -> Markup:
    """Text for between tags or within a quoted attribute.

    Gradio reads `${...}` and `{{...}}` in an HTML value as templates, so these characters go as entities too.
    """
    escaped = html.escape(plain(text), quote=True)
    return Markup(escaped.replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;").replace("`", "&#96;"))


def join(children: Iterable[object]) -> Markup:
    """Join children: Markup as it is, None as nothing, sequences flattened, all else escaped."""
    parts: list[str] = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, (list, tuple)):
            parts.append(join(child))
        else:
            parts.append(escape(child))
    return Markup("".join(parts))


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """An element. `class_` and `for_` lose their underscore, others become hyphens; None and False omit one."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape("" if value is True else value)}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Markup(f"<{name}{shown}>")
    return Markup(f"<{name}{shown}>{join(children)}</{name}>")


def link(address: str | None, *children: object, **attributes: object) -> Markup:
    """A link that opens beside the page; anything but an http(s) address stays plain text."""
    try:
        scheme = urlsplit(address or "").scheme
    except ValueError:
        scheme = ""
    if scheme not in ("http", "https"):
        return tag("span", *children)
    return tag("a", *children, href=address, target="_blank", rel="noopener noreferrer", **attributes)


def repo_link(hub: str, repo: str, revision: str | None = None) -> Markup:
    """Link to a model repo on the Hub, with the first 7 hex of its commit."""
    address = f"{hub}/{quote(repo)}" + (f"/tree/{quote(revision, safe='')}" if revision else "")
    short = None if revision is None else tag("code", revision[:7], class_="sha", title=revision)
    return join([link(address, repo), " " if short else None, short])
