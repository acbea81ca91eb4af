"""Commands of `mergebot medusa`. Options are validated before heavy imports.

`context.obj` is the function of bot.cli.main that creates the settings from the options.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from bot.cli import options
from bot.cli.options import Command

app = typer.Typer(no_args_is_help=True, help="Train Medusa heads and measure the decoding speed.")
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Dtype = Annotated[str, typer.Option(help="auto (the fastest type on this machine), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="Device: auto, cpu or cuda.")]


@app.command("bench", cls=Command)
def bench(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or Hub repo.", metavar="MODEL")],
    out: Annotated[
        Path, typer.Option(help="Report file (NAME.json) or its folder; trained heads are written beside it.")
    ] = Path("medusa"),
    heads: Annotated[list[Path] | None, typer.Option(help="Heads to time instead of training; repeatable.")] = None,
    parent: Annotated[list[str] | None, typer.Option(help="NAME=DIR: heads of a parent; repeatable.")] = None,
    tree: Annotated[
        Path | None, typer.Option(help="File with the tree, .json or .py; FILE.py:NAME selects one of several.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Questions in MT-bench's JSON lines format.")] = None,
    questions: Annotated[int, typer.Option(help="Number of questions; a verdict needs 8.", min=1)] = 16,
    new_tokens: Annotated[int, typer.Option(help="Maximum new tokens per answer.", min=8)] = 48,
    turns: Annotated[int, typer.Option(help="2 includes the second turn of each question.", min=1, max=2)] = 1,
    budget_s: Annotated[
        float, typer.Option(help="Time budget in seconds, loading included; at least one question is timed.", min=10)
    ] = 600.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Benchmark decoding with Medusa heads (new, given or the parents') against baseline greedy decoding."""
    from bot.cli import medusa_output, output
    from bot.stages import head_training, local_runs, speed_test
    from bot.stages.head_candidates import by_hand, require_folder
    from evaluators.medusa import SpeedOptions

    kind = options.one_of("--dtype", dtype, options.PRECISIONS)
    for folder in heads or ():
        require_folder(folder)
    head_training.require_readable(prompts, None, tree)
    configured = context.obj(device=options.device(device))
    beside = out.with_suffix("") if out.suffix == ".json" else out
    with output.progress() as report:
        found = local_runs.model_folder(model, configured, report)
        given = by_hand(found, heads or (), parent or (), beside, configured, seed)
        test = SpeedOptions(prompts, budget_s, questions, new_tokens, turns, seed, given=given, dtype=kind, tree=tree)
        measured = speed_test.bench(found, beside, test, configured, report)
    medusa_output.speed(measured, _at(out, beside))


def _at(out: Path, beside: Path) -> Path:
    """Move the report to its path; keep the folder beside it only if it holds heads."""
    written = beside / "decode_speed.json"
    if out == beside:
        return written
    written.replace(out)
    if not any(beside.iterdir()):
        beside.rmdir()
    return out


