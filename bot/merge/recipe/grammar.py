"""Parser of the recipe language: document tree -> Recipe. docs/design/merging.md 1.2, 1.3, 1.6 and 3.1.

Keys fall into three classes: known to this method (used, range checked), known to another method or harmless
(accepted, noted), unknown (refused with the nearest name). Everything that can be checked without a model is
checked here, where the line is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bot.merge.methods import KNOWN_PARAMETERS, METHODS, Base, Kind, Method, Parameter
from bot.merge.recipe.document import Node, Reader, Sequence, Table, Text, nearest, shown
from bot.merge.recipe.dtypes import MERGEABLE
from bot.merge.recipe.other_programs import refuse_other_programs
from bot.merge.recipe.spec import (
    Classic,
    Condition,
    Conditions,
    Gradient,
    Module,
    Recipe,
    Scalar,
    Setting,
    Slice,
    Source,
)
from bot.merge.recipe.vocabulary_grammar import vocabulary

_LAYOUTS = ("models", "slices", "modules")
_SINGLE = ("merge_method", "base_model", "dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template")
_TOP = frozenset((*_SINGLE, *_LAYOUTS, "parameters", "name"))

_CLASSIC = "classic"  # block of recipes made from arguments of the 2023 `main.py`; mergekit ignores it

# Keys of mergekit and of older recipes without effect on any method here.
IGNORED_PARAMETERS = frozenset(
    {"int8_mask", "residual_weight", "embed_slerp", "random_seed", "name", "consensus_method", "swapping"}
)


def recipe(reader: Reader, root: Node) -> Recipe:
    """Build the recipe or raise `Refused` with line, path and next step."""
    top = reader.mapping(root, "")
    refuse_other_programs(reader, top)
    _top_keys(reader, top)
    method = _method(reader, top)
    base = reader.optional_model(top, "base_model")
    modules, modular = _modules(reader, top, method)
    built = Recipe(
        method=method.name,
        modules=modules,
        base=base,
        parameters=_parameters(reader, top, "", method, per_source=False),
        dtype=_dtype(reader, top, "dtype"),
        out_dtype=_dtype(reader, top, "out_dtype"),
        vocabulary=vocabulary(reader, top),
        chat_template=_optional_text(reader, top, "chat_template"),
        modular=modular,
        classic=_classic(reader, top),
    )
    _check_inputs(reader, top, built, method)
    _note_base(reader, built)
    return replace(built, notices=tuple(reader.notices))


def _top_keys(reader: Reader, top: Table) -> None:
    for key in top.items:
        if key in _TOP or key == _CLASSIC:
            continue
        line = top.key_lines[key]
        if key in top.anchored:
            reader.notice("ANCHOR_KEY", f"`{key[:60]}` only defines a value used elsewhere.")
        elif key in IGNORED_PARAMETERS:
            reader.notice("UNUSED_KEY", f"`{key}` has no effect here.")
        elif key in KNOWN_PARAMETERS and reader.unknown_keys == "refuse":
            next_step = f"Write it under `parameters:` (`parameters: {{{key}: ...}}`)."
            reader.refuse("UNKNOWN_KEY", line, key, f"line {line}: `{key}` is at the top level.", next_step)
        else:
            reader.unknown_key(key, line, "", _TOP)


def _method(reader: Reader, top: Table) -> Method:
    node = top.given("merge_method")
    if node is None:
        reader.refuse(
            "MISSING_KEY", top, "merge_method", "the recipe has no `merge_method`.", "Add e.g. `merge_method: linear`."
        )
    name = reader.text(node, "merge_method").strip()
    if name not in METHODS:
        message = f"line {node.line}: the merge method {shown(name)} is not known."
        reader.refuse("UNKNOWN_METHOD", node, "merge_method", message, nearest(name, METHODS))
    return METHODS[name]


def _modules(reader: Reader, top: Table, method: Method) -> tuple[tuple[Module, ...], bool]:
    layouts = [key for key in _LAYOUTS if top.given(key) is not None]
    if len(layouts) != 1:
        message = "the recipe needs exactly one of `models`, `slices` and `modules`"
        if layouts:
            message, next_step = f"{message}; it has {' and '.join(layouts)}.", f"Keep one, for example `{layouts[0]}`."
            reader.refuse("RECIPE_INVALID", top.key_lines[layouts[1]], "", message, next_step)
        reader.refuse("MISSING_KEY", top, "", f"{message}.", "Add `models:` with the models to merge.")
    if layouts[0] != "modules":
        return (_module(reader, top, "default", "", method, own_parameters=False),), False
    block = reader.mapping(top.items["modules"], "modules")
    modules = []
    for name, node in block.items.items():
        path = f"modules.{name}"
        table = reader.mapping(node, path)
        reader.unknown(table, path, {"models", "slices", "parameters"})
        modules.append(_module(reader, table, name, path, method, own_parameters=True))
    if not modules:
        reader.refuse("RECIPE_INVALID", block, "modules", "`modules` is empty.", "Add `default:` with `slices:`.")
    return tuple(modules), True


def _module(reader: Reader, table: Table, name: str, path: str, method: Method, *, own_parameters: bool) -> Module:
    prefix = f"{path}." if path else ""
    layouts = [key for key in ("models", "slices") if table.given(key) is not None]
    if len(layouts) != 1:
        reader.refuse(
            "RECIPE_INVALID", table, path, f"`{path}` needs exactly one of `models` and `slices`.", "Keep one."
        )
    parameters = _parameters(reader, table, path, method, per_source=False) if own_parameters else {}
    if layouts[0] == "models":
        where = f"{prefix}models"
        sources = _sources(reader, reader.sequence(table.items["models"], where), where, method, ranged=False)
        return Module(name, "models", (Slice(sources),), parameters)
    where = f"{prefix}slices"
    pieces = reader.sequence(table.items["slices"], where)
    slices = tuple(_slice(reader, node, f"{where}[{i}]", method) for i, node in enumerate(pieces.items))
    if all(source.layers == (0, 0) for piece in slices for source in piece.sources):
        reader.refuse("RECIPE_INVALID", pieces, where, f"`{where}` names no layer.", "Add a slice with `sources:`.")
    return Module(name, "slices", slices, parameters)


def _slice(reader: Reader, node: Node, path: str, method: Method) -> Slice:
    table = reader.mapping(node, path)
    reader.unknown(table, path, {"sources", "base_model", "parameters"})
    if table.given("sources") is None:
        reader.refuse("MISSING_KEY", table, path, f"`{path}` has no `sources`.", "Add `sources:` with model and range.")
    where = f"{path}.sources"
    sources = _sources(reader, reader.sequence(table.items["sources"], where), where, method, ranged=True)
    lengths = {source.layers[1] - source.layers[0] for source in sources if source.layers is not None}
    if len(lengths) > 1:
        ranges = ", ".join(f"{source.model} {list(source.layers or ())}" for source in sources)
        message = f"`{where}` stacks ranges of different lengths: {ranges}."
        next_step = "Give every source of a slice the same number of layers."
        reader.refuse("RECIPE_INVALID", table, where, message, next_step)
    return Slice(
        sources,
        reader.optional_model(table, "base_model", path),
        _parameters(reader, table, path, method, per_source=False),
    )


def _sources(reader: Reader, block: Sequence, path: str, method: Method, *, ranged: bool) -> tuple[Source, ...]:
    if not block.items:
        reader.refuse("RECIPE_INVALID", block, path, f"`{path}` is empty.", "Add `- model: owner/name`.")
    out: list[Source] = []
    for i, node in enumerate(block.items):
        where = f"{path}[{i}]"
        table = reader.mapping(node, where)
        if not ranged and "layer_range" in table.items and reader.unknown_keys == "refuse":
            message = f"`{where}.layer_range` is under `models`, which always takes every layer."
            next_step = "Use `slices:` with `sources:` to choose layers."
            reader.refuse("UNKNOWN_KEY", table.key_lines["layer_range"], f"{where}.layer_range", message, next_step)
        _no_revision(reader, table, where)
        reader.unknown(table, where, {"model", "layer_range", "parameters"} if ranged else {"model", "parameters"})
        model_node = table.given("model")
        if model_node is None:
            reader.refuse("MISSING_KEY", table, where, f"`{where}` names no model.", "Add `model: owner/name`.")
        model = reader.model(model_node, f"{where}.model")
        if any(source.model == model for source in out):
            message = f"line {table.line}: {shown(str(model))} is listed twice."
            next_step = "Name every source of a slice once and add the weights up."
            reader.refuse("RECIPE_INVALID", table, f"{where}.model", message, next_step)
        layers = _layer_range(reader, table, where) if ranged else None
        out.append(Source(model, layers, _parameters(reader, table, where, method, per_source=True)))
    return tuple(out)


def _no_revision(reader: Reader, table: Table, where: str) -> None:
    """Refuse a revision beside the model. mergekit ignores it silently; here it is part of the reference."""
    model, revision = table.items.get("model"), table.items.get("revision")
    if isinstance(model, Text) and isinstance(revision, Text) and reader.unknown_keys == "refuse":
        message = f"line {table.key_lines['revision']}: `{where}.revision` is beside the model."
        next_step = f"Write {shown(f'model: {model.text}@{revision.text}')}."
        reader.refuse("UNKNOWN_KEY", table.key_lines["revision"], f"{where}.revision", message, next_step)


def _layer_range(reader: Reader, table: Table, path: str) -> tuple[int, int]:
    node = table.given("layer_range")
    where = f"{path}.layer_range"
    if node is None:
        reader.refuse("MISSING_KEY", table, where, f"`{path}` has no `layer_range`.", "Add `layer_range: [0, 8]`.")
    block = reader.sequence(node, where)
    ends = [reader.integer(item, f"{where}[{i}]") for i, item in enumerate(block.items)]
    if len(ends) != 2 or not (0 <= ends[0] < ends[1] or ends == [0, 0]):  # no layers: embeddings, or norm and head
        next_step = "Write [first, one past the last], for example [0, 8]."
        reader.refuse("VALUE_OUT_OF_RANGE", node, where, f"line {node.line}: `{where}` is {ends}.", next_step)
    return ends[0], ends[1]


def _optional_text(reader: Reader, table: Table, key: str) -> str | None:
    node = table.given(key)
    return None if node is None else reader.text(node, key)


def _dtype(reader: Reader, top: Table, key: str) -> str | None:
    node = top.given(key)
    if node is None:
        return None
    name = reader.text(node, key).removeprefix("torch.")
    if name not in MERGEABLE:
        reader.refuse(
            "VALUE_OUT_OF_RANGE", node, key, f"line {node.line}: `{key}` is {shown(name)}.", nearest(name, MERGEABLE)
        )
    return name


def _parameters(reader: Reader, table: Table, path: str, method: Method, *, per_source: bool) -> dict[str, Setting]:
    node = table.given("parameters")
    if node is None:
        return {}
    where = f"{path}.parameters" if path else "parameters"
    block = reader.mapping(node, where)
    out: dict[str, Setting] = {}
    for name, value in block.items.items():
        line, at = block.key_lines[name], f"{where}.{name}"
        known = method.parameter(name)
        if known is None and name in _SINGLE:
            reader.notice("MISPLACED_KEY", f"`{at}` has no effect; `{name}` belongs to the top level of the recipe.")
            continue
        if known is None and name not in KNOWN_PARAMETERS and name not in IGNORED_PARAMETERS:
            reader.unknown_key(name, line, where, [p.name for p in (*method.per_input, *method.shared)])
            continue
        if known is None or not known.used:
            reader.notice("UNUSED_PARAMETER", f"`{at}` has no effect with {method.name}.")
        elif per_source and known in method.shared:
            reader.notice(
                "UNUSED_PARAMETER", f"`{at}` has no effect on a single source; write it under the top `parameters`."
            )
        if isinstance(value, Text) and value.is_null:
            continue
        kind = known.kind if known is not None else KNOWN_PARAMETERS.get(name)
        setting = _setting(reader, value, at, kind)
        if known is not None and known.used:
            _check_range(reader, value, at, known, setting)
        out[name] = setting
    return out


def _setting(reader: Reader, node: Node, path: str, kind: Kind | None) -> Setting:
    if isinstance(node, Table):
        return Conditions((_condition(reader, node, path, kind),))
    if isinstance(node, Sequence) and all(isinstance(item, Table) for item in node.items):
        items = (reader.mapping(item, f"{path}[{i}]") for i, item in enumerate(node.items))
        return Conditions(tuple(_condition(reader, item, f"{path}[{i}]", kind) for i, item in enumerate(items)))
    return _value(reader, node, path, kind)


def _condition(reader: Reader, table: Table, path: str, kind: Kind | None) -> Condition:
    reader.unknown(table, path, {"filter", "value"})
    value, pattern = table.given("value"), table.given("filter")
    if value is None:
        reader.refuse("MISSING_KEY", table, path, f"`{path}` has no `value`.", "Add `value:` beside `filter:`.")
    text = None if pattern is None else reader.text(pattern, f"{path}.filter")
    return Condition(None if text == "*" else text, _value(reader, value, f"{path}.value", kind))


def _value(reader: Reader, node: Node, path: str, kind: Kind | None) -> Scalar | Gradient:
    if not isinstance(node, Sequence):
        return _scalar(reader, node, path, kind)
    if not node.items:
        reader.refuse("RECIPE_INVALID", node, path, f"`{path}` is an empty list.", "Write at least one value.")
    return Gradient(tuple(_scalar(reader, item, f"{path}[{i}]", kind) for i, item in enumerate(node.items)))


def _scalar(reader: Reader, node: Node, path: str, kind: Kind | None) -> Scalar:
    match kind:
        case Kind.NUMBER:
            return reader.number(node, path)
        case Kind.INTEGER:
            return float(reader.integer(node, path))
        case Kind.BOOLEAN:
            return reader.boolean(node, path)
    text = reader.text(node, path)
    return text == "true" if text in ("true", "false") else text


def _classic(reader: Reader, top: Table) -> Classic | None:
    """The `classic` block as `Recipe.document` writes it, None without one. Unknown in untrusted recipes."""
    node = top.given(_CLASSIC)
    if node is None:
        return None
    if reader.trust == "stranger":
        reader.unknown_key(_CLASSIC, top.key_lines[_CLASSIC], "", {"merge_method", "models", "slices", "parameters"})
        return None
    table = reader.mapping(node, _CLASSIC)
    flags = ("naive_count", "copy_tokenizer")
    reader.unknown(table, _CLASSIC, {*flags, "layer_gradient"})
    naive, copies = (key in table.items and reader.boolean(table.items[key], f"{_CLASSIC}.{key}") for key in flags)
    values, path = table.items.get("layer_gradient"), f"{_CLASSIC}.layer_gradient"
    items = () if values is None else reader.sequence(values, path).items
    gradient = tuple(reader.number(item, f"{path}[{i}]") for i, item in enumerate(items))
    return Classic(naive, copies or "copy_tokenizer" not in table.items, gradient)


def literals(setting: Setting) -> Iterator[Scalar]:
    """Every value written in a setting."""
    values = [item.value for item in setting.items] if isinstance(setting, Conditions) else [setting]
    for value in values:
        yield from value.values if isinstance(value, Gradient) else (value,)


def _check_range(reader: Reader, node: Node, path: str, parameter: Parameter, setting: Setting) -> None:
    if parameter.kind is Kind.BOOLEAN:
        return
    for value in literals(setting):
        if isinstance(value, float) and not parameter.admits(value):
            next_step = f"`{parameter.name}` must lie in {parameter.range_text}."
            reader.refuse("VALUE_OUT_OF_RANGE", node, path, f"line {node.line}: `{path}` is {value:g}.", next_step)


def _check_inputs(reader: Reader, top: Table, built: Recipe, method: Method) -> None:
    """Check base and number of inputs of every slice. docs/design/merging.md 1.2."""
    for module in built.modules:
        for i, piece in enumerate(module.slices):
            prefix = f"modules.{module.name}." if built.modular else ""
            at = f"{prefix}models" if module.layout == "models" else f"{prefix}slices[{i}].sources"
            line = top.key_lines.get("modules" if built.modular else module.layout, 1)
            base = piece.base or built.base
            if method.base is Base.REQUIRED and base is None:
                next_step = "Add `base_model:` with the model the others were tuned from."
                reader.refuse("MISSING_KEY", line, "base_model", f"{method.name} needs a `base_model`.", next_step)
            if built.passes_through(module, piece):
                continue
            listed = {source.model for source in piece.sources}
            if module.layout == "slices" and method.base is not Base.IGNORED and base and base not in listed:
                message = f"`{at}` does not list {base}, the base that {method.name} needs."
                next_step = "Add the base with its own layer_range to the sources of every slice."
                reader.refuse("RECIPE_INVALID", line, at, message, next_step)
            sources, base_index = built.inputs(module, piece)
            count = len(sources) - (base_index is not None)
            if count < method.least or (method.most is not None and count > method.most):
                _refuse_count(reader, line, at, method, count, appended=len(sources) > len(piece.sources))


def _refuse_count(reader: Reader, line: int, at: str, method: Method, count: int, *, appended: bool) -> None:
    most = method.most
    wanted = f"{method.least}" if most == method.least else f"at least {method.least}"
    besides = "" if method.base is Base.IGNORED else " besides the base"
    extra = " (the unlisted base_model counts as one)" if appended and method.base is Base.IGNORED else ""
    message = f"{method.name} takes {wanted} model{'s' if wanted != '1' else ''}{besides}; `{at}` gives {count}{extra}."
    next_step = "Remove `base_model`." if extra else "Change the list of models, or choose another merge method."
    reader.refuse("RECIPE_INVALID", line, at, message, next_step)


def _note_base(reader: Reader, built: Recipe) -> None:
    if METHODS[built.method].base is Base.IGNORED and built.base is not None:
        listed = {source.model for module in built.modules for piece in module.slices for source in piece.sources}
        if built.base not in listed and any(module.layout == "models" for module in built.modules):
            reader.notice("BASE_IS_INPUT", f"{built.method} has no base: {built.base} takes part as an ordinary input.")
