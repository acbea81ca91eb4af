"""Index arrays from the rows of a source to the output's vocabulary. docs/design/merging.md 3.2.

The row of an output token in source i is i's own row of that token. If i lacks it (or the recipe forces one): the rule
for the token, else the only source that has it, else the base's row, else the mean of those that have it, else zeros.
Rows without a token get the mean of the rows found so, as in mergekit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bot.merge.recipe.spec import ModelRef
from bot.merge.tokenizer.tokenizer import Alignment, Index


@dataclass(frozen=True, slots=True, eq=False)
class Fill:
    """Output rows `rows` (n): the mean over `matrices` (m of them) of their rows `taken` (n, m); zero if m = 0."""

    rows: Index
    matrices: tuple[int, ...]
    taken: Index


@dataclass(frozen=True, slots=True, eq=False)
class RowMap:
    """Re-indexing of one operand: `own[k]` is its row for output row k, -1 for a fill or the mean.

    `padding` are output rows without a token.
    """

    own: Index
    fills: tuple[Fill, ...]
    padding: Index


def row_maps(
    alignment: Alignment, inputs: Sequence[ModelRef], matrices: Mapping[ModelRef, int]
) -> tuple[RowMap, ...] | None:
    """Row maps of `inputs`; `matrices` gives all matrices, in order, with their rows. None if nothing moves."""
    order = list(matrices)
    held = {ref: {token: i for token, i in alignment.sources[ref].items() if i < matrices[ref]} for ref in order}
    # what stands in for a token is the same for every input that lacks it; looking it up asks all of them
    found: dict[str, list[tuple[ModelRef, int]]] = {}

    def substitute(token: str) -> list[tuple[ModelRef, int]]:
        if token not in found:
            found[token] = _substitute(alignment, token, inputs, matrices, held)
        return found[token]

    maps = tuple(_row_map(alignment, held[ref], order, substitute) for ref in inputs)
    identity = np.arange(alignment.rows)
    for ref, one in zip(inputs, maps, strict=True):
        moved = one.fills or matrices[ref] != alignment.rows
        if moved or not np.array_equal(np.where(one.own < 0, identity, one.own), identity):
            return maps
    return None


def _row_map(
    alignment: Alignment,
    mine: Mapping[str, int],
    order: Sequence[ModelRef],
    substitute: Callable[[str], list[tuple[ModelRef, int]]],
) -> RowMap:
    own = np.full(alignment.rows, -1, dtype=np.int64)
    padding = np.ones(alignment.rows, dtype=bool)
    groups: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    number = {ref: i for i, ref in enumerate(order)}
    for token, k in alignment.ids.items():
        if k >= alignment.rows:
            continue
        padding[k] = False
        rule = alignment.rules.get(token)
        if token in mine and not (rule is not None and rule.force):
            own[k] = mine[token]
            continue
        taken = substitute(token)
        where = tuple(number[source] for source, _ in taken)
        groups.setdefault(where, []).append((k, [row for _, row in taken]))
    fills = tuple(
        Fill(
            np.array([k for k, _ in found], dtype=np.int64),
            where,
            np.array([rows for _, rows in found], dtype=np.int64).reshape(len(found), len(where)),
        )
        for where, found in groups.items()
    )
    return RowMap(own, fills, np.flatnonzero(padding))


def _substitute(
    alignment: Alignment,
    token: str,
    inputs: Sequence[ModelRef],
    matrices: Mapping[ModelRef, int],
    held: Mapping[ModelRef, Mapping[str, int]],
) -> list[tuple[ModelRef, int]]:
    """Rows that make up the row of a token that its source lacks."""
    rule = alignment.rules.get(token)
    if rule is not None and rule.source is not None:
        given = rule.source
        if given.model is None:
            return []
        rows = held.get(given.model, {})
        wanted = token if given.kind == "model" else given.token
        row = given.token_id if wanted is None else rows.get(wanted)
        if row is not None and row < matrices.get(given.model, 0):
            return [(given.model, row)]
    having = [ref for ref in inputs if token in held[ref]]
    if len(having) > 1 and alignment.base in having:
        having = [alignment.base]
    return [(ref, held[ref][token]) for ref in having]
