"""Pieces that more than one tab shows: a refusal, a table of facts, the sources of a merge."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import gradio as gr

from bot.jobs.job import Source
from space import words
from space.desk import Refusal
from space.markup import Markup, repo_link, tag


def panel(value: Markup | None = None, **options: Any) -> gr.HTML:
    """A place for our own HTML, or news for one: without the borders Gradio draws around each table cell."""
    return gr.HTML(value, apply_default_css=False, **options)


def refused(refusal: Refusal) -> Markup:
    """A refusal for people: the problem, its place and the next step."""
    where = refusal.where
    place = [
        tag("span", "Line ", tag("b", where.line), " ") if where and where.line else None,
        tag("code", where.path) if where and where.path else None,
    ]
    return tag(
        "div",
        tag("p", _capital(refusal.message), class_="message"),
        tag("p", *[part for part in place if part], class_="place") if any(place) else None,
        tag("p", _capital(refusal.next_step), class_="next") if refusal.next_step else None,
        tag("p", tag("code", refusal.code), f" request {refusal.request_id}", class_="fine"),
        class_="notice bad",
        role="alert",
    )


def facts_table(rows: list[tuple[str, object]]) -> Markup:
    """Names and values, in two columns."""
    body = [tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in rows]
    return tag("table", tag("tbody", body), class_="facts")


def sources_table(sources: tuple[Source, ...], hub: str, plan: Mapping[str, Any]) -> Markup:
    """The models a merge is made of, with their commits and licences."""
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


def rows_table(titles: tuple[str, ...], rows: list[Markup], caption: str | None = None) -> Markup:
    """A table that scrolls sideways on narrow pages."""
    head = tag("tr", [tag("th", title, scope="col") for title in titles])
    shown = tag("caption", caption) if caption else None
    table = tag("table", shown, tag("thead", head), tag("tbody", rows), class_="rows")
    return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=caption or titles[0])


def picture(drawn: str, says: str) -> Markup:
    """An SVG of ours as an image that scrolls sideways on narrow pages; `says` is its alternative text."""
    data = base64.b64encode(drawn.encode()).decode()
    image = tag("img", src=f"data:image/svg+xml;base64,{data}", alt=says, class_="picture")
    return tag("div", image, class_="scroll", tabindex="0", role="region", aria_label=says)


def drawing(drawn: str, says: str) -> Markup:
    """An SVG of ours within the page, so that its hover texts show; "" without one.

    Its style is limited to itself and follows the page's dark mode.
    """
    scoped = drawn.replace("<style>", "<style>.drawing{").replace("</style>", "}</style>")
    inline = Markup(scoped.replace("@media (prefers-color-scheme:dark)", ".dark &"))
    if not inline:
        return inline
    return tag("div", inline, class_="drawing scroll", tabindex="0", role="region", aria_label=says)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
