"""Intake: a request is parsed, pinned, planned and checked before any weights move; then it is queued.

    check    text -> Checked: recipe with every source pinned to a commit, the plan from headers, the result's license
    take     check + quota -> the job that does the work

Form, cards and command line all come through here. After `take`, only pinned commits are used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from bot.errors import Failed, LimitReached, QueueFull, Refused, Transient
from bot.hub import Hub, PinnedRepo
from bot.jobs import policy
from bot.jobs.job import ENDED, Job, Source, Stage, stage
from bot.jobs.queue import Queue
from bot.jobs.request import (
    CARD_LIMIT_BYTES,
    RECIPE_LIMIT_BYTES,
    REQUEST_TAG,
    CardBlock,
    EvaluateOptions,
    MergeRequest,
    Origin,
    from_card,
    read_block,
    unreadable_card,
)
from bot.merge.checkpoints import checkpoint
from bot.merge.checkpoints.lora import Adapter
from bot.merge.planning import planner, summary
from bot.merge.planning.plan import NUMERICS_VERSION
from bot.merge.recipe import document
from bot.merge.recipe import reading as recipe
from bot.merge.tokenizer.named_templates import TEMPLATES
from bot.settings import Settings, failpoint
from bot.stages import evaluation, sources
from evaluators.harness import suites

# Refusals that time mends: a form is told at once, a card waits its turn.


@dataclass(frozen=True, slots=True)
class Checked:
    """A recipe that can be done: pinned, planned and licensed."""

    recipe: recipe.Recipe
    sources: tuple[Source, ...]
    plan: Mapping[str, Any]  # `planning.summary`
    licence: str


def check(text: str, hub: Hub, settings: Settings) -> Checked:
    """Check the recipe `text` from headers alone. Raises Refused, or Transient while the Hub is unavailable."""
    asked = recipe.parse(text, trust="stranger")
    parts = (*(made.recipe for made in asked.stages), asked)
    if any(part.chat_template not in (None, "auto", *TEMPLATES) for part in parts):
        raise Refused(
            "NOT_SUPPORTED",
            "The recipe has its own chat template, and the bot publishes only known templates.",
            f"Leave `chat_template` out, or write `auto`, {', '.join(f'`{name}`' for name in TEMPLATES)}.",
        )
    seen = sources.opened(asked, lambda: hub, limits=checkpoint.UNTRUSTED, accept=_require_open)
    failpoint("resolve.after_pin")
    made = summary.summary(planner.make(seen.recipe, seen.sources, limits=checkpoint.UNTRUSTED))
    policy.check_size(made, disk_limit_bytes=settings.disk_limit_bytes, memory_limit_bytes=settings.memory_limit_bytes)
    found = tuple(_source(seen.repos[ref], source) for ref, source in seen.sources.items())
    return Checked(seen.recipe, found, made, policy.result_licence(found))


def _source(repo: PinnedRepo, source: sources.Source) -> Source:
    weights = sum(tensor.nbytes for tensor in source.tensors.values())
    return Source(repo.repo, repo.revision, repo.licence, weights, adapter=isinstance(source, Adapter))


def _require_open(source: PinnedRepo) -> None:
    """Refuse private sources: a merge is published, so its sources must be public (docs/design/reliability.md 5)."""
    if source.gated or source.private:
        kind = "gated" if source.gated else "private"
        raise Refused(
            "SOURCE_GATED",
            f"{source.repo} is {kind}, and a merge of it would be public.",
            "Use a public source.",
            value=source.repo,
        )


def take(request: MergeRequest, hub: Hub, queue: Queue, settings: Settings) -> Job:
    """Accept `request`, or refuse it with a reason. The same request again returns the same job."""
    check_evaluation(request.evaluate)
    request, known = _known(request, queue)
    if known is not None:
        return known
    checked = check(request.text, hub, settings)
    policy.check_quota(
        open_jobs=queue.open_jobs(request.requester),
        requests_today=queue.requests_since(request.requester, datetime.now(UTC) - timedelta(days=1)),
        open_limit=settings.open_requests_per_person,
        day_limit=settings.requests_per_person_and_day,
    )
    failpoint("intake.before_insert")
    job = queue.submit(
        request,
        digest=_digest(checked.recipe.digest, request.evaluate),
        recipe=checked.recipe.canonical(),
        sources=checked.sources,
        plan=dict(checked.plan),
    )
    failpoint("intake.after_insert")
    return job


def check_evaluation(asked: EvaluateOptions) -> None:
    """Refuse suites and tasks that are not on the bot's list. Raises Refused UNKNOWN_TASK with the nearest name."""
    listed = {task.name for suite in suites.SUITES.values() for task in suite.tasks}
    for kind, name, names in (
        ("suite", asked.suite, {*suites.SUITES, evaluation.NO_SUITE}),
        *(("task", task, listed) for task in asked.tasks),
    ):
        if name not in names:
            next_step = document.nearest(name, names)
            raise Refused("UNKNOWN_TASK", f"There is no {kind} {document.shown(name)}.", next_step, value=name)


