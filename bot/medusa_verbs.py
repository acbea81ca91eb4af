"""The verbs of `mergebot medusa`. Nothing heavy is imported before one needs it.

`context.obj` is the function of bot.cli that makes settings of options.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

app = typer.Typer(no_args_is_help=True, help="Medusa heads: train them on a model and measure how fast it decodes.")
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


@app.command("bench")
def bench(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A folder or a Hub repo.")],
    out: Annotated[Path, typer.Option(help="The report (*.json), or a folder for it.")] = Path("medusa"),
    heads: Annotated[Optional[list[Path]], typer.Option(help="Time these instead of training some; repeat it.")] = None,  # noqa: UP045
    parent: Annotated[Optional[list[str]], typer.Option(help="NAME=DIR: heads of a parent; repeat it.")] = None,  # noqa: UP045
    prompts: Annotated[Optional[Path], typer.Option(help="Questions, JSON lines as in MT-bench.")] = None,  # noqa: UP045
    questions: Annotated[int, typer.Option(help="How many of them.", min=1)] = 16,
    new_tokens: Annotated[int, typer.Option(help="Tokens an answer, at most.", min=8)] = 48,
    turns: Annotated[int, typer.Option(help="2 also asks each question's second turn.", min=1, max=2)] = 1,
    budget_s: Annotated[float, typer.Option(help="Seconds for training, calibration and the test.", min=10)] = 600.0,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Compare decoding with Medusa heads to plain greedy decoding, honestly: fresh heads, given ones, the parents'."""
    from bot import measure, operator, screens
    from bot.heads import by_hand

    configured = context.obj(device=device)
    beside = out.with_suffix("") if out.suffix == ".json" else out
    with screens.progress() as shown:
        folder = operator.model_folder(model, configured, shown)
        given = by_hand(folder, heads or (), parent or (), beside, configured, seed)
        asked = measure.Speed(prompts, budget_s, questions, new_tokens, turns, given)
        report = measure.bench(folder, beside, asked, configured, shown, seed=seed)
    written = beside / "decode_speed.json"
    screens.speed(report, written.replace(out) if out.suffix == ".json" else written)
