"""Command-line entry point. Heavy imports are deferred to the command that needs them."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from bot import __version__
from bot.cli import evaluate, medusa
from bot.cli.options import Command, CommandGroup, bytes_of
from bot.errors import MergebotError, Transient

if TYPE_CHECKING:
    from bot.settings import Settings

app = typer.Typer(
    name="mergebot",
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Merge models, evaluate the result and publish exactly what was evaluated. "
    "`--home`, `--hub` and `--debug` can also be given after the command.",
)
app.command("evaluate", rich_help_panel="Single steps", cls=Command)(evaluate.evaluate)
app.add_typer(medusa.app, name="medusa", rich_help_panel="Single steps")

BOT, STEP, REQUEST = "Run the bot", "Single steps", "Requests to a running bot"
Recipe = Annotated[Path, typer.Argument(help="mergekit recipe (YAML).", metavar="RECIPE")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
UnknownKeys = Annotated[str, typer.Option(help="Unknown recipe keys: refuse, or ignore with a notice.")]
HashSources = Annotated[
    bool, typer.Option("--hash-sources", help="Record hashes of local sources in the provenance file.")
]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Also read *.bin and *.pt weights of local folders.")]
Device = Annotated[str, typer.Option(help="Device: auto, cpu or cuda.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier merge at OUT once this one is complete.")
]
ShardSize = Annotated[str, typer.Option(help="Maximum shard size, e.g. 5GB or 500MB.", metavar="SIZE")]
Threads = Annotated[
    int, typer.Option(help="Tensors processed in parallel; memory grows with the number.", min=1, max=256, metavar="N")
]
Out = Annotated[Path, typer.Argument(help="Output folder.", metavar="OUT")]


class _State:
    """Global options: --home, --hub and --debug."""

    debug = False
    home: Path | None = None
    hub: str | None = None
    exits_without_cleanup = False


def settings(**overrides: object) -> Settings:
    """Settings from the environment and the options; activates them for this process."""
    from pydantic import ValidationError

    from bot.errors import Refused
    from bot.settings import Settings, activate

    options = {"home": _State.home, "hub": _State.hub, **overrides}
    try:
        made = Settings(**{name: value for name, value in options.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise Refused(
            "VALUE_OUT_OF_RANGE",
            f"The setting {name} (MERGEBOT_{name.upper()}) is wrong: {first['msg']}.",
            "Correct the setting and run the command again.",
        ) from None
    activate(made)
    return made


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(f"mergebot {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    home: Annotated[Path | None, typer.Option(help="Folder for the database, caches and scratch files.")] = None,
    hub: Annotated[str | None, typer.Option(help="Address of the Hub; default: HF_ENDPOINT.")] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    _State.debug, _State.home, _State.hub = debug, home, hub
    context.obj = settings


# -- the bot ----------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=BOT)
def demo(
    directory: Annotated[Path, typer.Option("--dir", help="Folder for all files of the demo.")] = Path("demo"),
    once: Annotated[bool, typer.Option("--once", help="Exit after the last job instead of serving.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write a report as JSON.")] = None,
    port: Annotated[int, typer.Option(help="Port of the Space.")] = 7860,
) -> None:
    """Run the bot on this machine with a local Hub and a real model: merge, evaluate and publish two models."""
    from bot.cli import output
    from bot.demo import run

    run.demo(directory, output, once=once, report=report, port=port)


@app.command(rich_help_panel=BOT)
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 7860,
) -> None:
    """Serve the Space and run the bot: forms, tagged repos, jobs, leaderboard."""
    from bot.service import serve

    serve.serve(settings(), host, port)


@app.command(rich_help_panel=BOT)
def hub(
    directory: Annotated[Path, typer.Option("--dir", help="Folder that holds the repos.")] = Path("hub"),
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8765,
    user: Annotated[str | None, typer.Option(help="Create this user and show a write token.")] = None,
) -> None:
    """Serve a local Hub from a folder. Clients connect through HF_ENDPOINT."""
    import secrets

    from bot import localhub

    token = f"hf_{secrets.token_hex(17)}" if user else ""
    if user:
        localhub.add_user(directory, user, token)

    def ready(url: str) -> None:
        typer.echo(f"The local Hub listens at {url}. For its clients:")
        typer.echo(f"export HF_ENDPOINT={url} HF_HUB_DISABLE_XET=1" + (f" HF_TOKEN={token}" if token else ""))

    localhub.serve(directory, port=port, on_ready=ready)


# -- single steps-------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=STEP, cls=Command)
def plan(
    recipe: Recipe,
    seed: Seed = 0,
    tensor: Annotated[str | None, typer.Option(help="Show the resolved parameters of this tensor.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    unknown_keys: UnknownKeys = "refuse",
    allow_pickle: AllowPickle = False,
    shard_size: ShardSize = "5GB",
) -> None:
    """Show the plan of a recipe from headers alone: tensors, bytes, memory, resolved values. Reads no weights."""
    from bot.cli import output
    from bot.merge.planning import summary
    from bot.stages import local_runs

    parsed = local_runs.read_recipe(recipe, unknown_keys=unknown_keys)
    limit = bytes_of(shard_size)
    made = local_runs.plan_from_headers(
        parsed, settings(), seed=seed, allow_pickle=allow_pickle, shard_limit_bytes=limit
    )
    if tensor is None:
        output.plan(summary.summary(made.plan), as_json=as_json)
    else:
        output.tensor(summary.values_of(made.plan, tensor), as_json=as_json)


@app.command(rich_help_panel=STEP, cls=Command)
def merge(
    recipe: Recipe,
    out: Out,
    device: Device = "auto",
    seed: Seed = 0,
    threads: Threads = 2,
    shard_size: ShardSize = "5GB",
    unknown_keys: UnknownKeys = "refuse",
    allow_pickle: AllowPickle = False,
    hash_sources: HashSources = False,
    overwrite: Overwrite = False,
) -> None:
    """Merge the models of a recipe into a new folder. After an interruption the same command continues."""
    from bot.merge.execution.options import MergeOptions
    from bot.stages import local_runs

    parsed = local_runs.read_recipe(recipe, unknown_keys=unknown_keys)
    planning = {"seed": seed, "shard_limit_bytes": bytes_of(shard_size), "allow_pickle": allow_pickle}
    options = MergeOptions(device=device, threads=threads)
    _merge(parsed, out, planning, options, hash_sources=hash_sources, overwrite=overwrite)
    _State.exits_without_cleanup = True


def _merge(recipe: Any, out: Path, planning: dict[str, Any], options: Any, **writing: bool) -> None:
    from bot.cli import output
    from bot.stages import local_runs

    configured = settings()
    with output.progress() as report:
        planned = local_runs.plan_from_headers(recipe, configured, **planning)
        merged = local_runs.merge(planned, out, configured, report, options, **writing)
    output.merged(merged, out)


@app.command(rich_help_panel=STEP, cls=Command)
def verify(
    model: Annotated[str, typer.Argument(help="Folder of a merge, or a Hub repo (owner/name[@revision]).")],
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of sentences.")] = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Merge a model again from its provenance file and compare every tensor. Exit status 1 when anything differs."""
    from bot.cli import output
    from bot.stages import local_runs, verification

    configured = settings()
    with output.progress(hidden=as_json) as shown:
        verdict = local_runs.verify(model, configured, shown, device=device, allow_pickle=allow_pickle)
    output.verdict(verdict, as_json=as_json)
    verification.require_same(verdict)


