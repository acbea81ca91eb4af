"""One list of codes: each that is raised anywhere stands in it, and each that stands in it is raised somewhere."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from bot.errors import CODES, Failed, Refused, Where
from bot.stages.evaluator_errors import translated
from evaluators.errors import EvaluationError
from tests.test_house import sources

ERRORS = frozenset({"Refused", "Failed", "Transient", "EvaluationError"})
# a task's failure within the harness: `evaluators.harness.process` makes it EVALUATION_FAILED before anybody sees it
INNER = frozenset({"TASK_FAILED"})


def _name(called: ast.expr) -> str:
    return called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""


def _given(call: ast.Call, place: int) -> ast.expr | None:
    """The argument that is the code: at `place`, or by its name."""
    named = [each.value for each in call.keywords if each.arg == "code"]
    return call.args[place] if len(call.args) > place else next(iter(named), None)


def _places(tree: ast.Module) -> dict[str, int]:
    """Where each function of a file that hands its parameter `code` to an error takes it."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any(_hands_on(each) for each in ast.walk(node)):
            names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args) if arg.arg != "self"]
            if "code" in names:
                found[node.name] = names.index("code")
    return found


def _hands_on(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and _name(node.func) in ERRORS
        and any(isinstance(each, ast.Name) and each.id == "code" for each in node.args)
    )


def _literals(node: ast.expr | None) -> Iterator[str]:
    """`"A"`, or both of `"A" if … else "B"`."""
    if isinstance(node, ast.IfExp):
        yield from (*_literals(node.body), *_literals(node.orelse))
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


def raised() -> dict[str, str]:
    """Code -> a place where it is raised."""
    trees = dict(sources())
    own = {path: _places(tree) for path, tree in trees.items()}
    shared = {name: place for places in own.values() for name, place in places.items() if not name.startswith("_")}
    found: dict[str, str] = {}
    for path, tree in trees.items():
        places = dict.fromkeys(ERRORS, 0) | shared | own[path]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _name(node.func) in places:
                for code in _literals(_given(node, places[_name(node.func)])):
                    found.setdefault(code, f"{path}:{node.lineno}")
    return found


def test_every_code_that_is_raised_is_in_the_list() -> None:
    assert {code: place for code, place in raised().items() if code not in CODES | INNER} == {}


def test_every_code_of_the_list_is_raised_somewhere() -> None:
    assert CODES - raised().keys() == set()


def test_an_evaluators_error_becomes_the_bots_with_its_code_and_the_thing_it_is_about() -> None:
    with pytest.raises(Failed) as failed, translated(about="org/a"):
        raise EvaluationError("BAD_HEADS", "Head 2 is cut short.", "Train it again.")
    assert failed.value.code == "BAD_HEADS"
    assert str(failed.value) == "org/a: Head 2 is cut short. Train it again."
    with pytest.raises(Failed, match=r"^Head 2 of org/a is cut short\.$"), translated(about="org/a"):
        raise EvaluationError("BAD_HEADS", "Head 2 of org/a is cut short.")
    with pytest.raises(Refused) as refused, translated(Refused, where=Where("suite.yml", 3)):
        raise EvaluationError("UNKNOWN_TASK", "There is no task `x`.")
    assert refused.value.where == Where("suite.yml", 3)
    with pytest.raises(KeyError), translated():
        raise KeyError  # what is no measurement's failure passes
