"""Evaluation of a job: the merged model and its sources, on the requested suite.

The harness stores results by content, suite and settings, so a source is evaluated once for all merges that share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bot.errors import Refused
from bot.jobs import shared_evaluations
from bot.jobs.job import Source
from bot.jobs.request import EvaluateOptions
from bot.progress import Show, named
from bot.settings import Settings, child_environment
from bot.stages import early_stopping
from bot.stages.error_subjects import translated
from evaluators import comparison, harness
from evaluators.harness import Estimate, RunOptions, suites
from evaluators.harness.eval_config import EvalConfig, Question
from evaluators.harness.scores import ModelEvaluation

if TYPE_CHECKING:
    from bot.hub import Hub

NO_SUITE = "none"


@dataclass(frozen=True, slots=True)
class Model:
    """Model to evaluate: its folder, its name in messages, and its identity (a commit or a manifest's digest), which
    spares hashing the weights."""

    folder: Path
    name: str
    identity: str | None


def _ignored(_estimate: Estimate) -> None:
    """Default callback."""


def suite_named(name: str) -> suites.Suite:
    """Suite by name. Raises Refused UNKNOWN_TASK."""
    if name not in suites.SUITES:
        raise Refused(
            "UNKNOWN_TASK", f"There is no suite `{name}`.", f"Choose one of {', '.join(sorted(suites.SUITES))}."
        )
    return suites.SUITES[name]


def measures_nothing(asked: EvaluateOptions) -> bool:
    """Return whether the request asks for no evaluation."""
    return asked.suite == NO_SUITE and not asked.tasks


def question_of(asked: EvaluateOptions, settings: Settings) -> Question:
    """Suite and conditions of a request. Raises Refused UNKNOWN_TASK."""
    suite = suites.own_suite(asked.tasks) if asked.tasks else suite_named(asked.suite)
    return Question(
        suite,
        EvalConfig(asked.limit, device=settings.device, batch_size="auto", chat_template=asked.chat_template),
    )


def scores(
    out: Path,
    manifest: str,
    sources: tuple[Source, ...],
    asked: EvaluateOptions,
    settings: Settings,
    scratch: Path,
    report: Show,
) -> tuple[ModelEvaluation | None, dict[str, ModelEvaluation]]:
    """Evaluate the merged model and its sources; the sources' evaluations are keyed by `repo@revision`.

    The merge's tasks run in order of information per second, so a cut-off run keeps the most useful results. Raises
    Failed as the harness does, and NOT_BETTER if the operator enabled early stopping and the merge cannot win.
    """
    if measures_nothing(asked):
        return None, {}
    question = question_of(asked, settings)
    found = {}
    for source in (source for source in sources if not source.adapter):
        folder = settings.source_folder(source.repo, source.revision)
        parent = Model(folder, source.repo, str(source))
        found[str(source)] = evaluate(parent, question, settings, scratch, report)
    looks: list[ModelEvaluation] = []
    order = comparison.most_telling(found, cache=settings.evaluations)
    merge = Model(out, "the merge", manifest)

    def of_merge(limit: int | None) -> ModelEvaluation:
        here = replace(question, conditions=replace(question.conditions, limit=limit))
        looks.append(evaluate(merge, here, settings, scratch, report, reuse=looks[-1:], order=order))
        return looks[-1]

    early_stopping.require_hope(of_merge, found, settings)
    return of_merge(asked.limit), found


def is_known(source: Source, asked: EvaluateOptions, settings: Settings, hub: Hub) -> bool:
    """Return whether a stored evaluation makes the weights of a source unnecessary."""
    repo = f"{settings.namespace}/{shared_evaluations.RESULTS}"
    return shared_evaluations.take(hub, repo, question_of(asked, settings), str(source), settings)


def evaluate(
    model: Model,
    question: Question,
    settings: Settings,
    scratch: Path,
    report: Show,
    estimated: Callable[[Estimate], None] = _ignored,
    reuse: Sequence[ModelEvaluation] = (),
    order: Sequence[str] = (),
) -> ModelEvaluation:
    """Evaluate one model, or return its stored evaluation. `reuse` are evaluations of the same model on fewer samples;
    their requests are not repeated. `order` names the tasks that run first. Raises Failed as the harness does."""
    run = RunOptions(
        cache=settings.evaluations,
        scratch=scratch / "lm-eval",
        timeout_s=settings.evaluate_timeout_s,
        endpoint=settings.hub,
        environment=child_environment(settings, "worker"),
        memory_limit_bytes=settings.memory_limit_bytes,
        progress=named(report, f"Evaluating {model.name}"),
        estimated=estimated,
    )
    with translated(about=model.name):
        return harness.evaluate(model.folder, question, run, identity=model.identity, order=order, reuse=reuse)
