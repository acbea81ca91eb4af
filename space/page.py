"""The page: header, three tabs, and their visibility."""

from __future__ import annotations

from typing import Any

import gradio as gr

from space import api, board, jobs, login, submit
from space.desk import Desk
from space.markup import Markup, join, link, tag
from space.pieces import QUIET, panel
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
                follow, job_id = submit.build(desk)
            with gr.Tab("Jobs", id="jobs") as jobs_tab:
                list_of_jobs = jobs.build(desk)
            with gr.Tab("Leaderboard", id="leaderboard") as board_tab:
                leaderboard = board.build(desk)
        # Only the visible tab polls.
        timer, opened = list_of_jobs.timer, [tabs, list_of_jobs.chosen, list_of_jobs.timer]
        submit_tab.select(_asleep, None, timer, **QUIET)
        leaderboard.on(board_tab.select(_asleep, None, timer, **QUIET).then)
        list_of_jobs.look.on(jobs_tab.select(_awake, None, timer, **QUIET).then)
        followed = follow.click(lambda job: (gr.Tabs(selected="jobs"), job, _awake()), job_id, opened, **QUIET)
        list_of_jobs.look.on(followed.then)
        leaderboard.on(list_of_jobs.look.on(blocks.load(_opened, None, opened, **QUIET).then).then)
    return blocks


def _asleep() -> gr.Timer:
    return gr.Timer(active=False)


def _awake() -> gr.Timer:
    return gr.Timer(active=True)


def _opened(request: gr.Request) -> tuple[Any, Any, Any]:
    """`/?job=ID` opens that job's page, `/?tab=leaderboard` that tab."""
    query = dict(request.query_params)
    if job_id := query.get("job"):
        return gr.Tabs(selected="jobs"), str(job_id)[:64], _awake()
    tab = query.get("tab")
    if tab in ("jobs", "leaderboard"):
        return gr.Tabs(selected=tab), gr.skip(), gr.Timer(active=tab == "jobs")
    return gr.skip(), gr.skip(), gr.skip()


def _masthead(hub: str) -> Markup:
    purpose = "Merges language models, measures what came of it, and publishes exactly what it measured. Hub: "
    return join([tag("h1", LOGO, "mergebot"), tag("p", purpose, link(hub, hub.partition("://")[2] or hub))])
