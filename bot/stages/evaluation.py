"""Between the job and lm-eval: which folders to measure, with which suite, under which conditions.

A source is evaluated once for all merges that share it: the harness keeps its results by content, suite and settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bot.errors import Refused
from bot.jobs import shared_evaluations
from bot.jobs.job import Source
from bot.jobs.request import EvaluateOptions
from bot.progress import Show, named
from bot.settings import Settings, child_environment
from bot.stages import early_stopping
from bot.stages.evaluator_errors import translated
from evaluators import comparison, harness
from evaluators.harness import Estimate, suites
from evaluators.harness.conditions import Conditions, Question
from evaluators.harness.scores import ModelEvaluation

if TYPE_CHECKING:
    from bot.hub import Hub

NO_SUITE = "none"


def suite_named(name: str) -> suites.Suite:
    """The suite with this name. Raises Refused UNKNOWN_TASK."""
    if name not in suites.SUITES:
        raise Refused(
            "UNKNOWN_TASK", f"There is no suite `{name}`.", f"Choose one of {', '.join(sorted(suites.SUITES))}."
        )
    return suites.SUITES[name]


def measures_nothing(asked: EvaluateOptions) -> bool:
    """Whether no model is to be scored at all."""
    return asked.suite == NO_SUITE and not asked.tasks


def question_of(asked: EvaluateOptions, settings: Settings) -> Question:
    """The question of a request. Raises Refused UNKNOWN_TASK."""
    suite = suites.own_suite(asked.tasks) if asked.tasks else suite_named(asked.suite)
    return Question(
        suite,
        Conditions(
            limit=asked.limit, device=settings.device, batch_size="auto", chat_template=asked.chat_template
        ),
    )  # fmt: skip


def scores(
    out: Path,
    manifest: str,
    sources: tuple[Source, ...],
    asked: EvaluateOptions,
    settings: Settings,
    scratch: Path,
    report: Show,
) -> tuple[ModelEvaluation | None, dict[str, ModelEvaluation]]:
    """The merged model's scores, and its sources' by `repo@revision`.

    The merge is asked first what tells its sources apart most a second, so that what is known early, or when time runs
    out, is what counts most. Raises Failed as the harness does, and NOT_BETTER where the operator lets hopeless merges
    be stopped early.
    """
    if measures_nothing(asked):
        return None, {}
    question = question_of(asked, settings)
    found = {}
    for source in (source for source in sources if not source.adapter):
        folder = settings.source_folder(source.repo, source.revision)
        found[str(source)] = evaluate(folder, source.repo, question, settings, scratch, report, str(source))
    looks: list[ModelEvaluation] = []
    order = comparison.most_telling(found, cache=settings.evaluations)

    def of_merge(limit: int | None) -> ModelEvaluation:
        here = replace(question, conditions=replace(question.conditions, limit=limit))
        found_here = evaluate(
            out, "the merge", here, settings, scratch, report, manifest, reuse=looks[-1:], order=order
        )
        looks.append(found_here)
        return looks[-1]

    early_stopping.require_hope(of_merge, found, settings)
    return of_merge(asked.limit), found


def is_known(source: Source, asked: EvaluateOptions, settings: Settings, hub: Hub) -> bool:
    """Whether a source was measured before, here or for the results dataset, so that its weights need not be here."""
    repo = f"{settings.namespace}/{shared_evaluations.RESULTS}"
    return shared_evaluations.take(hub, repo, question_of(asked, settings), str(source), settings)


def evaluate(
    folder: Path,
    name: str,
    question: Question,
    settings: Settings,
    scratch: Path,
    report: Show,
    identity: str | None,
    estimated: Callable[[Estimate], None] | None = None,
    reuse: Sequence[ModelEvaluation] = (),
    order: Sequence[str] = (),
) -> ModelEvaluation:
    """`identity` stands for the bytes (a commit, a manifest) and spares hashing them again; `reuse` are the same
    model's evaluations on fewer samples, whose questions are not asked again; `order` names tasks to begin with."""
    with translated(about=name):
        return harness.evaluate(
            folder,
            question.suite,
            **asdict(question.conditions),
            endpoint=settings.hub,
            cache=settings.evaluations,
            scratch=scratch / "lm-eval",
            timeout_s=settings.evaluate_timeout_s,
            model_identity=identity,
            environment=child_environment(settings, "worker"),
            progress=named(report, f"Evaluating {name}"),
            estimated=estimated,
            memory_limit_bytes=settings.memory_limit_bytes,
            reuse=reuse,
            order=order,
        )
