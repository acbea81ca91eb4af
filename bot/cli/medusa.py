"""The verbs of `mergebot medusa`. Options are looked at first; nothing heavy is imported before all of them hold.

`context.obj` is the function of bot.cli.main that makes settings of options.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Optional, cast

import typer

from bot.cli import options
from bot.cli.options import Verb

app = typer.Typer(no_args_is_help=True, help="Medusa heads: train them on a model and measure how fast it decodes.")
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Dtype = Annotated[str, typer.Option(help="auto: what the machine multiplies fastest; float32, bfloat16, float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


@app.command("bench", cls=Verb)
def bench(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A folder or a Hub repo.", metavar="MODEL")],
    out: Annotated[
        Path, typer.Option(help="The report (NAME.json), or a folder for it; trained heads lie beside it.")
    ] = Path("medusa"),
    heads: Annotated[Optional[list[Path]], typer.Option(help="Time these, train none; repeat it.")] = None,  # noqa: UP045
    parent: Annotated[Optional[list[str]], typer.Option(help="NAME=DIR: heads of a parent; repeat it.")] = None,  # noqa: UP045
    tree: Annotated[
        Path | None, typer.Option(help="A file of the tree to time, .json or .py; FILE.py:NAME for one of several.")
    ] = None,
    prompts: Annotated[Optional[Path], typer.Option(help="Questions, JSON lines as in MT-bench.")] = None,  # noqa: UP045
    questions: Annotated[int, typer.Option(help="How many of them; a verdict needs 8.", min=1)] = 16,
    new_tokens: Annotated[int, typer.Option(help="Tokens an answer, at most.", min=8)] = 48,
    turns: Annotated[int, typer.Option(help="2 also asks each question's second turn.", min=1, max=2)] = 1,
    budget_s: Annotated[
        float, typer.Option(help="Seconds for all of it, loading included; one question is always timed.", min=10)
    ] = 600.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Compare decoding with Medusa heads to plain greedy decoding, honestly: fresh heads, given ones, the parents'."""
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
    with output.progress() as shown:
        found = local_runs.model_folder(model, configured, shown)
        given = by_hand(found, heads or (), parent or (), beside, configured, seed)
        test = SpeedOptions(prompts, budget_s, questions, new_tokens, turns, seed, given=given, dtype=kind, tree=tree)
        report = speed_test.bench(found, beside, test, configured, shown)
    medusa_output.speed(report, _at(out, beside))


def _at(out: Path, beside: Path) -> Path:
    """The report where it was asked for; the folder beside a file is left only if heads lie in it."""
    written = beside / "decode_speed.json"
    if out == beside:
        return written
    written.replace(out)
    if not any(beside.iterdir()):
        beside.rmdir()
    return out


