"""Parser of the keys `tokenizer` and `tokenizer_source`. docs/design/merging.md 3.2."""

from __future__ import annotations

from typing import Literal, cast

from bot.merge.recipe.document import Node, Reader, Table, Text
from bot.merge.recipe.spec import ModelRef, TokenRule, TokenSource, Vocabulary


def vocabulary(reader: Reader, top: Table) -> Vocabulary | None:
    """The vocabulary of the recipe; None when it has no tokenizer keys."""
    legacy, block = top.given("tokenizer_source"), top.given("tokenizer")
    if legacy is not None and block is not None:
        message = "`tokenizer_source` and `tokenizer` are both given."
        reader.refuse("RECIPE_INVALID", legacy, "tokenizer_source", message, "Keep `tokenizer`.")
    if legacy is not None:
        return Vocabulary(_source(reader, legacy, "tokenizer_source"), legacy=True)
    if block is None:
        return None
    table = reader.mapping(block, "tokenizer")
    reader.unknown(table, "tokenizer", {"source", "tokens", "pad_to_multiple_of"})
    source: Literal["union", "base"] | ModelRef = "union"
    if "source" in table.items:
        source = _source(reader, table.items["source"], "tokenizer.source")
    padding = _padding(reader, table)
    rules: tuple[TokenRule, ...] = ()
    if "tokens" in table.items:
        tokens = reader.mapping(table.items["tokens"], "tokenizer.tokens")
        rules = tuple(_rule(reader, token, node) for token, node in tokens.items.items())
    return Vocabulary(source, rules, padding)


def _source(reader: Reader, node: Node, path: str) -> Literal["union", "base"] | ModelRef:
    if isinstance(node, Text) and node.text in ("union", "base"):
        return cast(Literal["union", "base"], node.text)
    if isinstance(node, Text) and node.text.startswith("model:"):
        node = Text(node.text.removeprefix("model:"), node.plain, node.line)
    return reader.model(node, path)


def _padding(reader: Reader, table: Table) -> int | None:
    node = table.given("pad_to_multiple_of")
    if node is None:
        return None
    path = "tokenizer.pad_to_multiple_of"
    value = reader.integer(node, path)
    if not 1 <= value <= 65536:
        reader.refuse("VALUE_OUT_OF_RANGE", node, path, f"`{path}` is {value}.", "Write a number from 1 to 65536.")
    return value


def _rule(reader: Reader, token: str, node: Node) -> TokenRule:
    path = f"tokenizer.tokens.{token}"
    table = reader.mapping(node, path)
    reader.unknown(table, path, {"source", "force"})
    force = "force" in table.items and reader.boolean(table.items["force"], f"{path}.force")
    source = table.given("source")
    if source is None:
        return TokenRule(token, None, force)
    return TokenRule(token, _token_source(reader, source, f"{path}.source"), force)


def _token_source(reader: Reader, node: Node, path: str) -> TokenSource:
    if not isinstance(node, Table) or "kind" not in node.items:
        return TokenSource("model", reader.model(node, path))
    kind = reader.text(node.items["kind"], f"{path}.kind")
    if kind == "zero":
        reader.unknown(node, path, {"kind"})
        return TokenSource("zero")
    if kind != "model_token" or "model" not in node.items:
        next_step = "Write a model, `kind: zero`, or `kind: model_token` with `model` and `token` or `token_id`."
        reader.refuse("RECIPE_INVALID", node, path, f"`{path}` is neither a model nor a known kind of row.", next_step)
    reader.unknown(node, path, {"kind", "model", "token", "token_id"})
    model = reader.model(node.items["model"], f"{path}.model")
    if "token" in node.items:
        return TokenSource("model_token", model, token=reader.text(node.items["token"], f"{path}.token"))
    if "token_id" not in node.items:
        reader.refuse("MISSING_KEY", node, path, f"`{path}` names no token.", "Add `token` or `token_id`.")
    row = reader.integer(node.items["token_id"], f"{path}.token_id")
    if not 0 <= row < 2**24:
        message = f"`{path}.token_id` is {row:.6g}."
        next_step = "Write the number of a row, from 0 on."
        reader.refuse("VALUE_OUT_OF_RANGE", node.items["token_id"], f"{path}.token_id", message, next_step)
    return TokenSource("model_token", model, token_id=row)
