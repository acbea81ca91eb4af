"""Guarded reader: mergekit YAML -> Recipe, with limits on size, depth and aliases.

The text is read as a stream of events and the limits are checked on the way; a YAML loader never constructs a value.
The resulting tree goes through `grammar.py`. Threats and limits: docs/design/reliability.md 3.1, 4.1.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import yaml

from bot.errors import Refused, Where
from bot.merge.recipe import documents
from bot.merge.recipe.document import Node, Reader, Sequence, Table, Text, Trust, UnknownKeys
from bot.merge.recipe.spec import Document, ModelRef, Recipe

__all__ = ["ModelRef", "Recipe", "from_canonical", "parse", "read_stream", "read_yaml", "write_yaml"]


@dataclass(frozen=True, slots=True)
class TextLimits:
    """Limits on the text of a recipe. `alias_nodes`: nodes that aliases to collections may add in total."""

    text_bytes: int
    depth: int
    events: int
    alias_nodes: int


LIMITS: dict[Trust, TextLimits] = {
    "stranger": TextLimits(text_bytes=64 * 1024, depth=32, events=20_000, alias_nodes=0),
    "operator": TextLimits(text_bytes=1024 * 1024, depth=32, events=200_000, alias_nodes=10_000),
}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\ud800-\udfff]")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse(
    text: str, *, trust: Trust = "operator", unknown_keys: UnknownKeys = "refuse", file: str = "recipe"
) -> Recipe:
    """Read a recipe, or refuse it with file, line, YAML path and the nearest valid name.

    `stranger` applies the limits of docs/design/reliability.md 4.1 and accepts only owner/name[@revision] as models.
    `unknown_keys="ignore"` turns unknown keys into notices. Raises `bot.errors.Refused`.
    """
    if trust == "operator":
        text = text.removeprefix("\ufeff")  # byte order mark, written by some editors
    roots = read_stream(text, trust=trust, file=file)
    recipe = documents.recipe(lambda names: Reader(file, trust, unknown_keys, names), roots)
    return replace(recipe, original=text if trust == "operator" else None)


def from_canonical(canonical: str) -> Recipe:
    """The recipe of a `canonical()` text."""
    try:
        loaded = json.loads(canonical)
        roots = [_from_json(value) for value in (loaded if isinstance(loaded, list) else [loaded])]
    except (ValueError, RecursionError) as error:
        raise Refused("RECIPE_INVALID", "the canonical recipe is not JSON.", "Parse the recipe again.") from error
    return documents.recipe(lambda names: Reader("canonical recipe", "operator", "refuse", names), roots)


def write_yaml(document: Document) -> str:
    """Block-style YAML of plain values with keys in the given order; a list becomes a stream of documents."""
    each = document if isinstance(document, list) else [document]
    return yaml.safe_dump_all(each, sort_keys=False, default_flow_style=False, allow_unicode=True, width=1000)


def read_yaml(text: str, *, trust: Trust, file: str = "recipe") -> Node:
    """The tree of a YAML text of one document, under the limits of `trust`."""
    roots = read_stream(text, trust=trust, file=file)
    if len(roots) > 1:
        message = f"{file} holds {len(roots)} YAML documents."
        raise Refused("RECIPE_INVALID", message, "Write one.", where=Where(file, roots[1].line))
    return roots[0]


def read_stream(text: str, *, trust: Trust, file: str = "recipe") -> tuple[Node, ...]:
    """The trees of the documents of a YAML text, at least one, under the limits of `trust` for all together."""
    limits = LIMITS[trust]
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > limits.text_bytes:
        message = f"the recipe has {size:,} bytes; the limit is {limits.text_bytes:,}."
        next_step = "Shorten it: comments and repeated blocks count too."
        raise Refused("RECIPE_TOO_LARGE", message, next_step, where=Where(file))
    control = _CONTROL.search(text)
    if control is not None:
        line = text.count("\n", 0, control.start()) + 1
        message = f"line {line} holds the control character U+{ord(control[0]):04X}."
        raise Refused("RECIPE_INVALID", message, "Save the recipe as plain UTF-8 text.", where=Where(file, line))
    builder = _Builder(file, trust, limits)
    try:
        return builder.build(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = None if mark is None else mark.line + 1
        problem = getattr(error, "problem", None) or "it cannot be read"
        message = f"line {at}: this is not YAML: {problem}."
        next_step = "Check indentation, colons and quotes there."
        raise Refused("RECIPE_INVALID", message, next_step, where=Where(file, at)) from None


@dataclass(slots=True)
class _Open:
    """A collection under construction."""

    line: int
    anchor: str | None
    is_map: bool
    items: list[tuple[Node, str | None]]  # node, its anchor
    nodes: int = 1


class _Builder:
    """Builds the trees from the event stream and stops at the first event beyond a limit."""

    def __init__(self, file: str, trust: Trust, limits: TextLimits) -> None:
        self.file, self.trust, self.limits = file, trust, limits
        self.anchors: dict[str, tuple[Node, int]] = {}
        self.used: set[str] = set()
        self.aliased = 0
        self.open: list[_Open] = []
        self.roots: list[Node] = []

    def build(self, text: str) -> tuple[Node, ...]:
        for count, event in enumerate(yaml.parse(text, Loader=_LOADER), 1):
            line = event.start_mark.line + 1 if event.start_mark is not None else 0
            if count > self.limits.events:
                self._refuse("RECIPE_TOO_LARGE", line, "the recipe has too many entries.", "Shorten it.")
            if isinstance(event, yaml.DocumentStartEvent):
                self.anchors = {}
                self.used = set()
            elif isinstance(event, yaml.NodeEvent | yaml.CollectionEndEvent):
                self._take(event, line)
        if not self.roots:
            self._refuse("RECIPE_INVALID", 1, "the recipe is empty.", "Write at least `merge_method` and `models`.")
        return tuple(self.roots)

    def _take(self, event: yaml.Event, line: int) -> None:
        if isinstance(event, yaml.AliasEvent):
            self._alias(event.anchor or "", line)
        elif isinstance(event, yaml.ScalarEvent):
            self._no_tag(event, line)
            self._add(Text(event.value, bool(event.implicit[0]), line), event.anchor, 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            self._no_tag(event, line)
            if len(self.open) >= self.limits.depth:
                message = f"the recipe nests deeper than {self.limits.depth} levels."
                self._refuse("RECIPE_TOO_DEEP", line, message, "A merge recipe needs about six.")
            self.open.append(_Open(line, event.anchor, isinstance(event, yaml.MappingStartEvent), []))
        elif isinstance(event, yaml.CollectionEndEvent):
            done = self.open.pop()
            nodes = tuple(node for node, _ in done.items)
            node = self._table(done) if done.is_map else Sequence(nodes, done.line)
            self._add(node, done.anchor, done.nodes)

    def _add(self, node: Node, anchor: str | None, nodes: int) -> None:
        if anchor is not None:
            self.anchors[anchor] = (node, nodes)
        if self.open:
            self.open[-1].items.append((node, anchor))
            self.open[-1].nodes += nodes
        else:
            self.roots.append(node)

    def _alias(self, anchor: str, line: int) -> None:
        if anchor not in self.anchors:
            self._refuse(
                "RECIPE_INVALID", line, f"the alias *{anchor[:40]} has no finished anchor.", "Define it first."
            )
        self.used.add(anchor)
        node, nodes = self.anchors[anchor]
        if not isinstance(node, Text):
            self.aliased += nodes
            if self.aliased > self.limits.alias_nodes:
                next_step = "Write the block out; aliases to single values are fine."
                self._refuse("RECIPE_USES_ALIASES", line, f"the alias *{anchor[:40]} repeats a whole block.", next_step)
        self._add(node, None, nodes)

    def _table(self, done: _Open) -> Table:
        items: dict[str, Node] = {}
        lines: dict[str, int] = {}
        anchored: set[str] = set()
        inherited: list[Table] = []
        for (key, _), (value, anchor) in zip(done.items[::2], done.items[1::2], strict=True):
            if not isinstance(key, Text):
                self._refuse("RECIPE_INVALID", key.line, "a key is a list or a mapping.", "Write a plain word as key.")
            if key.text == "<<" and key.plain:
                blocks = value.items if isinstance(value, Sequence) else (value,)
                inherited += [block for block in blocks if isinstance(block, Table)]
                continue
            if key.text in items:
                message = f"line {key.line}: `{key.text[:60]}` is given twice (first on line {lines[key.text]})."
                self._refuse("DUPLICATE_KEY", key.line, message, "Keep one of them.")
            items[key.text], lines[key.text] = value, key.line
            if anchor in self.used:
                anchored.add(key.text)
        for block in inherited:
            items = {**block.items, **items}
            lines = {**block.key_lines, **lines}
        return Table(items, lines, done.line, frozenset(anchored))

    def _no_tag(self, event: Any, line: int) -> None:
        if event.tag is not None:
            self._refuse("RECIPE_INVALID", line, f"line {line} uses a YAML tag.", "Remove it: plain values are enough.")

    def _refuse(self, code: str, line: int, message: str, next_step: str) -> NoReturn:
        raise Refused(code, message, next_step, where=Where(self.file, line))


def _from_json(value: object) -> Node:
    if isinstance(value, dict):
        return Table({str(k): _from_json(v) for k, v in value.items()}, dict.fromkeys(map(str, value), 1), 1)
    if isinstance(value, list):
        return Sequence(tuple(_from_json(v) for v in value), 1)
    if isinstance(value, bool):
        return Text("true" if value else "false", True, 1)
    if value is None:
        return Text("null", True, 1)
    return Text(value if isinstance(value, str) else repr(value), not isinstance(value, str), 1)
