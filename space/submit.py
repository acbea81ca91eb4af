"""Submit tab: the recipe, the evaluation, a preview of the plan, and the button."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from bot.jobs.job import Job
from bot.service.intake import Checked
from bot.settings import LIVE_HUB, Settings
from evaluators.harness import suites
from space import login, words
from space.desk import Desk, Refusal, attempt, now
from space.markup import Markup, join, tag
from space.pieces import facts_table, notice, panel, refused, sources_table

EXAMPLE_LIMIT_BYTES = 64 * 1024

_SMOL = "HuggingFaceTB/SmolLM2-135M"
EXAMPLES = {
    "Average of two models (linear)": f"""\
# Every tensor is the weighted mean of the two.
merge_method: linear
models:
  - model: {_SMOL}
    parameters:
      weight: 0.4
  - model: {_SMOL}-Instruct
    parameters:
      weight: 0.6
dtype: bfloat16
""",
    "Between two models, by layer (slerp)": f"""\
# t runs from the base model (0) to the other one (1), along the layers.
merge_method: slerp
base_model: {_SMOL}
models:
  - model: {_SMOL}-Instruct
parameters:
  t: [0.2, 0.5, 0.8]
dtype: bfloat16
""",
    "Add what a fine-tune learned (task_arithmetic)": f"""\
# The difference to the base model, scaled, is added to the base model.
merge_method: task_arithmetic
base_model: {_SMOL}
models:
  - model: {_SMOL}-Instruct
    parameters:
      weight: 0.8
dtype: bfloat16
""",
}


def examples(settings: Settings) -> dict[str, str]:
    """Recipes to start from, by title: the operator's, else ours for the live Hub."""
    if settings.examples is None:
        return EXAMPLES if settings.hub == LIVE_HUB else {}
    found: dict[str, str] = {}
    for file in sorted(settings.examples.glob("*.yml")):
        if file.stat().st_size > EXAMPLE_LIMIT_BYTES:
            continue
        text = file.read_text(encoding="utf-8")
        first = text.partition("\n")[0]
        title = first.removeprefix("#").strip() if first.startswith("#") else file.stem.replace("_", " ")
        found[title or file.stem] = text
    return found


def build(desk: Desk) -> tuple[gr.Button, gr.State]:
    """The tab; returns the button that follows the submitted job, and the id of that job."""
    offered = examples(desk.settings)
    first = next(iter(offered), None)
    with gr.Row(elem_classes="columns"):
        with gr.Column(scale=7, min_width=320):
            example = gr.Dropdown(
                choices=list(offered),
                value=first,
                label="Start from an example",
                visible=bool(offered),
                elem_id="example",
            )
            recipe = gr.Code(
                value=offered[first] if first else "",
                language="yaml",
                label="Recipe (mergekit YAML)",
                lines=16,
                max_lines=28,
                interactive=True,
                elem_id="recipe",
                buttons=["copy"],
            )
            with gr.Row(elem_classes="fields"):
                name = gr.Textbox(
                    label="Name of the merged model",
                    placeholder="my-merge",
                    max_length=96,
                    max_lines=1,
                    info=f"Published as {desk.settings.namespace}/<you>-<name>.",
                    elem_id="merge-name",
                    min_width=260,
                )
                suite = gr.Radio(
                    choices=[(_suite_label(each), each) for each in suites.SUITES],
                    value=desk.settings.suite,
                    label="Evaluate with lm-eval",
                    info="The sources are evaluated under the same conditions.",
                    elem_id="suite",
                    min_width=300,
                )
            with gr.Accordion("Evaluation options", open=False):
                tasks = gr.Dropdown(
                    choices=_all_tasks(),
                    multiselect=True,
                    label="Only these tasks",
                    info="Replaces the tasks of the suite. Leave empty for the whole suite.",
                    elem_id="tasks",
                )
                limit = gr.Number(
                    label="Samples per task",
                    info="Leave empty for all. Fewer samples are faster and give wider intervals.",
                    precision=0,
                    minimum=1,
                    maximum=10_000,
                    value=None,
                    elem_id="limit",
                )
            speed = gr.Checkbox(
                label="Train Medusa heads and measure the speedup",
                value=True,
                elem_id="speed",
                info=f"Adds at most {words.duration(desk.settings.speed_budget_s)}.",
            )
            with gr.Row(elem_classes="actions"):
                check = gr.Button("Check", elem_id="check")
                submit = gr.Button("Submit", variant="primary", elem_id="submit")
        with gr.Column(scale=5, min_width=320):
            answer = panel(_intro(bool(offered)), elem_id="answer", elem_classes="panel")
            follow = gr.Button("Follow this job", visible=False, elem_id="follow")
            job_id = gr.State(None)

    example.input(
        lambda title: offered.get(title, ""), example, recipe, api_visibility="private", show_progress="hidden"
    )
    options: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 4, "concurrency_id": "hub"}
    check.click(_checker(desk), recipe, [answer, follow], show_progress_on=answer, **options)
    inputs = [recipe, name, suite, tasks, limit, speed]
    submit.click(_submitter(desk), inputs, [answer, follow, job_id], show_progress_on=answer, **options)
    return follow, job_id


