"""The page: header, three tabs, and their visibility."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from space import api, board, jobs, login, submit
from space.desk import Desk
from space.markup import Markup, join, link, tag
from space.pieces import panel
from space.theme import LOGO


def build(desk: Desk) -> gr.Blocks:
    """The Blocks, with every named endpoint."""
    with gr.Blocks(title="mergebot", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        api.publish(desk)  # first, so that no event of the page takes one of its names
        with gr.Row(elem_classes="masthead"):
            panel(_masthead(desk.settings.hub), elem_id="masthead")
            if login.login_required(desk.settings):
                gr.LoginButton(size="sm", elem_id="login", min_width=200)
            else:
                panel(tag("p", "You are ", tag("b", login.LOCAL_VISITOR), class_="who"), elem_id="who")
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Submit", id="submit") as submit_tab:
                asked = submit.build(desk)
            with gr.Tab("Jobs", id="jobs") as jobs_tab:
                followed = jobs.build(desk)
            with gr.Tab("Leaderboard", id="leaderboard") as board_tab:
                ranked = board.build(desk)
        _connect(blocks, tabs, (submit_tab, jobs_tab, board_tab), asked, followed, ranked)
    return blocks


def _connect(
    blocks: gr.Blocks,
    tabs: gr.Tabs,
    each: tuple[gr.Tab, gr.Tab, gr.Tab],
    asked: submit.Parts,
    followed: jobs.Parts,
    ranked: board.Parts,
) -> None:
    """Events between tabs. Only the visible tab polls."""
    submit_tab, jobs_tab, board_tab = each
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
    asleep: Callable[[], gr.Timer] = lambda: gr.Timer(active=False)  # noqa: E731
    submit_tab.select(asleep, None, followed.timer, **quiet)
    board_tab.select(asleep, None, followed.timer, **quiet).then(ranked.look, ranked.inputs, ranked.outputs, **quiet)
    jobs_tab.select(lambda: gr.Timer(active=True), None, followed.timer, **quiet).then(
        followed.look, followed.inputs, followed.outputs, **quiet
    )
    asked.follow.click(
        lambda job_id: (gr.Tabs(selected="jobs"), job_id, gr.Timer(active=True)),
        asked.job_id,
        [tabs, followed.chosen, followed.timer],
        **quiet,
    ).then(followed.look, followed.inputs, followed.outputs, **quiet)
    blocks.load(_opened, None, [tabs, followed.chosen, followed.timer], **quiet).then(
        followed.look, followed.inputs, followed.outputs, **quiet
    ).then(ranked.look, ranked.inputs, ranked.outputs, **quiet)


def _opened(request: gr.Request) -> tuple[Any, Any, Any]:
    """`/?job=ID` opens that job's page, `/?tab=leaderboard` that tab."""
    asked = dict(request.query_params)
    if job_id := asked.get("job"):
        return gr.Tabs(selected="jobs"), str(job_id)[:64], gr.Timer(active=True)
    tab = asked.get("tab")
    if tab in ("jobs", "leaderboard"):
        return gr.Tabs(selected=tab), gr.skip(), gr.Timer(active=tab == "jobs")
    return gr.skip(), gr.skip(), gr.skip()


def _masthead(hub: str) -> Markup:
    told = "Merges language models, measures what came of it, and publishes exactly what it measured. Hub: "
    return join([tag("h1", LOGO, "mergebot"), tag("p", told, link(hub, hub.partition("://")[2] or hub))])
