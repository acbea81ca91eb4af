"""Jobs tab: the newest jobs and one of them in full, refreshed every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from bot.jobs.job import ENDED, Job, Stage, stage
from space import login, words
from space.desk import Desk, Refusal, attempt, now
from space.job_page import job_page, progress_bar
from space.markup import Markup, tag
from space.pieces import QUIET, Look, empty, notice, panel, refused, rows_table

POLL_HERE_S = 2.0
POLL_PUBLIC_S = 5.0
RESEND_S = 20.0

# A click on a row, or Enter on its button, says which job; a refresh gives the focus back to the same button.
_SELECT_ROW = """
let focused = null;
element.addEventListener('click', (event) => {
    const row = event.target.closest('[data-job]');
    if (row) trigger('click', {job: row.dataset.job});
});
document.addEventListener('focusin', (event) => {
    const row = element.contains(event.target) ? event.target.closest('[data-job]') : null;
    focused = row ? row.dataset.job : null;
});
watch('value', () => {
    const row = focused && element.querySelector(`button[data-job="${focused}"]`);
    if (row) row.focus({preventScroll: true});
});
"""


@dataclass(frozen=True, slots=True)
class Parts:
    """Components that other parts of the page use."""

    chosen: gr.State
    look: Look
    timer: gr.Timer


def build(desk: Desk) -> Parts:
    chosen = gr.State(None)
    seen = gr.State(None)
    timer = gr.Timer(POLL_PUBLIC_S if desk.settings.public else POLL_HERE_S, active=False)
    with gr.Row(elem_classes="columns"):
        with gr.Column(scale=4, min_width=320):
            mine = gr.Checkbox(label="Only mine", value=False, elem_id="mine", container=False)
            table = panel(elem_id="jobs", js_on_load=_SELECT_ROW)
        with gr.Column(scale=8, min_width=320):
            page = panel(elem_id="job", elem_classes="panel")
            with gr.Row(elem_classes="actions"):
                cancel = gr.Button("Cancel this job", variant="stop", visible=False, elem_id="cancel")
                sure = gr.Button("Yes, stop it", variant="stop", visible=False, elem_id="cancel-sure")
                keep = gr.Button("Keep it", visible=False, elem_id="cancel-keep")
            answer = panel(elem_id="cancel-answer")

    buttons = [cancel, sure, keep]
    look = Look(_looker(desk), [chosen, mine, seen], [table, page, *buttons, chosen, seen])

    def choose(event: gr.EventData) -> str:
        return str(event._data.get("job", ""))

    look.on(timer.tick)
    look.on(mine.input)
    look.on(table.click(choose, None, chosen, **QUIET).then(lambda: "", None, answer, **QUIET).then)
    cancel.click(lambda: _buttons(False, True), None, buttons, **QUIET)
    keep.click(lambda: _buttons(True, False), None, buttons, **QUIET)
    cancelled = sure.click(_canceller(desk), chosen, answer, api_visibility="private", queue=False)
    look.on(cancelled.then(lambda: None, None, seen, **QUIET).then)
    return Parts(chosen, look, timer)


def _looker(desk: Desk) -> Callable[..., tuple[Any, ...]]:
    def look(chosen: str | None, mine: bool, seen: tuple[str, ...] | None, request: gr.Request) -> tuple[Any, ...]:
        """The list and the chosen job; unchanged parts since `seen` are left as they are."""
        visitor = login.visitor(request, desk.settings)
        jobs = attempt(lambda: desk.jobs(visitor or "" if mine else None))
        if isinstance(jobs, Refusal):
            return refused(jobs), gr.skip(), *_buttons(False, False), gr.skip(), None
        shown = chosen or (jobs[0].id if jobs else None)
        table = jobs_table(desk, jobs, shown, mine)
        job = attempt(lambda: desk.job(shown)) if shown else None
        page = _page(desk, job)
        can_cancel = isinstance(job, Job) and job.request.requester == visitor and stage(job, now()) not in ENDED
        # The answers to two looks can arrive in the wrong order; what is left as it is, is sent again before long.
        now_seen = (table, page, f"{shown} {can_cancel}", str(time.time() // RESEND_S))
        before = seen if seen and seen[3] == now_seen[3] else ("", "", seen[2] if seen else "", "")
        return (
            gr.skip() if table == before[0] else table,
            gr.skip() if page == before[1] else page,
            # "Yes, stop it" is for the job it was asked of: another one starts anew.
            *((gr.skip(),) * 3 if before[2] == now_seen[2] else _buttons(can_cancel, False)),
            # Never the old choice: a look that began before a click must not undo it.
            gr.skip() if chosen else shown,
            now_seen,
        )

    return look


def _canceller(desk: Desk) -> Callable[..., Markup]:
    def cancel(chosen: str | None, request: gr.Request) -> Markup:
        done = attempt(lambda: desk.cancel(login.visitor(request, desk.settings), chosen))
        if isinstance(done, Refusal):
            return refused(done)
        return notice("Cancelled. The running work is being stopped.", kind="good", role="status")

    return cancel


def _buttons(cancel: bool, sure: bool) -> tuple[gr.Button, gr.Button, gr.Button]:
    return gr.Button(visible=cancel), gr.Button(visible=sure), gr.Button(visible=sure)


def _page(desk: Desk, job: Job | Refusal | None) -> Markup:
    if job is None:
        return empty("The page of the chosen job appears here.")
    if isinstance(job, Refusal):
        return refused(job)
    return job_page(job, desk.settings.hub, desk.queue.position(job.id), now())


def jobs_table(desk: Desk, jobs: list[Job], chosen: str | None, mine: bool) -> Markup:
    """The newest jobs; a row is a button for its page."""
    if not jobs:
        whose = "You have not requested a merge yet" if mine else "No jobs yet"
        return empty(f"{whose}. Submit one in the first tab.")
    at = now()
    rows = []
    for job in jobs:
        stands = stage(job, at)
        name = tag(
            "button",
            job.request.name,
            type="button",
            data_job=job.id,
            class_="choose",
            aria_pressed="true" if job.id == chosen else "false",
        )
        of = tag("span", f"{job.plan.get('method', '')} by {job.request.requester}", class_="fine")
        cells = (
            tag("td", name, of, tag("span", words.age(job.submitted_at, at), class_="fine")),
            tag(
                "td", tag("span", stands.value.capitalize(), class_=f"pill {stands.value}"), _how_far(desk, job, stands)
            ),
        )
        rows.append(tag("tr", cells, data_job=job.id, class_="chosen" if job.id == chosen else None))
    return rows_table(("Merge", "Stage"), rows)


def _how_far(desk: Desk, job: Job, stands: Stage) -> Markup | None:
    if stands is Stage.QUEUED:
        ahead = desk.queue.position(job.id)
        later = job.failures[-1].retry_at if job.failures else None
        turn = f"tries again at {later:%H:%M} UTC" if later else f"{ahead} before it" if ahead else "next"
        return tag("span", turn, class_="fine")
    if stands is Stage.FAILED:
        return tag("span", job.failures[-1].sentence, class_="fine clip", title=job.failures[-1].sentence)
    if job.progress is not None and stands not in ENDED:
        return progress_bar(job.progress)
    return None