@app.command("generate", cls=Verb)
def generate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A folder or a Hub repo.", metavar="MODEL")],
    prompt: Annotated[str, typer.Argument(help="What you say to the model.", metavar="PROMPT")],
    heads: Annotated[Optional[Path], typer.Option(help="Heads of any format; else those it carries.")] = None,  # noqa: UP045
    new_tokens: Annotated[int, typer.Option(help="Tokens of the answer, at most.", min=1)] = 256,
    stop: Annotated[Optional[list[str]], typer.Option(help="End the answer with this text; repeat it.")] = None,  # noqa: UP045
    sample: Annotated[
        str, typer.Option(help="greedy and exact keep the model's own text; typical is Medusa's approximate rule.")
    ] = "greedy",
    temperature: Annotated[float, typer.Option(help="Of exact and typical sampling.", min=0.01, max=10)] = 0.7,
    top_k: Annotated[int, typer.Option(help="Of exact sampling: only the k likeliest tokens; 0: all.", min=0)] = 0,
    top_p: Annotated[
        float, typer.Option(help="Of exact sampling: only the likeliest, to this sum.", min=0.01, max=1)
    ] = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Answer a prompt with Medusa heads, as it is decoded; what the heads had guessed stands in green."""
    from bot.cli import medusa_output, output
    from bot.stages import head_training, local_runs
    from bot.stages.head_candidates import require_folder

    kind = options.one_of("--dtype", dtype, options.PRECISIONS)
    options.one_of("--sample", sample, head_training.SAMPLING)
    if heads is not None:
        require_folder(heads)
    configured = context.obj(device=options.device(device))
    with output.progress() as shown:
        folder = local_runs.model_folder(model, configured, shown)
    from bot.merge.execution.engine import choose_device
    from evaluators.medusa import generation
    from evaluators.medusa.model import threads

    how = head_training.rule(sample, temperature, seed, top_k, top_p)
    chosen = choose_device(configured.device).type
    with threads.steadiest_threads(chosen):
        speaker = generation.load(folder, heads, device=chosen, dtype=kind)
        medusa_output.speech(speaker.say(prompt, new_tokens, how, [text for text in stop or () if text]))
    medusa_output.spoken(speaker.trace, speaker.tree.nodes, speaker.notes)


@app.command("export", cls=Verb)
def export(
    context: typer.Context,
    heads: Annotated[
        Path, typer.Argument(help="Heads of any format, or a model's folder that carries them.", metavar="HEADS")
    ],
    out: Annotated[Path, typer.Argument(help="The new folder.", metavar="OUT")],
    model: Annotated[str, typer.Option(help="The model they belong to, a folder or a Hub repo.")],
    layout: Annotated[
        str,
        typer.Option(
            "--format",
            help="v1, v2, tgi or vllm, which carry no conditioned heads (train with --no-conditioned), or ours.",
        ),
    ],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Write Medusa heads in the layout of another program, or read another program's into ours."""
    from bot.cli import output
    from bot.stages import head_training, local_runs
    from bot.stages.head_candidates import require_folder
    from bot.stages.output_folder import new_folder

    options.one_of("--format", layout, head_training.LAYOUTS)
    options.one_of("--dtype", dtype, options.PRECISIONS[1:])
    require_folder(heads)
    new_folder(out)
    configured = context.obj(device="cpu")
    with output.progress() as shown:
        folder = local_runs.model_folder(model, configured, shown)
        from evaluators.medusa import formats

        notes = formats.export(heads, out, layout, folder, base_model=model, dtype=dtype)
    for note in notes:
        output.console.print(f"Note: {note}.", soft_wrap=True, markup=False)
    output.console.print(f"{layout} heads lie in {out}.", soft_wrap=True, markup=False)


@app.command("train", cls=Verb)
def train(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A folder or a Hub repo.", metavar="MODEL")],
    out: Annotated[Path, typer.Argument(help="The folder for the heads.", metavar="OUT")],
    budget_s: Annotated[float, typer.Option(help="Seconds for answers and training.", min=5)] = 600.0,
    kind: Annotated[str, typer.Option(help="shared: the model's own projection; own: one a head.")] = "shared",
    heads: Annotated[int, typer.Option(help="How many tokens ahead.", min=1, max=16)] = 3,
    layers: Annotated[int, typer.Option(help="Residual blocks a head.", min=1, max=8)] = 1,
    conditioned: Annotated[
        bool, typer.Option(help="The first block reads the next token, too: better guesses, for mergebot alone.")
    ] = True,
    vocab: Annotated[str, typer.Option(help="Tokens the heads may propose, or full.", metavar="N|full")] = "8192",
    prompts: Annotated[Optional[Path], typer.Option(help="Train on these, JSON lines as in MT-bench.")] = None,  # noqa: UP045
    test: Annotated[Optional[Path], typer.Option(help="Never train on these.")] = None,  # noqa: UP045
    answers: Annotated[Optional[int], typer.Option(help="Answer so many prompts, whatever it takes.", min=1)] = None,  # noqa: UP045
    steps: Annotated[Optional[int], typer.Option(help="Train so many steps, whatever they take.", min=1)] = None,  # noqa: UP045
    joint: Annotated[bool, typer.Option("--joint", help="Train the model, too. THIS CHANGES THE MODEL.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Train Medusa heads on a model's own answers. A run that was stopped goes on when asked again."""
    from bot.cli import output
    from bot.stages import head_training, local_runs

    made = cast("Literal['shared', 'own']", options.one_of("--kind", kind, ("shared", "own")))
    precision, kept = options.one_of("--dtype", dtype, options.PRECISIONS), options.vocabulary(vocab)
    head_training.require_room(out)
    head_training.require_readable(prompts, test)
    configured = context.obj(device=options.device(device))
    with output.progress() as shown:
        folder = local_runs.model_folder(model, configured, shown)
        from evaluators.medusa.training.head_training import Wanted

        wanted = Wanted(
            budget_s, made, heads, layers, conditioned, kept, prompts, test, seed, joint, steps, answers,
            dtype=precision,
        )  # fmt: skip
        facts = head_training.train(folder, out, wanted, configured, shown)
    for sentence in head_training.told(facts, model, out):
        output.console.print(sentence, soft_wrap=True, markup=False, highlight=False)
