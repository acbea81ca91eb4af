"""Recipes of the 2023 programs: arguments of `main.py`, YAML of `bakllama.py`. docs/design/merging.md 4.

Whatever mergekit's language can express is written in it: a bakllama file becomes `passthrough` slices, `--weight` a
parameter. The rest is stored in `Recipe.classic` and carried out by `planning/classic_tensors.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from bot.errors import Refused
from bot.merge.methods import METHODS
from bot.merge.recipe.document import Node, Reader
from bot.merge.recipe.reading import read_yaml
from bot.merge.recipe.spec import (
    Classic,
    Condition,
    Conditions,
    ModelRef,
    Module,
    Parameters,
    Recipe,
    Setting,
    Slice,
    Source,
)

DEFAULT_DENSITY = 0.33
Method = Literal["ties", "linear", "slerp"]


@dataclass(frozen=True, slots=True)
class Arguments:
    """The flags of `main.py` that have an effect. Lists are in the order of the command line."""

    merge: Sequence[str]
    density: Sequence[float] = ()
    weight: Sequence[float] = ()
    layer_gradient: str | None = None  # JSON
    method: str = "ties"
    base_model: str | None = None
    normalize: bool = True
    bf16: bool = True
    naive_count: bool = False
    copy_tokenizer: bool = True


@dataclass(slots=True)
class _Inputs:
    """The models in order, including the base, and the positions of those named by `--merge`."""

    models: list[ModelRef]
    base: ModelRef | None
    named: list[ModelRef] = field(default_factory=list)


def recipe(arguments: Arguments) -> Recipe:
    """The recipe for the arguments of `main.py`. Raises `Refused` where `main.py` would have failed, too."""
    if arguments.method not in ("ties", "linear", "slerp"):
        _refuse("UNKNOWN_METHOD", f"--method {arguments.method[:40]} is not known.", "Use ties, linear or slerp.")
    inputs = _inputs(arguments)
    gradient = _gradient(arguments.layer_gradient)
    if (gradient or arguments.method == "slerp") and len(inputs.models) != 2:
        what = "--layer-gradient" if gradient else "--method slerp"
        _refuse("RECIPE_INVALID", f"{what} takes exactly two models; there are {len(inputs.models)}.", "Name two.")
    weights = _weights(arguments, inputs, bool(gradient))
    densities = _per_model(arguments.density or (DEFAULT_DENSITY,), inputs, "--density")
    for value in densities.values():
        if not 0 <= value <= 1:
            _refuse("VALUE_OUT_OF_RANGE", f"--density {value:g} is out of range.", "Give a value in [0, 1].")
    sources = tuple(Source(model, None, _own(arguments.method, model, weights, densities)) for model in inputs.models)
    shared: dict[str, Setting] = {}
    if arguments.method != "slerp":
        shared["normalize"] = arguments.normalize
    elif arguments.weight:
        shared["t"] = float(arguments.weight[0])
    return Recipe(
        method=arguments.method,
        modules=(Module("default", "models", (Slice(sources),)),),
        base=inputs.base,
        parameters=shared,
        dtype="bfloat16" if arguments.bf16 else None,
        out_dtype=None,
        vocabulary=None,
        chat_template=None,
        classic=Classic(arguments.naive_count, arguments.copy_tokenizer, gradient),
    )


def _inputs(arguments: Arguments) -> _Inputs:
    named = [_ref(text, "--merge") for text in arguments.merge]
    if not named:
        _refuse("MISSING_KEY", "no model is named.", "Name the models with --merge.")
    twice = next((ref for ref in named if named.count(ref) > 1), None)
    if twice is not None:
        _refuse("RECIPE_INVALID", f"--merge {twice} is given twice.", "Name every model once.")
    base = None if arguments.base_model is None else _ref(arguments.base_model, "--base-model")
    if base is None and arguments.method == "ties":
        _refuse("MISSING_KEY", "--method ties needs a base.", "Name it with --base-model.")
    if base is None and arguments.method == "slerp":
        base = named[0]
    models = named if base is None or base in named else [base, *named]
    return _Inputs(models, base, named)


def _ref(text: str, flag: str) -> ModelRef:
    path, plus, lora = text.strip().partition("+")
    if not path or "@" in text or "+" in lora or (plus and not lora) or any(ord(char) < 32 for char in text):
        next_step = "Write MODEL or MODEL+ADAPTER, without a revision."
        _refuse("NOT_A_REPO_ID", f"{flag} {text[:80]!r} is not a model.", next_step)
    return ModelRef(path, None, ModelRef(lora) if lora else None)


def _gradient(text: str | None) -> tuple[float, ...]:
    """The numbers of `--layer-gradient`."""
    if text is None:
        return ()
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    numbers = isinstance(values, list) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values
    )
    if not isinstance(values, list) or not numbers or not 2 <= len(values) <= 1000:
        _refuse("VALUE_OUT_OF_RANGE", f"--layer-gradient {text[:60]!r} is not a list of numbers.", 'Write "[0, 1]".')
    return tuple(float(value) for value in values)


def _weights(arguments: Arguments, inputs: _Inputs, has_gradient: bool) -> dict[ModelRef, float]:
    values = list(map(float, arguments.weight))
    if not all(map(math.isfinite, values)):
        _refuse("VALUE_OUT_OF_RANGE", "--weight is not finite.", "Give finite numbers.")
    if arguments.method == "slerp":
        if len(values) > 1:
            _refuse("RECIPE_INVALID", f"slerp takes one --weight; there are {len(values)}.", "Give the one that is t.")
        if not values and not has_gradient:
            _refuse(
                "MISSING_KEY", "slerp has neither --weight nor --layer-gradient.", "Give --weight 0.5, for example."
            )
        return {}
    if arguments.method == "ties" and not values:
        values = [1.0]
    if not values and has_gradient:
        return {}
    if not values:
        _refuse(
            "MISSING_KEY", "linear has neither --weight nor --layer-gradient.", "Give one --weight for each --merge."
        )
    weights = _per_model(values, inputs, "--weight")
    return {model: weights.get(model, 0.0) for model in inputs.models}


def _per_model(values: Sequence[float], inputs: _Inputs, flag: str) -> dict[ModelRef, float]:
    """One value for all models, or one per `--merge` by position."""
    count = len(inputs.named)
    if len(values) not in (1, count):
        message = f"{flag} is given {len(values)} times for {count} models."
        _refuse("RECIPE_INVALID", message, f"Give it once, or once for each of the {count} --merge.")
    spread = list(values) * count if len(values) == 1 else values
    return {model: float(value) for model, value in zip(inputs.named, spread, strict=True)}


def _own(
    method: str, model: ModelRef, weights: dict[ModelRef, float], densities: dict[ModelRef, float]
) -> dict[str, Setting]:
    out: dict[str, Setting] = {}
    if model in weights:
        out["weight"] = weights[model]
    if method == "ties" and model in densities:
        out["density"] = densities[model]
    return out


def bakllama(text: str, *, file: str = "recipe") -> Recipe:
    """The recipe for a config of `bakllama.py`: stacked layers, and the models of the tensors before and after them.

    A slice without layers names the model of the embeddings, or of final norm and head. Raises `Refused`.
    """
    reader = Reader(file, "operator", "refuse")
    top = reader.mapping(read_yaml(text, trust="operator", file=file), "")
    reader.unknown(top, "", {"layer_slices", "embedding_source", "lm_head_source"})
    node = top.given("layer_slices")
    if node is None:
        reader.refuse(
            "MISSING_KEY", top, "layer_slices", "the config has no `layer_slices`.", "List the slices to stack."
        )
    slices = [_slice(reader, item, i) for i, item in enumerate(reader.sequence(node, "layer_slices").items)]
    if not slices:
        reader.refuse("RECIPE_INVALID", node, "layer_slices", "`layer_slices` is empty.", "List the slices to stack.")
    before, after = (reader.optional_model(top, key) for key in ("embedding_source", "lm_head_source"))
    if before is not None and before != slices[0].sources[0].model:
        slices.insert(0, Slice((Source(before, (0, 0)),)))
    last = slices[-1].sources[0].model
    apart = (before or slices[0].sources[0].model) != (after or last)
    if (after or last) != last or (apart and (before is not None or after is not None)):
        slices.append(Slice((Source(after or last, (0, 0)),)))
    return Recipe(
        method=METHODS["passthrough"].name,
        modules=(Module("default", "slices", tuple(slices)),),
        base=None,
        parameters={},
        dtype=None,
        out_dtype=None,
        vocabulary=None,
        chat_template=None,
        notices=tuple(reader.notices),
        original=text,
    )


def _slice(reader: Reader, node: Node, index: int) -> Slice:
    path = f"layer_slices[{index}]"
    table = reader.mapping(node, path)
    reader.unknown(table, path, {"model", "start", "end", "scale"})
    missing = next((key for key in ("model", "start", "end") if table.given(key) is None), None)
    if missing is not None:
        reader.refuse("MISSING_KEY", table, f"{path}.{missing}", f"`{path}` has no `{missing}`.", "Add it.")
    start, end = (reader.integer(table.items[key], f"{path}.{key}") for key in ("start", "end"))
    if not 0 <= start < end:
        next_step = "`end` is one past the last layer, and greater than `start`."
        reader.refuse("VALUE_OUT_OF_RANGE", table, path, f"`{path}` takes the layers from {start} to {end}.", next_step)
    parameters: Parameters = {}
    scale = table.given("scale")
    if scale is not None:
        value = reader.number(scale, f"{path}.scale")
        parameters = {"scale": Conditions((Condition("down_proj", value),))}
    return Slice((Source(reader.model(table.items["model"], f"{path}.model"), (start, end), parameters),))


def _refuse(code: str, message: str, next_step: str) -> NoReturn:
    raise Refused(code, message, next_step)