@app.command(rich_help_panel=STEP, cls=Command)
def classic(
    out: Out,
    merge: Annotated[list[str], typer.Option(help="Model to merge, MODEL or MODEL+ADAPTER; repeatable.")],
    density: Annotated[list[float] | None, typer.Option(help="Share of each task vector kept by ties.")] = None,
    weight: Annotated[list[float] | None, typer.Option(help="Weight of each model; t of slerp.")] = None,
    method: Annotated[str, typer.Option(help="ties, linear or slerp.")] = "ties",
    base_model: Annotated[str | None, typer.Option(help="Base model; required for ties.")] = None,
    layer_gradient: Annotated[str | None, typer.Option(help='Values over the layers, e.g. "[0, 0.5, 1]".')] = None,
    normalize: Annotated[bool, typer.Option(help="Divide by the sum of the weights.")] = True,
    bf16: Annotated[bool, typer.Option(help="Write bfloat16; otherwise the stored type.")] = True,
    naive_count: Annotated[bool, typer.Option(help="Elect signs by count.")] = False,
    copy_tokenizer: Annotated[bool, typer.Option(help="Copy the tokenizer of the base, or of the first model.")] = True,
    cuda: Annotated[bool, typer.Option("--cuda/--no-cuda", help="Compute on a GPU.")] = False,
    int8_mask: Annotated[bool, typer.Option("--int8-mask/--no-int8-mask", help="Accepted, without effect.")] = False,
    cache_dir: Annotated[str | None, typer.Option(help="Accepted, without effect. Use --home.")] = None,
    merged_cache_dir: Annotated[str | None, typer.Option(help="Accepted, without effect.")] = None,
    allow_pickle: AllowPickle = False,
    overwrite: Overwrite = False,
) -> None:
    """Merge as mergekit's `main.py` of 2023 did, with its flags."""
    from bot.merge.execution.options import MergeOptions
    from bot.merge.recipe.classic import Arguments, recipe

    arguments = Arguments(merge, density or (), weight or (), layer_gradient, method, base_model)
    arguments = replace(
        arguments, normalize=normalize, bf16=bf16, naive_count=naive_count, copy_tokenizer=copy_tokenizer
    )
    options = MergeOptions(device="cuda" if cuda else "cpu")
    _merge(recipe(arguments), out, {"allow_pickle": allow_pickle}, options, overwrite=overwrite)


