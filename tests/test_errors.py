"""One list of codes: each that is raised anywhere stands in it, and each that stands in it is raised somewhere."""

from __future__ import annotations

import ast
import pickle
from collections.abc import Iterator

import pytest

from bot.errors import CODES, Cancelled, EvaluationError, Failed, LeaseLost, PublishConflict, Refused, Transient, Where
from bot.stages.error_subjects import translated
from tests.test_house import sources

ERRORS = frozenset({"Refused", "Failed", "Transient", "EvaluationError", "TaskFailed"})


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
    assert {code: place for code, place in raised().items() if code not in CODES} == {}


def test_every_code_of_the_list_is_raised_somewhere() -> None:
    assert CODES - raised().keys() == set()


def test_a_translated_evaluation_error_keeps_its_code_and_names_its_subject() -> None:
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


def test_the_class_of_an_error_follows_from_its_code() -> None:
    assert type(Failed("LEASE_LOST", "Gone.")) is LeaseLost
    assert type(LeaseLost("LEASE_LOST", "Gone.")) is LeaseLost
    assert type(Refused("PUBLISH_CONFLICT", "Changed.")) is PublishConflict
    assert type(Transient("PUBLISH_CONFLICT", "Changed.", retry_after_s=1)) is Transient
    assert type(Refused("CANCELLED", "Cancelled.")) is Refused
    assert type(pickle.loads(pickle.dumps(Failed("CANCELLED", "Cancelled.")))) is Cancelled