@app.command("generate", cls=Command)
def generate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or Hub repo.", metavar="MODEL")],
    prompt: Annotated[str, typer.Argument(help="Prompt.", metavar="PROMPT")],
    heads: Annotated[Path | None, typer.Option(help="Heads of any format; default: those of the model's repo.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Maximum new tokens.", min=1)] = 256,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; repeatable.")] = None,
    sample: Annotated[
        str, typer.Option(help="greedy and exact preserve the model's output; typical is Medusa's approximate rule.")
    ] = "greedy",
    temperature: Annotated[
        float, typer.Option(help="Temperature of exact and typical sampling.", min=0.01, max=10)
    ] = 0.7,
    top_k: Annotated[int, typer.Option(help="Exact sampling: top-k tokens; 0: all.", min=0)] = 0,
    top_p: Annotated[float, typer.Option(help="Exact sampling: top-p probability.", min=0.01, max=1)] = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Generate with Medusa heads and stream the text; accepted draft tokens are green."""
    from bot.cli import medusa_output, output
    from bot.stages import head_training, local_runs
    from bot.stages.head_candidates import require_folder

    kind = options.one_of("--dtype", dtype, options.PRECISIONS)
    options.one_of("--sample", sample, head_training.SAMPLING)
    if heads is not None:
        require_folder(heads)
    configured = context.obj(device=options.device(device))
    with output.progress() as report:
        folder = local_runs.model_folder(model, configured, report)
    from bot.merge.execution.engine import choose_device
    from evaluators.medusa import generation
    from evaluators.medusa.model import threads

    how = head_training.rule(sample, temperature, seed, top_k, top_p)
    chosen = choose_device(configured.device).type
    with threads.steadiest_threads(chosen):
        generator = generation.load(folder, heads, device=chosen, dtype=kind)
        medusa_output.stream(generator.generate(prompt, new_tokens, how, [text for text in stop or () if text]))
    medusa_output.summary(generator.trace, generator.tree.nodes, generator.notes)


@app.command("export", cls=Command)
def export(
    context: typer.Context,
    heads: Annotated[Path, typer.Argument(help="Heads of any format, or a model folder with heads.", metavar="HEADS")],
    out: Annotated[Path, typer.Argument(help="Output folder.", metavar="OUT")],
    model: Annotated[str, typer.Option(help="Model of the heads, a folder or a Hub repo.")],
    layout: Annotated[
        str,
        typer.Option(
            "--format",
            help="v1, v2, tgi or vllm (for heads trained with --no-conditioned), or ours.",
        ),
    ],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Convert Medusa heads between formats."""
    from bot.cli import output
    from bot.stages import head_training, local_runs
    from bot.stages.head_candidates import require_folder
    from bot.stages.output_folder import new_folder

    options.one_of("--format", layout, head_training.LAYOUTS)
    options.one_of("--dtype", dtype, options.PRECISIONS[1:])
    require_folder(heads)
    new_folder(out)
    configured = context.obj(device="cpu")
    with output.progress() as report:
        folder = local_runs.model_folder(model, configured, report)
        from evaluators.medusa import formats

        notes = formats.export(heads, out, layout, folder, base_model=model, dtype=dtype)
    for note in notes:
        output.console.print(f"Note: {note}.", soft_wrap=True, markup=False)
    output.console.print(f"The {layout} heads are in {out}.", soft_wrap=True, markup=False)


@app.command("train", cls=Command)
def train(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or Hub repo.", metavar="MODEL")],
    out: Annotated[Path, typer.Argument(help="Output folder of the heads.", metavar="OUT")],
    budget_s: Annotated[float, typer.Option(help="Time budget in seconds for answers and training.", min=5)] = 600.0,
    kind: Annotated[str, typer.Option(help="shared: the model's lm_head; own: one projection per head.")] = "shared",
    heads: Annotated[int, typer.Option(help="Number of heads.", min=1, max=16)] = 3,
    layers: Annotated[int, typer.Option(help="Residual blocks per head.", min=1, max=8)] = 1,
    conditioned: Annotated[
        bool,
        typer.Option(help="Condition the first block on the next token: more accurate, readable by mergebot only."),
    ] = True,
    vocab: Annotated[str, typer.Option(help="Size of the draft vocabulary, or full.", metavar="N|full")] = "8192",
    prompts: Annotated[Path | None, typer.Option(help="Training prompts in MT-bench's JSON lines format.")] = None,
    test: Annotated[Path | None, typer.Option(help="Test questions to exclude from training.")] = None,
    answers: Annotated[
        int | None, typer.Option(help="Number of prompts to answer, regardless of the budget.", min=1)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Number of training steps, regardless of the budget.", min=1)
    ] = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="Also train the model (Medusa-2). THIS CHANGES THE MODEL.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Train Medusa heads on the model's own answers. After an interruption the same command continues."""
    from bot.cli import output
    from bot.stages import head_training, local_runs

    made = cast("Literal['shared', 'own']", options.one_of("--kind", kind, ("shared", "own")))
    precision, kept = options.one_of("--dtype", dtype, options.PRECISIONS), options.vocabulary(vocab)
    head_training.require_room(out)
    head_training.require_readable(prompts, test)
    configured = context.obj(device=options.device(device))
    with output.progress() as report:
        folder = local_runs.model_folder(model, configured, report)
        from evaluators.medusa.training.head_training import HeadTrainingConfig

        config = HeadTrainingConfig(
            *(budget_s, made, heads, layers, conditioned, kept, prompts, test, seed, joint, steps, answers),
            dtype=precision,
        )
        facts = head_training.train(folder, out, config, configured, report)
    for sentence in head_training.told(facts, model, out):
        output.console.print(sentence, soft_wrap=True, markup=False, highlight=False)