def _checker(desk: Desk) -> Callable[..., tuple[Markup, gr.Button]]:
    def check(recipe: str, request: gr.Request) -> tuple[Markup, gr.Button]:
        visitor = login.visitor(request, desk.settings)
        checked = attempt(lambda: desk.check(visitor, recipe or ""))
        shown = refused(checked) if isinstance(checked, Refusal) else _plan_page(checked, desk.settings.hub)
        return shown, gr.Button(visible=False)

    return check


def _submitter(desk: Desk) -> Callable[..., tuple[Markup, gr.Button, str | None]]:
    def submit(
        recipe: str, name: str, suite: str, tasks: list[str], limit: float | None, speed: bool, request: gr.Request
    ) -> tuple[Markup, gr.Button, str | None]:
        visitor = login.visitor(request, desk.settings)
        form = {
            "recipe": recipe or "",
            "name": name or "",
            "suite": suite,
            "tasks": tasks or [],
            "limit": None if limit is None else int(limit),
            "speed": "medusa" if speed else "off",
        }
        before = now()
        job = attempt(lambda: desk.submit(visitor, **form))
        if isinstance(job, Refusal):
            return refused(job), gr.Button(visible=False), None
        known = job.submitted_at < before
        return _accepted(job, desk.queue.position(job.id), known), gr.Button(visible=True), job.id

    return submit


def _accepted(job: Job, ahead: int, known: bool) -> Markup:
    waiting = "It starts next." if ahead == 0 else f"{words.plural(ahead, 'job')} before it in the queue."
    message = "You requested this before. This is its job." if known else f"Accepted. {waiting}"
    name = tag("p", "Job ", tag("code", job.id), f", {job.request.name}", class_="next")
    return notice(message, name, kind="good", role="status")


def _plan_page(checked: Checked, hub: str) -> Markup:
    """A plan in a sentence and a table."""
    plan = checked.plan
    notices = [tag("li", notice["text"]) for notice in plan.get("notices", [])]
    message = (
        f"The recipe is valid: {plan['method']} over {words.plural(len(checked.sources), 'model')} gives a model of "
        f"{words.count(plan['parameters'])} parameters. Nothing has been queued yet."
    )
    return tag(
        "div",
        notice(message, kind="good", role="status"),
        facts_table(_plan_rows(plan, checked.licence)),
        tag("h3", "Sources, pinned to a commit"),
        sources_table(checked.sources, hub, plan),
        join([tag("h3", "Notices"), tag("ul", notices, class_="notes")]) if notices else None,
    )


def _plan_rows(plan: Mapping[str, Any], licence: str) -> list[tuple[str, object]]:
    dtypes = ", ".join(plan.get("dtypes") or {})
    return [
        ("Method", tag("code", plan["method"])),
        ("Tensors", f"{plan['tensors']:,}" + (f" in {dtypes}" if dtypes else "")),
        ("Parameters", words.count(plan["parameters"])),
        ("Read", words.size(plan["bytes_in"])),
        ("Written", words.size(plan["bytes_out"])),
        ("Memory, at most", words.size(plan["peak_memory_bytes"])),
        ("License of the result", licence),
    ]


def _intro(offered: bool) -> Markup:
    start = "Use the example, or edit it." if offered else "Paste a mergekit recipe."
    steps = (
        ("Check", "reads the headers of the sources and shows the plan. Nothing is queued."),
        ("Submit", "queues the merge. It is merged, evaluated, published, and listed on the leaderboard."),
        ("Then", "only the evaluated files are published, with the commit of every source."),
    )
    return tag(
        "div",
        tag("h3", "Request a merge"),
        tag("p", start),
        tag("dl", [[tag("dt", name), tag("dd", text)] for name, text in steps], class_="steps"),
        class_="intro",
    )


def _suite_label(suite: str) -> str:
    count = len(suites.SUITES[suite].tasks)
    return f"{suite} ({words.plural(count, 'task')})" if count else "nothing"


def _all_tasks() -> list[str]:
    return sorted({task.name for suite in suites.SUITES.values() for task in suite.tasks})
