"""Suggestions for mistyped names, limited to small typing errors."""

from __future__ import annotations

from collections.abc import Iterable

MOST_EDITS = 2
LONGEST = 80
LETTERS_PER_EDIT = 3  # a name of five letters may differ in one letter, a longer one in two


def closest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name with the smallest edit distance to `name`, None if none is close.

    Case and the difference between `-` and `_` do not count; equally close names are taken in alphabetical order.
    """
    if len(name) > LONGEST:
        return None
    edits = ((_edits(_plain(name), _plain(each)), each) for each in valid if abs(len(each) - len(name)) <= MOST_EDITS)
    near = [(n, each) for n, each in edits if n <= min(MOST_EDITS, min(len(name), len(each)) // LETTERS_PER_EDIT)]
    return min(near)[1] if near else None


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _edits(one: str, other: str) -> int:
    """Letters to insert, remove, replace or swap with a neighbor (optimal string alignment); `MOST_EDITS` + 1 for more.

    Cells further than `MOST_EDITS` from the diagonal are left out: they cannot lead to fewer.
    """
    many = MOST_EDITS + 1
    rows = [{0: 0} | {j: j for j in range(1, many)}]
    for i, letter in enumerate(one, 1):
        row: dict[int, int] = {}
        for j in range(max(0, i - MOST_EDITS), min(len(other), i + MOST_EDITS) + 1):
            steps = [rows[-1].get(j, many) + 1, row.get(j - 1, many) + 1]
            if j > 0:
                steps.append(rows[-1].get(j - 1, many) + (letter != other[j - 1]))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == other[j - 1]:
                steps.append(rows[-2].get(j - 2, many) + 1)
            row[j] = min(*steps, many)
        if min(row.values(), default=many) == many:
            return many
        rows.append(row)
        del rows[:-2]
    return rows[-1].get(len(other), many)