def _known(request: MergeRequest, queue: Queue) -> tuple[MergeRequest, Job | None]:
    """Existing job of this request. After a failure the same form counts as a new request."""
    while True:
        known = queue.known(request.key)
        if not isinstance(known, Job):
            return request, None
        ended_badly = stage(known, datetime.now(UTC)) in ENDED - {Stage.PUBLISHED}
        if request.origin is not Origin.FORM or not ended_badly:
            return request, known
        request = replace(request, run=request.run + 1)


def _digest(recipe_digest: str, evaluate: EvaluateOptions) -> str:
    """Identity of the work: two requests with one digest share one job (hub.md 2.4)."""
    identity = {"recipe": recipe_digest, "evaluate": asdict(evaluate), "numerics": NUMERICS_VERSION}
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def changed(hub: Hub, settings: Settings, seen: Set[tuple[str, str]]) -> list[PinnedRepo]:
    """Public repos with the request tag at a commit that is not in `seen`."""
    own = f"{settings.namespace}/"
    return [
        repo
        for repo in hub.tagged(REQUEST_TAG)
        if not (repo.repo.startswith(own) or repo.private or repo.gated or (repo.repo, repo.revision) in seen)
    ]


def take_tagged(repo: PinnedRepo, hub: Hub, queue: Queue, settings: Settings) -> None:
    """Accept the request in a repo's card, or record its refusal. Raises Transient if it cannot be read now.

    The request belongs to the namespace of the repo, since only its members can write to `main`.
    """
    readme = ""
    try:
        readme = hub.read_text(repo.repo, repo.revision, "README.md", limit_bytes=CARD_LIMIT_BYTES) or ""
        block = read_block(readme)
        request = from_card(repo.repo, repo.revision, block, _recipe_of(hub, repo.repo, repo.revision, block))
    except Refused as refusal:
        queue.refuse(unreadable_card(repo.repo, repo.revision, readme), refusal)
        return
    if not block.enabled or queue.known(request.key) is not None:
        return
    try:
        take(request, hub, queue, settings)
    except (LimitReached, QueueFull) as refusal:
        raise Transient(refusal.code, refusal.message, refusal.next_step) from refusal
    except (Refused, Failed) as refusal:
        queue.refuse(request, refusal)


def _recipe_of(hub: Hub, repo: str, revision: str, block: CardBlock) -> str:
    if block.recipe is not None:
        return block.recipe
    assert block.recipe_path is not None
    text = hub.read_text(repo, revision, block.recipe_path, limit_bytes=RECIPE_LIMIT_BYTES)
    if text is None:
        raise Refused(
            "CARD_INVALID",
            f"The card names the recipe {block.recipe_path}, and {repo} has no such file.",
            "Add the file, or write the recipe into the card.",
        )
    return text
