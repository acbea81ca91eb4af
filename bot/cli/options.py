"""Command-line options beyond typer: mergekit's flags, global options after the command, and validation of values
before heavy imports.

Unsupported mergekit flags are explained with their replacement. `--home`, `--hub` and `--debug` are accepted before and
after the command.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

from bot.errors import Failed, Refused
from bot.merge.recipe.suggestions import closest

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?) ?([kKmMgGtT][iI]?[bB])", re.ASCII)
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,2})?", re.ASCII)
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
_COMMON = {"--home": True, "--hub": True, "--debug": False}  # whether a value follows

# flag of mergekit -> advice; a replacement flag is its first word with two dashes
_OF_MERGEKIT = {
    "--cuda": "Write --device cuda.",
    "--no-cuda": "Write --device cpu.",
    "--gpu-rich": "Write --device cuda.",
    "--read-to-gpu": "Write --device cuda.",
    "--multi-gpu": "Write --device cuda, which uses every GPU.",
    "--random-seed": "Write --seed NUMBER.",
    "--num-threads": "Write --threads NUMBER.",
    "-j": "Write --threads NUMBER.",
    "--out-shard-size": "Write --shard-size 5GB, which counts bytes and not parameters.",
    "--max-shard-size": "Write --shard-size 5GB.",
    "--transformers-cache": "Write --home FOLDER, which holds the cache of downloads.",
    "--lora-merge-cache": "Leave it out: adapters are applied while the model is read, and nothing is cached.",
    "--lora-merge-dtype": "Leave it out: adapters are applied in float32.",
    "--copy-tokenizer": "Leave it out: the tokenizer is always copied.",
    "--no-copy-tokenizer": "Leave it out, and remove the tokenizer's files from OUT afterwards.",
    "--allow-crimes": "Leave it out: incompatible models are refused with the reason.",
    "--trust-remote-code": "Leave it out: a merge never runs code from a model repo.",
    "--lazy-unpickle": "Leave it out: weights are read in chunks; *.bin files need --allow-pickle.",
    "--lazy-loader": "Leave it out: weights are read in chunks.",
    "--clone-tensors": "Leave it out: every tensor is written separately.",
    "--low-cpu-memory": "Leave it out: memory does not grow with the model; `mergebot plan` shows the requirement.",
    "--write-model-card": "Leave it out: merge_provenance.json records the sources, and only the bot writes cards.",
    "--safe-serialization": "Leave it out: the output is always safetensors.",
    "--async-write": "Leave it out: reading, computing and writing always overlap.",
    "--write-threads": "Leave it out: reading, computing and writing always overlap.",
}

_CONTINUE = "Run the same command again to continue."
_TENSORS = ("finished tensors are kept beside the output", _CONTINUE)
# command -> state of its results after Ctrl-C, next step
_AFTER_INTERRUPT = {
    "merge": _TENSORS,
    "classic": _TENSORS,
    "bakllama": _TENSORS,
    "evaluate": ("finished evaluations are kept", _CONTINUE),
    "train": ("answers and training so far are kept", _CONTINUE),
    "bench": ("an incomplete speed test is not kept", "Run the same command again to start over."),
    "export": ("the heads are incomplete", "Remove the new folder and run the same command again."),
}


class Command(TyperCommand):
    """A command that explains unsupported mergekit flags; on Ctrl-C, reports what was kept."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {flag for param in self.params for flag in (*param.opts, *param.secondary_opts)}
        for argument in args[: args.index("--")] if "--" in args else args:
            flag = argument.partition("=")[0]
            if flag not in own and (advice := _advice(flag)) is not None:
                other = re.search(r"Write (--[\w-]+)", advice)
                if other is not None and other[1] not in own and other[1] not in _COMMON:
                    advice = f"Leave it out: `mergebot {self.name}` does not use it."
                ctx.fail(f"{flag} is a flag of mergekit. {advice}")
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if getattr(error, "possibilities", None):
                error.possibilities = _close(error.option_name, own)  # type: ignore[attr-defined]
            raise

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            result, next_step = _AFTER_INTERRUPT.get(self.name or "", ("nothing was changed", ""))
            raise Failed("CANCELLED", f"Interrupted; {result}.", next_step) from None


class CommandGroup(TyperGroup):
    """Group of commands. The global options are also accepted after the command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _common_first(args))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name = args[0]
        if not name.startswith("-") and name not in self.commands:
            close = closest(name, self.commands)
            ctx.fail(f"No such command {name!r}." + (f" Did you mean {close!r}?" if close else ""))
        return super().resolve_command(ctx, args)


def bytes_of(size: str) -> int:
    """`5GB`, `500MB`, `1.5 GiB` as a number of bytes. Raises Refused VALUE_OUT_OF_RANGE."""
    found = _SIZE.fullmatch(size.strip())
    number = 0 if found is None else round(float(found[1]) * _UNITS[found[2].upper()])
    if not 0 < number < 2**63:
        raise Refused(
            "VALUE_OUT_OF_RANGE",
            f"--shard-size {size[:40]!r} is not a size.",
            "Write a size such as 5GB or 500MB.",
            value=size,
        )
    return number


def one_of(option: str, value: str, known: Sequence[str]) -> str:
    """`value`, if it is one of `known`. Raises Refused VALUE_OUT_OF_RANGE."""
    if value not in known:
        choice = f"{', '.join(known[:-1])} or {known[-1]}"
        raise Refused(
            "VALUE_OUT_OF_RANGE", f"{option} {value[:40]!r} is not supported.", f"Write {choice}.", value=value
        )
    return value


def device(value: str) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:N`. Raises Refused DEVICE_UNAVAILABLE."""
    if not _DEVICE.fullmatch(value):
        raise Refused("DEVICE_UNAVAILABLE", f"{value[:40]!r} is not a device.", "Write auto, cpu or cuda.", value=value)
    return value


def vocabulary(value: str) -> int | None:
    """`full` (None) or the number of tokens that heads may propose. Raises Refused VALUE_OUT_OF_RANGE."""
    if value == "full":
        return None
    if not value.isascii() or not value.isdigit() or not 2 <= int(value[:12]) < 2**31:
        raise Refused(
            "VALUE_OUT_OF_RANGE",
            f"--vocab {value[:40]!r} is neither `full` nor a number of at least 2.",
            "Write a number such as 8192.",
            value=value,
        )
    return int(value)


def _close(flag: str, own: Iterable[str]) -> list[str]:
    """Options that begin with `flag`, otherwise the closest spelling."""
    close = closest(flag, own)
    return [name for name in own if name.startswith(flag)] or ([close] if close else [])


def _advice(flag: str) -> str | None:
    positive = "--" + flag.removeprefix("--no-")
    if flag not in _OF_MERGEKIT and flag.startswith("--no-") and positive in _OF_MERGEKIT:
        return "Leave it out."
    return _OF_MERGEKIT.get(flag)


def _common_first(args: Sequence[str]) -> list[str]:
    """Arguments with the global options moved before the command; arguments after `--` stay."""
    first: list[str] = []
    others: list[str] = []
    rest = list(args)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            return [*first, *others, argument, *rest]
        name, equals, _ = argument.partition("=")
        if name not in _COMMON:
            others.append(argument)
            continue
        first.append(argument)
        if _COMMON[name] and not equals and rest:
            first.append(rest.pop(0))
    return [*first, *others]