@app.command(rich_help_panel=STEP, cls=Command)
def bakllama(
    config: Annotated[Path, typer.Argument(help="Config with layer_slices (YAML).", metavar="CONFIG")],
    out: Out,
    allow_pickle: AllowPickle = False,
    overwrite: Overwrite = False,
) -> None:
    """Stack layers of models as mergekit's `bakllama.py` of 2023 did, with its config."""
    from bot.merge.execution.options import MergeOptions
    from bot.merge.recipe.classic import bakllama as recipe
    from bot.stages import local_runs

    parsed = recipe(local_runs.read_text(config), file=str(config))
    _merge(parsed, out, {"allow_pickle": allow_pickle}, MergeOptions(), overwrite=overwrite)


# -- requests to the bot -----------------------------------------------------------------------------------------


@app.command(rich_help_panel=REQUEST)
def submit(
    recipe: Recipe,
    name: Annotated[str, typer.Option(help="Name of the merged repo.")],
    requester: Annotated[str, typer.Option(help="User the request is recorded for.")] = "operator",
    suite: Annotated[str, typer.Option(help="Evaluation suite.")] = "quick",
    limit: Annotated[int | None, typer.Option(help="Maximum samples per task.", min=1)] = None,
    speed: Annotated[bool, typer.Option(help="Also run the Medusa speed test.")] = False,
) -> None:
    """Add a request to the queue of the bot that shares this `--home`."""
    from bot.cli import output
    from bot.hub import Hub
    from bot.jobs.queue import open_queue
    from bot.jobs.request import EvaluateOptions, from_form
    from bot.service import intake
    from bot.stages import local_runs

    configured = settings()
    options = EvaluateOptions(suite=suite, limit=limit, speed="medusa" if speed else "off")
    request = from_form(requester, local_runs.read_text(recipe), name, options)
    job = intake.take(request, Hub(configured.hub), open_queue(configured), configured)
    output.jobs([job])


@app.command(rich_help_panel=REQUEST)
def status(
    job_id: Annotated[str | None, typer.Argument(help="Job id; default: all recent jobs.", metavar="[JOB]")] = None,
) -> None:
    """Show the status of jobs."""
    from bot.cli import output
    from bot.jobs.queue import open_queue

    queue = open_queue(settings())
    if job_id is None:
        output.jobs(queue.jobs())
    else:
        output.job(queue.job(job_id))


def main() -> None:
    """Run the command. An error prints one line on stderr, or a traceback with `--debug`, and exits with status 1."""
    try:
        app()
    except SystemExit as ended:
        if _State.exits_without_cleanup and ended.code in (None, 0):
            _exit_without_cleanup()
        raise
    except Exception as error:
        if _State.debug:
            raise
        typer.secho(_sentence(error), err=True, fg=typer.colors.RED)
        sys.exit(1)


def _exit_without_cleanup() -> NoReturn:
    """Exit without unloading torch, which takes a third of a second.

    A finished merge has closed its files and ended its threads; only printed text can still be in a buffer.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _sentence(error: Exception) -> str:
    if isinstance(error, MergebotError):
        where = error.where
        if isinstance(error, Transient):  # the bot retries, a command does not
            return f"{error.message} Run the same command again later. [{error.code}]"
        if where is None or not where.line:
            return f"{error} [{error.code}]"
        return f"{where.file}:{where.line}: {str(error).removeprefix(f'line {where.line}: ')} [{error.code}]"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'A file'}: {error.strerror}. Choose another path or free disk space."
    return f"Internal error ({type(error).__name__}). Run the command again with `--debug` and report the traceback."


if __name__ == "__main__":
    main()
