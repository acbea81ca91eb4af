"""The demo: the bot's main job on this machine with a local Hub. No account, no token, no GPU.

    DIR/hub/      the local Hub's repos            DIR/bot/     the bot's database, caches and scratch
    DIR/family/   base, two parents, their skills  DIR/port     the Hub's port, kept so that links stay valid
    DIR/token     the bot's write token for that Hub, created by the first run

Everything is kept: a second run reuses the trained models and the published jobs.
"""

from __future__ import annotations

import importlib.resources
import json
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from rich.markup import escape

from bot.demo import base, parents, skills
from bot.errors import Failed
from bot.jobs.job import ENDED, Job, Stage, stage
from bot.progress import Show
from bot.service import serve
from bot.settings import Settings, activate
from evaluators.harness.scores import ModelEvaluation
from evaluators.medusa.speed.report import Report

REQUESTER = "visitor"
BOT = "mergebot"
FAMILY = base.REPO.partition("/")[0]
SPEED_BUDGET_S = 60.0
WATCH_S = 0.2
SUITE = "demo-skills"
CARD_REPO = f"{REQUESTER}/skills-averaged"


class Display(Protocol):
    """Shows the demo to a person; the modules of `bot.cli` that print have this shape."""

    def progress(self) -> AbstractContextManager[Show]: ...

    def say(self, sentence: str) -> None: ...

    def scores(self, evaluations: Mapping[str, ModelEvaluation]) -> None: ...


def demo(directory: Path, display: Display, *, once: bool, report: Path | None, port: int) -> None:
    """Run the main job in `directory`, show it, write `report`, then serve the Space at `port` unless `once`."""
    started = time.monotonic()
    directory.mkdir(parents=True, exist_ok=True)
    directory = directory.resolve()
    token = _token(directory / "token")
    with _local_hub(directory, token) as address:
        settings = _settings(directory, address)
        activate(settings)
        seconds = _fill(directory, display)
        ended, kept = _walk(settings, display)
        jobs = _published(ended, display)
        seconds["total"] = time.monotonic() - started
        made = _report(jobs, settings, seconds, kept)
        _show(jobs, made, display)
        if report is not None:
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(json.dumps(made, indent=1) + "\n")
            display.say(f"The report is in {escape(str(report))}.")
        if not once:
            serve.serve(settings, "127.0.0.1", port)


@contextmanager
def _local_hub(directory: Path, token: str) -> Iterator[str]:
    """The Hub, listening; yields its address."""
    from bot.localhub import add_user, create_app
    from bot.localhub.serve import running

    root = directory / "hub"
    add_user(root, BOT, token, role="write")
    add_user(root, REQUESTER, None)
    with running(create_app(root), "127.0.0.1", _port(directory / "port")) as address:
        (directory / "port").write_text(address.rpartition(":")[2])
        yield address


def _fill(directory: Path, display: Display) -> dict[str, float]:
    """Make base, parents, their skills' datasets and the requesting card, and put them on the Hub. Returns seconds."""
    from bot.localhub import seed

    seconds: dict[str, float] = {}
    with display.progress() as shown:
        folders = _family(directory / "family", shown, seconds)
    began, content = time.monotonic(), directory / "family" / "content"
    for repo, folder in folders.items():
        _link(folder, content / "models" / repo)
    for name, folder in skills.write(content / "datasets" / BOT).items():
        assert folder.name == name
    for name in ("README.md", "mergekit_config.yml"):
        target = content / "models" / CARD_REPO / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_text(f"card/{name}"))
    seed(directory / "hub", content)
    seconds["hub"] = time.monotonic() - began
    return seconds


def _family(folder: Path, shown: Show, seconds: dict[str, float]) -> dict[str, Path]:
    """The folders of base and parents by the repo they become."""
    began = time.monotonic()
    found = {base.REPO: base.build(folder, lambda done, total, what: shown("Base model", done, total))}
    seconds["base"] = time.monotonic() - began
    began = time.monotonic()
    for skill in skills.ALL:
        repo, what = f"{FAMILY}/smollm2-135m-{skill.name}", f"Training the parent for {skill.name}"
        out = folder / f"smollm2-135m-{skill.name}"

        def trained(done: int, total: int, _loss: float, what: str = what) -> None:
            shown(what, done, total)

        found[repo] = parents.train(found[base.REPO], skill, out, trained)
    seconds["parents"] = time.monotonic() - began
    return found


def _link(folder: Path, target: Path) -> None:
    """Link the files of `folder` under another name, without a second copy of the weights."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in sorted(folder.iterdir()):
        if file.is_file():
            (target / file.name).hardlink_to(file)


def _port(file: Path) -> int:
    """The port of the last run if it is free again, else any."""
    import socket

    try:
        wanted = int(file.read_text())
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", wanted))
        return wanted
    except (OSError, ValueError):
        return 0


def _token(file: Path) -> str:
    """The bot's write token for the local Hub, readable by its owner only."""
    if not file.exists():
        file.touch(mode=0o600)
        file.write_text(f"hf_{secrets.token_hex(17)}")
    return file.read_text()


def _settings(directory: Path, address: str) -> Settings:
    return Settings(
        home=directory / "bot",
        hub=address,
        namespace=BOT,
        publish_token_file=directory / "token",
        poll_s=2.0,
        tick_s=0.5,
        suite=SUITE,
        examples=Path(str(importlib.resources.files("bot.demo") / "texts" / "examples")),
        speed_budget_s=SPEED_BUDGET_S,
        speed_questions=8,  # the fewest that allow a verdict
        speed_new_tokens=32,
    )


