"""`mergebot evaluate`: a model, and the models it is held against, measured alike with lm-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from bot.errors import Failed


def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A folder or a Hub repo (owner/name[@revision]).", metavar="MODEL")],
    against: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="A model to compare with, such as a parent; repeat it. Measured once and kept."),
    ] = None,
    suite: Annotated[
        str,
        typer.Option(
            help="quick, offline, generative, leaderboard-v1, leaderboard-v2, demo-skills, or a suite file (*.yml)."
        ),
    ] = "quick",
    task: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--task",
            "--tasks",
            help="In place of a suite, what lm-eval takes: tasks, groups, tags, patterns, task files or folders; "
            "repeat it or use commas.",
        ),
    ] = None,
    limit: Annotated[Optional[int], typer.Option(help="Samples a task, at most.", min=1)] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option(help="Write JSON here, and a picture.", metavar="FILE")] = None,  # noqa: UP045
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it is there.")] = False,
    first_look: Annotated[
        bool, typer.Option(help="Look whether the models speak, and refuse one that talks nonsense.")
    ] = True,
    chat_template: Annotated[
        bool,
        typer.Option(
            "--chat-template",
            help="Ask through the models' chat templates; all have to have one. Verdicts need equal prompts.",
        ),
    ] = False,
    batch_size: Annotated[str, typer.Option(help="auto, or a number.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    backend: Annotated[str, typer.Option(help="hf, or vllm (needs mergebot[vllm]).")] = "hf",
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
) -> None:
    """Measure a model with lm-eval, and its parents beside it. Stopped half-way, the same command continues."""
    from bot.cli import evaluation_output, output
    from bot.stages import local_runs, sanity_check, suite_file
    from bot.stages.evaluator_errors import translated
    from evaluators.harness.conditions import Conditions, Question

    asked = suite_file.chosen(suite, task or ())
    conditions = Conditions(limit, seed, device, dtype, batch_size, chat_template, backend)
    with translated():
        conditions.check()
    configured = context.obj()
    if out is not None:
        local_runs.require_writable(out, overwrite=overwrite)
    try:
        with output.progress() as shown:
            models = local_runs.whole_models([model, *(against or ())], configured, shown)
            looks = {}
            if first_look:
                looks = sanity_check.first_look(models, model, configured, shown, device=device, dtype=dtype)
            question = Question(asked, conditions)
            evaluated = local_runs.evaluate(models, question, configured, shown, evaluation_output.estimate)
    except Failed as failed:
        if failed.code != "MODEL_NONSENSE":
            raise
        advice = "Merge with smaller weights or another method, or add --no-first-look to measure it all the same."
        raise Failed(failed.code, failed.message, advice) from failed
    found = evaluated.found
    comparison, why_not = sanity_check.compared(
        found[model], {name: each for name, each in found.items() if name != model}, configured
    )
    evaluation_output.first_look(looks)
    evaluation_output.evaluations(evaluated, comparison, why_not)
    if out is not None:
        evaluation_output.written(local_runs.write_evaluations(out, found, comparison, looks, configured))
