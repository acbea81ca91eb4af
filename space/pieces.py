"""Elements that more than one tab shows: notices, tables, pictures, the sources of a merge."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from bot.jobs.job import Source
from space import words
from space.desk import Refusal
from space.markup import Markup, repo_link, tag

# Options of an event that only redraws the page.
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}


@dataclass(frozen=True, slots=True)
class Look:
    """Event handler that draws a tab again, with its components."""

    handler: Callable[..., Any]
    inputs: list[Any]
    outputs: list[Any]

    def on(self, event: Callable[..., Any], **options: Any) -> Any:
        """Draw the tab again at `event`."""
        return event(self.handler, self.inputs, self.outputs, **QUIET, **options)


def panel(value: Markup | None = None, **options: Any) -> gr.HTML:
    """Component for our own HTML, or an update of one, without the borders that Gradio draws around table cells."""
    return gr.HTML(value, apply_default_css=False, **options)


def refused(refusal: Refusal) -> Markup:
    """A refusal for people: the problem, its place and the next step."""
    where = refusal.where
    place = [
        tag("span", "Line ", tag("b", where.line), " ") if where and where.line else None,
        tag("code", where.path) if where and where.path else None,
    ]
    return notice(
        _capital(refusal.message),
        tag("p", *place, class_="place") if any(place) else None,
        tag("p", _capital(refusal.next_step), class_="next") if refusal.next_step else None,
        tag("p", tag("code", refusal.code), f" request {refusal.request_id}", class_="fine"),
        kind="bad",
        role="alert",
    )


def notice(message: object, *details: object, kind: str = "", **attributes: object) -> Markup:
    """A framed message with its details; `kind` is good or bad."""
    shown = tag("p", message, class_="message")
    return tag("div", shown, *details, class_=f"notice {kind}".rstrip(), **attributes)


def empty(sentence: str) -> Markup:
    """Sentence in place of something that does not exist yet."""
    return tag("div", tag("p", sentence), class_="empty")


def facts_table(rows: list[tuple[str, object]]) -> Markup:
    """Names and values, in two columns."""
    body = [tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in rows]
    return tag("table", tag("tbody", body), class_="facts")


def sources_table(sources: tuple[Source, ...], hub: str, plan: Mapping[str, Any]) -> Markup:
    """The models of a merge with their commits and licenses."""
    roles = {each["model"]: ", ".join(each.get("roles", ())) for each in plan.get("sources", [])}
    rows = [
        tag(
            "tr",
            tag("td", repo_link(hub, source.repo, source.revision)),
            tag("td", roles.get(str(source)) or words.MISSING),
            tag("td", source.licence or words.MISSING, class_="whole"),
            tag("td", words.size(source.bytes), class_="number"),
        )
        for source in sources
    ]
    return rows_table(("Source", "Role", "License", "Weights"), rows)


def rows_table(titles: tuple[str, ...], rows: list[Markup]) -> Markup:
    """A table that scrolls sideways on narrow pages."""
    head = tag("tr", [tag("th", title, scope="col") for title in titles])
    return _scrolling(tag("table", tag("thead", head), tag("tbody", rows), class_="rows"), titles[0])


def picture(drawn: str, says: str) -> Markup:
    """An SVG of ours as an image that scrolls sideways on narrow pages; `says` is its alternative text."""
    data = base64.b64encode(drawn.encode()).decode()
    return _scrolling(tag("img", src=f"data:image/svg+xml;base64,{data}", alt=says, class_="picture"), says)


def drawing(drawn: str, says: str) -> Markup:
    """An SVG of ours within the page, so that its hover texts show; "" without one.

    Its style is limited to itself and follows the page's dark mode.
    """
    scoped = drawn.replace("<style>", "<style>.drawing{").replace("</style>", "}</style>")
    inline = Markup(scoped.replace("@media (prefers-color-scheme:dark)", ".dark &"))
    return _scrolling(inline, says, "drawing scroll") if inline else inline


def _scrolling(content: Markup, label: str, class_: str = "scroll") -> Markup:
    return tag("div", content, class_=class_, tabindex="0", role="region", aria_label=label)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
