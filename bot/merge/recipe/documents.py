"""Recipes of several documents: names, dependencies, the final document. docs/design/merging.md 3.1.

A model whose path is the name of a document means that document's result. The final document is the unnamed one;
if all have names, it is the last of those that no other document uses. The others run before it, each after those it
uses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from bot.merge.recipe import grammar
from bot.merge.recipe.document import Node, Reader, Table, Text, shown
from bot.merge.recipe.spec import ModelRef, Notice, Recipe, Stage

MOST = 8  # maximum number of documents in one recipe
_NAME = re.compile(r"[^\x00-\x1f\x7f+@]{1,96}")
MakeReader = Callable[[frozenset[str]], Reader]  # reader of a document, from the names of all documents


def recipe(make_reader: MakeReader, roots: Sequence[Node]) -> Recipe:
    """Build the recipe of one or several documents, or raise `Refused` with line, path and next step."""
    reader = make_reader(frozenset())
    written = [root for root in roots if not (isinstance(root, Text) and root.is_null)] or roots[:1]
    if len(written) == 1:
        built = grammar.recipe(reader, written[0])
        if _name(reader, written[0]) is None:
            return built
        return replace(
            built, notices=(*built.notices, Notice("UNUSED_KEY", "`name` has no effect in a recipe of one document."))
        )
    if len(written) > MOST:
        message = f"the recipe has {len(written)} documents; the limit is {MOST}."
        reader.refuse("RECIPE_TOO_LARGE", written[MOST], "", message, "Merge in several runs.")
    names = _names(reader, written)
    named = frozenset(name for name in names if name is not None)
    recipes = [grammar.recipe(make_reader(named), root) for root in written]
    uses = [_uses(reader, root, built, names) for root, built in zip(written, recipes, strict=True)]
    order = _order(reader, written, names, uses)
    stages = tuple(Stage(names[i] or "", recipes[i]) for i in order[:-1])
    final = recipes[order[-1]]
    unused = tuple(
        Notice("UNUSED_DOCUMENT", f"the document {shown(names[i] or '')} is used by no other and is left out.")
        for i in range(len(written))
        if i not in order
    )
    return replace(final, stages=stages, notices=(*final.notices, *unused))


def _names(reader: Reader, roots: Sequence[Node]) -> list[str | None]:
    names = [_name(reader, root) for root in roots]
    for i, (root, name) in enumerate(zip(roots, names, strict=True)):
        first = names.index(name)
        if first == i:
            continue
        if name is None:
            message = f"the documents on lines {roots[first].line} and {root.line} have no name."
            next_step = "Give every document but the last a `name:`, and use that name as a model."
            reader.refuse("MISSING_KEY", root, "name", message, next_step)
        message = f"the documents on lines {roots[first].line} and {root.line} are both called {shown(name)}."
        reader.refuse("DUPLICATE_KEY", root, "name", message, "Give each its own name.")
    return names


def _name(reader: Reader, root: Node) -> str | None:
    node = root.given("name") if isinstance(root, Table) else None
    if node is None:
        return None
    name = reader.text(node, "name").strip()
    if not _NAME.fullmatch(name):
        message = f"line {node.line}: {shown(name)} cannot be a document's name."
        reader.refuse("RECIPE_INVALID", node, "name", message, "Write up to 96 characters without `@` and `+`.")
    return name


def _uses(reader: Reader, root: Node, built: Recipe, names: Sequence[str | None]) -> list[int]:
    """Documents whose results a document uses, in the order of use, so that reordering the text changes nothing."""
    places: Mapping[ModelRef, int] = {ModelRef(name): i for i, name in enumerate(names) if name is not None}
    for ref in built.sources:
        if ref.lora in places:
            message = f"{ref} uses {shown(str(ref.lora))}, the result of a document, as an adapter."
            next_step = "A merge gives a model; name an adapter's own repo after `+`."
            reader.refuse("RECIPE_INVALID", root, "", message, next_step)
    return list(dict.fromkeys(places[ref.bare] for ref in built.sources if ref.bare in places))


def _order(
    reader: Reader, roots: Sequence[Node], names: Sequence[str | None], uses: Sequence[Sequence[int]]
) -> list[int]:
    """Order of execution: the final document last, every document after those it uses."""
    used = {i for some in uses for i in some}
    ends = [i for i in range(len(roots)) if i not in used]
    order: list[int] = []
    entered: list[int] = []

    def visit(i: int) -> None:
        if i in order:
            return
        if i in entered:
            circle = " -> ".join(shown(names[j] or "") for j in (*entered[entered.index(i) :], i))
            message = f"the documents need each other in a circle: {circle}."
            next_step = "Let every document use only results that are made before it."
            reader.refuse("RECIPE_INVALID", roots[i], "", message, next_step)
        entered.append(i)
        for needed in uses[i]:
            visit(needed)
        entered.pop()
        order.append(i)

    # a document in a circle is used by another one, so only a walk from every document finds it
    for i in range(len(roots)):
        visit(i)
    final = names.index(None) if None in names else ends[-1]
    order.clear()
    visit(final)
    return order
