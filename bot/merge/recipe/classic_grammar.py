"""The `classic:` block of recipes made from arguments of the 2023 `main.py`; mergekit ignores it."""

from __future__ import annotations

from bot.merge.recipe.document import Reader, Table
from bot.merge.recipe.spec import Classic

KEY = "classic"


def classic(reader: Reader, top: Table) -> Classic | None:
    """The block as `Recipe.document` writes it, None without one. In untrusted recipes the key is unknown."""
    node = top.given(KEY)
    if node is None:
        return None
    if reader.trust == "stranger":
        reader.unknown_key(KEY, top.key_lines[KEY], "", {"merge_method", "models", "slices", "parameters"})
        return None
    table = reader.mapping(node, KEY)
    reader.unknown(table, KEY, {"naive_count", "copy_tokenizer", "layer_gradient"})
    flags = {
        key: reader.boolean(table.items[key], f"{KEY}.{key}")
        for key in ("naive_count", "copy_tokenizer")
        if key in table.items
    }
    values = table.items.get("layer_gradient")
    items = reader.sequence(values, f"{KEY}.layer_gradient").items if values is not None else ()
    gradient = tuple(reader.number(item, f"{KEY}.layer_gradient[{i}]") for i, item in enumerate(items))
    return Classic(flags.get("naive_count", False), flags.get("copy_tokenizer", True), gradient)
