"""`mergebot evaluate`: evaluates a model and the models to compare with under equal conditions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bot.errors import Failed, ModelNonsense


def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or Hub repo (owner/name[@revision]).", metavar="MODEL")],
    against: Annotated[
        list[str] | None,
        typer.Option(help="Model to compare with, such as a parent; repeatable. Evaluated once and cached."),
    ] = None,
    suite: Annotated[
        str,
        typer.Option(
            help="quick, offline, generative, leaderboard-v1, leaderboard-v2, demo-skills, or a suite file (*.yml)."
        ),
    ] = "quick",
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            "--tasks",
            help="Instead of a suite, as for lm_eval --tasks: tasks, groups, tags, patterns, task files or folders; "
            "repeat it or use commas.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Maximum samples per task.", min=1)] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the scores as JSON, and a figure beside it.", metavar="FILE")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it exists.")] = False,
    first_look: Annotated[
        bool, typer.Option(help="Run the sanity check before the benchmark; refuse a model that generates nonsense.")
    ] = True,
    chat_template: Annotated[
        bool,
        typer.Option(
            "--chat-template",
            help="Apply the models' chat templates; each model needs one. Verdicts need equal prompts.",
        ),
    ] = False,
    batch_size: Annotated[str, typer.Option(help="Batch size: auto or a number.")] = "auto",
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    backend: Annotated[str, typer.Option(help="hf, or vllm (needs mergebot[vllm]).")] = "hf",
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
) -> None:
    """Evaluate a model and its parents with lm-eval. After an interruption the same command continues."""
    from bot.cli import evaluation_output, output
    from bot.stages import local_runs, sanity_check, suite_file
    from evaluators.harness.eval_config import EvalConfig, Question

    chosen = suite_file.chosen(suite, task or ())
    config = EvalConfig(limit, seed, device, dtype, batch_size, chat_template, backend)
    config.check()
    configured = context.obj()
    if out is not None:
        local_runs.require_writable(out, overwrite=overwrite)
    try:
        with output.progress() as report:
            models = local_runs.whole_models([model, *(against or ())], configured, report)
            checks = {}
            if first_look:
                checks = sanity_check.first_look(models, model, configured, report, device=device, dtype=dtype)
            question = Question(chosen, config)
            evaluated = local_runs.evaluate(models, question, configured, report, evaluation_output.estimate)
    except ModelNonsense as failed:
        advice = "Merge with smaller weights or another method, or add --no-first-look to evaluate it anyway."
        raise Failed(failed.code, failed.message, advice) from failed
    results = evaluated.found
    comparison, why_not = sanity_check.compared(
        results[model], {name: each for name, each in results.items() if name != model}, configured
    )
    evaluation_output.sanity_checks(checks)
    evaluation_output.evaluations(evaluated, comparison, why_not)
    if out is not None:
        evaluation_output.written(local_runs.write_evaluations(out, results, comparison, checks, configured))
