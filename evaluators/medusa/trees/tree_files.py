"""Tree files: a list of paths as JSON or as a Python list, the form in which Medusa's trees are published.

[[0], [1], [0, 0]]
mc_sim_7b_63 = [(0,), (1,), (0, 0)]

A file with several lists, such as Medusa's medusa_choices.py, needs a name: medusa_choices.py:vicuna_7b_stage2.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from bot.errors import EvaluationError
from evaluators.medusa.trees.tree import Tree

LIMIT_BYTES = 64 << 10
MOST_PATHS = 512
DEEPEST = 16
LARGEST_RANK = 255


def read(path: Path) -> Tree:
    """The tree in FILE, or the one that FILE:NAME names there. Nothing in it is executed.

    Raises EvaluationError that says what is no tree about it.
    """
    chosen = ""
    if not path.is_file():
        file, _, chosen = path.name.rpartition(":")
        path = path.with_name(file) if file else path
    if not path.is_file():
        raise unfit(f"There is no tree file {path.name}.")
    if path.stat().st_size > LIMIT_BYTES:
        raise unfit(f"The tree file {path.name} is larger than {LIMIT_BYTES >> 10} KiB.")
    try:
        paths = _literal(path.read_text(encoding="utf-8"), chosen)
        return Tree(tuple(_checked(each) for each in paths))
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        what = str(error) if type(error) is ValueError else "it is neither JSON nor a Python list"
        raise unfit(f"The file {path.name} holds no tree: {what}.") from error


def unfit(message: str) -> EvaluationError:
    """The error for a tree that cannot be used."""
    return EvaluationError("SPEED_CHECK_FAILED", message, "Give a list of paths such as [[0], [1], [0, 0]].")


def _literal(text: str, chosen: str) -> list[Any]:
    """The list named `chosen`, or else the only one, of a text that says nothing but lists and their names."""
    found = [
        (_name(statement), _value(statement.value))
        for statement in ast.parse(text).body
        if isinstance(statement, ast.Expr | ast.Assign | ast.AnnAssign) and statement.value is not None
    ]
    lists = [(name, value) for name, value in found if isinstance(value, list | tuple)]
    named = [value for name, value in lists if name == chosen] if chosen else [value for _, value in lists]
    if len(named) != 1:
        names = ", ".join(name for name, _ in lists if name)[:100]
        choose = f": name one of {names} behind a colon" if names and len(lists) > 1 else ""
        raise ValueError(f"it holds {len(named)} lists{f' {chosen[:40]}' * bool(chosen)} where one is a tree{choose}")
    [only] = named
    if not only:
        raise ValueError("its list is empty")
    if len(only) > MOST_PATHS:
        raise ValueError(f"it has {len(only)} paths, more than {MOST_PATHS}")
    return list(only)


def _name(statement: ast.Expr | ast.Assign | ast.AnnAssign) -> str:
    if isinstance(statement, ast.Expr):
        return ""
    target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
    return target.id if isinstance(target, ast.Name) else ""


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
