"""Frame of every HTML page, and Markdown rendered as safe HTML."""

from __future__ import annotations

import html
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token

_STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8881; --link: #2563c9; }
@media (prefers-color-scheme: dark) { :root { --link: #8ab4f8; } }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem 1.25rem 4rem; }
a { color: var(--link); text-decoration: none } a:hover { text-decoration: underline }
nav { padding: .3rem 0 1rem; border-bottom: 1px solid var(--line); margin-bottom: 1.2rem }
h1 { font-size: 1.5rem; overflow-wrap: anywhere } h2 { font-size: 1.2rem; margin-top: 1.6rem }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: .8rem 0 }
td, th { border: 1px solid var(--line); padding: .3rem .6rem; text-align: left; vertical-align: top }
th { background: var(--soft) }
/* a table scrolls before a figure or a name in it is broken */
td code, td.number, td[style*="right"] { white-space: nowrap }
img { max-width: 100%; height: auto }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; border-radius: 6px }
code { font-family: ui-monospace, monospace; font-size: .9em; overflow-wrap: anywhere }
.tag { display: inline-block; border: 1px solid var(--line); border-radius: 1rem; padding: 0 .6rem }
.tag { margin: .15rem .2rem; font-size: .85rem }
time { white-space: nowrap }
blockquote { border-left: 3px solid var(--line); margin: .8rem 0; padding-left: .9rem }
.soft { opacity: .7; font-size: .9rem }
.number { text-align: right; font-variant-numeric: tabular-nums }
article { border: 1px solid var(--line); border-radius: 8px; padding: .2rem 1.2rem; margin: 1rem 0 }
"""

# No scripts, forms or foreign content: cards are untrusted.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; base-uri 'none'; form-action 'none'"


def page(title: str, body: str) -> str:
    """A complete page. `body` is trusted HTML; `title` is escaped here."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(POLICY)}">'
        f"<title>{html.escape(title)} · local Hub</title><style>{_STYLE}</style></head>"
        f'<body><nav><a href="/">Local Hub</a></nav>{body}</body></html>'
    )


def moment(stamp: str) -> str:
    """A timestamp to the minute."""
    return f'<time datetime="{html.escape(stamp)}">{html.escape(stamp[:16].replace("T", " "))}</time>'


_MARKDOWN = MarkdownIt("commonmark", {"html": False, "linkify": False}).enable("table")
# Media types of images by suffix; other files are never shown as images.
PICTURES = {
    ".gif": "image/gif",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".webp": "image/webp",
}


def markdown(text: str, files: Mapping[str, str] | None = None) -> str:
    """Markdown as HTML. Raw HTML is shown as text; the parser refuses script addresses.

    `files` maps paths in the repo to addresses: links are resolved to them, and images among them are shown as `<img>`.
    Every other image becomes a link.
    """
    tokens = _MARKDOWN.parse(text)
    for token in tokens:
        if token.children:
            token.children = list(_inline(token.children, files or {}))
    rendered: str = _MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {})
    return rendered


def _inline(tokens: Sequence[Token], files: Mapping[str, str]) -> Iterator[Token]:
    within = 0
    for token in tokens:
        within += (token.type == "link_open") - (token.type == "link_close")
        if token.type == "link_open":
            token.attrSet("href", _beside(str(token.attrGet("href")), files) or str(token.attrGet("href")))
        if token.type != "image":
            yield token
            continue
        source = str(token.attrGet("src"))
        if (address := _beside(source, files)) and _suffix(address) in PICTURES:
            token.attrSet("src", address)
            yield token
            continue
        named = Token("text", "", 0, content=token.content or source)
        yield from (named,) if within else (Token("link_open", "a", 1, {"href": source}), named, _LINK_END)


_LINK_END = Token("link_close", "a", -1)


def _beside(address: str, files: Mapping[str, str]) -> str | None:
    """Address of the repo file at a relative link."""
    try:
        path = posixpath.normpath(unquote(urlsplit(address).path))
    except ValueError:
        return None
    return files.get(path)


def _suffix(address: str) -> str:
    return posixpath.splitext(address)[1].lower()


def human_size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")
