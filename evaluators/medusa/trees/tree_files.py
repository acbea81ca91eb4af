"""Trees that somebody gives: a list of paths in a file, as JSON or as the Python list in which Medusa's are published.

[[0], [1], [0, 0]]
mc_sim_7b_63 = [(0,), (1,), (0, 0)]
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from evaluators.errors import EvaluationError
from evaluators.medusa.trees.tree import Tree

LIMIT_BYTES = 64 << 10
MOST_PATHS = 512
DEEPEST = 16
LARGEST_RANK = 255


def read(path: Path) -> Tree:
    """The tree in the file. Raises EvaluationError that says what is no tree about it. Nothing in it is executed."""
    if not path.is_file():
        raise unfit(f"There is no tree file {path.name}.")
    if path.stat().st_size > LIMIT_BYTES:
        raise unfit(f"The tree file {path.name} is larger than {LIMIT_BYTES >> 10} KiB.")
    try:
        paths = _literal(path.read_text(encoding="utf-8"))
        return Tree(tuple(_checked(each) for each in paths))
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        what = str(error) if type(error) is ValueError else "it is neither JSON nor a Python list"
        raise unfit(f"The file {path.name} holds no tree: {what}.") from error


def unfit(message: str) -> EvaluationError:
    """The error for a tree that cannot be used."""
    return EvaluationError("SPEED_CHECK_FAILED", message, "Give a list of paths such as [[0], [1], [0, 0]].")


def _literal(text: str) -> list[Any]:
    """The only list of a text that says nothing but it, or gives it a name."""
    found = [
        _value(statement.value)
        for statement in ast.parse(text).body
        if isinstance(statement, ast.Expr | ast.Assign | ast.AnnAssign) and statement.value is not None
    ]
    lists = [value for value in found if isinstance(value, list | tuple)]
    if len(lists) != 1:
        raise ValueError(f"it holds {len(lists)} lists where one is a tree")
    if not lists[0]:
        raise ValueError("its list is empty")
    if len(lists[0]) > MOST_PATHS:
        raise ValueError(f"it has {len(lists[0])} paths, more than {MOST_PATHS}")
    return list(lists[0])


def _value(expression: ast.expr) -> Any:
    try:
        return ast.literal_eval(expression)
    except (ValueError, TypeError) as error:
        raise ValueError(f"line {expression.lineno} says something else than numbers in lists") from error


def _checked(path: Any) -> tuple[int, ...]:
    if not isinstance(path, list | tuple) or not all(type(rank) is int for rank in path):
        raise ValueError(f"{str(path)[:40]} is not a list of ranks")
    if len(path) > DEEPEST:
        raise ValueError(f"a path is {len(path)} levels deep, more than {DEEPEST}")
    if path and max(path) > LARGEST_RANK:
        raise ValueError(f"rank {str(max(path))[:20]} is larger than {LARGEST_RANK}")
    return tuple(path)
