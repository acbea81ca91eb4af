"""Page of one job: its stage, its facts as recorded, and its failures."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from bot.jobs.job import ENDED, Failure, Job, Progress, Stage, missing, stage
from evaluators.medusa.speed.report import Report
from evaluators.pictures.speed_figure import speed_figure
from space import verdict_page, words
from space.markup import Markup, join, repo_link, tag
from space.pieces import facts_table, notice, picture, sources_table

STEPS = (
    (Stage.MERGING, "Merge"),
    (Stage.EVALUATING, "Evaluate"),
    (Stage.PUBLISHING, "Publish"),
)


def job_page(job: Job, hub: str, ahead: int, at: datetime) -> Markup:
    """All facts about `job`. `ahead` is the number of open jobs before it."""
    stands = stage(job, at)
    return tag(
        "article",
        _title(job, at),
        _steps(job, stands),
        _headline(job, hub, stands, ahead),
        verdict_page.evaluation(job.evaluation, job.request.name),
        _speed(job.evaluation.decode_speed) if job.evaluation else None,
        tag("h3", "Sources"),
        sources_table(job.sources, hub, job.plan),
        tag("h3", "Plan and facts"),
        facts_table(_facts(job)),
        _failures(job.failures),
        class_="job",
    )


def progress_bar(progress: Progress) -> Markup:
    """Progress of the running stage, as a bar with text."""
    part = min(max(progress.done / progress.total, 0.0), 1.0) if progress.total > 0 else 0.0
    bar = tag("progress", value=f"{part:.3f}", max="1", aria_label=progress.text)
    return tag("div", bar, tag("span", f"{100 * part:.0f}\u00a0%, {progress.text}", class_="fine"), class_="progress")


def _title(job: Job, at: datetime) -> Markup:
    tried = f", attempt {job.attempts}" if job.attempts > 1 else ""
    request = f", requested by {job.request.requester} {words.age(job.submitted_at, at)}{tried}"
    return tag("header", tag("h2", job.request.name), tag("p", "Job ", tag("code", job.id), request, class_="fine"))


def _steps(job: Job, stands: Stage) -> Markup:
    """Merge, evaluate, publish: done, running, or ahead."""
    facts = (job.merge, job.evaluation, job.publication)
    lacking = missing(job)
    items = []
    for (step, word), fact in zip(STEPS, facts, strict=True):
        if fact is not None:
            state, note = "done", words.duration(fact.seconds)
        elif step is lacking and stands is step:
            state, note = "now", "running"
        elif step is lacking and stands in ENDED:
            state, note = "stopped", stands.value
        else:
            state, note = "later", "pending" if stands not in ENDED else "not reached"
        items.append(tag("li", tag("b", word), tag("span", note), class_=state))
    return tag("ol", items, class_="steps-bar", aria_label="Stages")


def _headline(job: Job, hub: str, stands: Stage, ahead: int) -> Markup:
    """The one thing to know now, with the next step."""
    if job.publication is not None:
        where = repo_link(hub, job.publication.repo, job.publication.commit)
        return notice(["Published as ", where], kind="good")
    if stands is Stage.CANCELLED:
        return notice("Cancelled by its owner. Nothing was published.")
    if stands is Stage.FAILED:
        last = job.failures[-1]
        next_step = tag("p", last.next_step, class_="next") if last.next_step else None
        return notice(
            last.sentence, next_step, tag("p", tag("code", last.code), class_="fine"), kind="bad", role="alert"
        )
    if stands is Stage.QUEUED:
        later = job.failures[-1].retry_at if job.failures else None
        if later is not None:
            return notice(f"It is tried again at {later:%H:%M} UTC. Its results so far are kept.")
        return notice(f"{words.plural(ahead, 'job')} before it in the queue." if ahead else "It starts next.")
    return tag("div", progress_bar(job.progress or Progress("Starting", 0, 1)), class_="notice", aria_live="polite")


def _facts(job: Job) -> list[tuple[str, object]]:
    plan = job.plan
    rows: list[tuple[str, object]] = [("Method", tag("code", plan.get("method", words.MISSING)))]
    for title, key, shown in (
        ("Tensors", "tensors", "{:,}".format),
        ("Parameters", "parameters", words.count),
        ("Read", "bytes_in", words.size),
    ):
        if key in plan:
            rows.append((title, shown(plan[key])))
    if job.merge is not None:
        rows.append(("Written", words.size(job.merge.bytes)))
        rows.append(("Manifest of the bytes", tag("code", job.merge.manifest[:16], title=job.merge.manifest)))
    elif "bytes_out" in plan:
        rows.append(("Planned output", words.size(plan["bytes_out"])))
    options = job.request.evaluate
    suite = ", ".join(options.tasks) or options.suite
    samples = f", {options.limit} samples per task" if options.limit else ""
    rows.append(("Requested evaluation", f"{suite}{samples}; speed test {options.speed}"))
    return rows


def _speed(report: Mapping[str, Any] | None) -> Markup | None:
    """Speed test: the report's sentence, and its picture if decoding was timed."""
    if report is None:
        return None
    speed = Report.from_dict(report)
    drawn = speed_figure(speed)
    shown = picture(drawn, "Decoding speed relative to baseline decoding") if drawn else None
    return join([tag("h3", "Speed"), tag("p", speed.sentence or "Nothing could be measured."), shown])


def _failures(failures: tuple[Failure, ...]) -> Markup | None:
    if not failures or (len(failures) == 1 and failures[0].retry_at is None):
        return None  # the headline says it
    rows = [
        tag(
            "li",
            tag("b", f"While {failure.stage.value}: "),
            failure.sentence,
            " ",
            failure.next_step,
            tag("span", " Tried again." if failure.retry_at else " That ended the job.", class_="fine"),
        )
        for failure in failures
    ]
    return join([tag("h3", "What went wrong"), tag("ol", rows, class_="notes")])