def _walk(settings: Settings, display: Display) -> tuple[list[Job], list[str]]:
    """One request through each door, followed to its end. The first job is the form's; of its stages, those are named
    that an earlier run had done.
    """
    from bot.jobs.request import EvaluateOptions, from_form
    from bot.service import intake
    from bot.service.scheduler import Scheduler

    scheduler = Scheduler(settings)
    options = EvaluateOptions(suite=SUITE, speed="medusa")
    request = from_form(REQUESTER, _text("form.yml"), "both-skills", options)
    form = intake.take(request, scheduler.hub, scheduler.queue, settings)
    kept = list(_stages(form))
    scheduler.start()
    try:
        with display.progress() as shown:
            jobs = _follow(scheduler, form.id, shown)
        scheduler.tell()  # write the leaderboard before it is shown
    finally:
        scheduler.stop()
    return jobs, kept


def _stages(job: Job) -> dict[str, float]:
    """The seconds of each stage that is done."""
    facts = {"merge": job.merge, "evaluate": job.evaluation, "publish": job.publication}
    return {name: fact.seconds for name, fact in facts.items() if fact is not None}


def _follow(scheduler: Any, form: str, shown: Show) -> list[Job]:
    """Show progress until the jobs of the form and of the card have ended; other jobs are ignored."""
    pause = threading.Event()
    while True:
        own = [job for job in scheduler.queue.jobs() if job.id == form or job.request.repo == CARD_REPO]
        jobs = sorted(own, key=lambda job: (job.id != form, job.submitted_at))
        now = datetime.now(UTC)
        for job in jobs:
            if job.progress is not None and job.progress.total > 0:
                shown(f"{job.request.name}: {job.progress.text}", job.progress.done, job.progress.total)
        refused = [refusal for request, job, refusal in scheduler.queue.unanswered() if refusal]
        if refused:
            raise Failed(
                refused[0]["code"], f"The demo's card was refused: {refused[0]['message']}", refused[0]["next"]
            )
        if len(jobs) > 1 and all(stage(job, now) in ENDED for job in jobs):
            return jobs
        pause.wait(WATCH_S)


def _published(jobs: list[Job], display: Display) -> list[Job]:
    """The published ones of `jobs`, the form's first; a cancelled job of the card is reported and left out.

    Raises Failed if the form's job was not published, or another one failed.
    """
    published = []
    for number, job in enumerate(jobs):
        ended = stage(job, datetime.now(UTC))
        name = job.request.name
        if ended is Stage.PUBLISHED:
            published.append(job)
        elif ended is not Stage.CANCELLED:
            last = job.failures[-1]
            raise Failed(last.code, f"{name} was not published: {last.sentence}", last.next_step)
        elif number == 0:
            raise Failed(
                "CANCELLED", f"{name} was cancelled while it ran.", "Run the demo again; it sends a new request."
            )
        else:
            display.say(f"{escape(name)} was cancelled, so it is not published.")
    return published


def _report(jobs: list[Job], settings: Settings, seconds: dict[str, float], kept: list[str]) -> dict[str, Any]:
    """The form's merge in full, and every request's end; the seconds of the stages `kept` are an earlier run's."""
    from pydantic import TypeAdapter

    from bot.hub import Hub
    from bot.jobs.job import Evaluation, Merge
    from bot.publishing import leaderboard

    first = jobs[0]
    assert first.merge and first.evaluation and first.publication
    evaluation = TypeAdapter(Evaluation).dump_python(first.evaluation, mode="json")
    rows = leaderboard.read(Hub(settings.hub), settings)
    return {
        "recipe": json.loads(first.recipe),
        "plan": dict(first.plan),
        "merge": TypeAdapter(Merge).dump_python(first.merge, mode="json"),
        "evaluation": {"merged": evaluation["merged"], "parents": evaluation["sources"]},
        "decode_speed": evaluation["decode_speed"],
        "publication": {"repo": first.publication.repo, "commit": first.publication.commit},
        "leaderboard": [asdict(row) for row in rows],
        "requests": [
            {"origin": job.request.origin.value, "name": job.request.name, "repo": job.publication.repo}
            for job in jobs
            if job.publication
        ],
        "seconds": {name: round(value, 2) for name, value in {**seconds, **_stages(first)}.items()},
        "kept": kept,
    }


def _show(jobs: list[Job], made: dict[str, Any], display: Display) -> None:
    evaluations: dict[str, ModelEvaluation] = {}
    for job in jobs:
        assert job.evaluation and job.publication
        for name, evaluation in reversed(tuple(job.evaluation.sources.items())):
            evaluations.setdefault(name.partition("@")[0], evaluation)
        if job.evaluation.merged:
            evaluations[f"{job.publication.repo} ({job.plan['method']})"] = job.evaluation.merged
    display.scores(evaluations)
    if made["decode_speed"] is not None:
        display.say(escape(Report.from_dict(made["decode_speed"]).sentence or ""))
    for row in made["leaderboard"]:
        display.say(f"[green]published[/green] {escape(row['repo_url'])}")
    display.say(f"[dim]{escape(_took(made['seconds'], made['kept']))}[/dim]")


def _took(seconds: dict[str, float], kept: list[str]) -> str:
    """Seconds of each part of this run, and the parts that were already complete."""
    took = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items() if name not in kept)
    return took + (f"; kept from an earlier run: {', '.join(kept)}" if kept else "")


def _text(name: str) -> str:
    return importlib.resources.files("bot.demo").joinpath("texts", name).read_text()
