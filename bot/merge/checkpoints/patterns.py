"""The module patterns of an adapter's config, matched in time linear in their length.

PEFT writes ranks and alphas by pattern and tests `(.*\\.)?(PATTERN)$` with a backtracking matcher, which a hostile
pattern keeps busy for ever. Here plain names are looked up, and the rest is read as a regular expression proper
(letters, escapes, classes, groups, `|`, `* + ?`, `^ $`) and run as a set of states (Thompson, "Regular expression
search algorithm", CACM 1968). Anything else, such as a look-ahead, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

_PLAIN = re.compile(r"\^?[\w.\-]+", re.ASCII)
_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdigit,
    "w": lambda c: c.isalnum() or c == "_",
    "s": str.isspace,
}
EXPRESSIONS_LIMIT = 256  # patterns that are more than a name
PATTERN_LIMIT = 200  # characters of one pattern
WORK_LIMIT = 20_000_000  # states times characters, over all patterns and names: a few seconds at worst


class BadPattern(Exception):
    """A pattern that is not understood or too costly; carries the half sentence saying why."""


Test = Callable[[str], bool]


@dataclass(slots=True)
class _State:
    """One state: consumes a character that passes `test`, or (test is None) goes on at once to every `then`."""

    test: Test | None = None
    then: list[int] = field(default_factory=list)
    only_at_start: bool = False


@dataclass(slots=True)
class _Parser:
    """Recursive descent from a pattern to states. A fragment is (first state, last state, which goes nowhere yet)."""

    text: str
    at: int = 0
    states: list[_State] = field(default_factory=list)

    def whole(self) -> tuple[int, int]:
        first, last = self.choice()
        if self.at < len(self.text):
            raise BadPattern("has a parenthesis too many")
        return first, last

    def choice(self) -> tuple[int, int]:
        branches = [self.row()]
        while self.peek() == "|":
            self.at += 1
            branches.append(self.row())
        first, last = self.new(), self.new()
        for start, end in branches:
            self.states[first].then.append(start)
            self.states[end].then.append(last)
        return first, last

    def row(self) -> tuple[int, int]:
        first = last = self.new()
        while self.peek() not in ("", "|", ")"):
            start, end = self.repeated()
            self.states[last].then.append(start)
            last = end
        return first, last

    def repeated(self) -> tuple[int, int]:
        start, end = self.one()
        sign = self.peek()
        if sign not in ("*", "+", "?") or not sign:
            return start, end
        self.at += 1
        if self.peek() == "?":  # a lazy repetition matches the same names
            self.at += 1
        if self.peek() in ("*", "+", "?"):
            raise BadPattern("repeats a repetition")
        first, last = self.new(), self.new()
        self.states[first].then.append(start)
        self.states[end].then.append(last)
        if sign in "*?":
            self.states[first].then.append(last)
        if sign in "*+":
            self.states[end].then.append(start)
        return first, last

    def one(self) -> tuple[int, int]:
        char = self.peek()
        self.at += 1
        if char == "(":
            return self.group()
        if char == "^":
            first = self.new()
            self.states[first].only_at_start = True
            return first, first
        if char == "$":
            if self.peek() not in ("", ")", "|"):
                raise BadPattern("has a `$` that is not at its end")
            first = self.new()
            return first, first
        return self.consuming(self.test(char))

    def group(self) -> tuple[int, int]:
        if self.text.startswith("?:", self.at):
            self.at += 2
        elif self.peek() == "?":
            raise BadPattern("uses a construct of regular expressions that is not read here")
        fragment = self.choice()
        if self.peek() != ")":
            raise BadPattern("lacks a closing parenthesis")
        self.at += 1
        return fragment

    def test(self, char: str) -> Test:
        if char == ".":
            return lambda c: True
        if char == "[":
            return self.bracket()
        if char == "\\":
            return self.escape()
        if char in "*+?{}":
            raise BadPattern("uses a construct of regular expressions that is not read here")
        return lambda c: c == char

    def escape(self) -> Test:
        char = self.peek()
        self.at += 1
        if char.lower() in _CLASSES:
            test = _CLASSES[char.lower()]
            return test if char.islower() else lambda c: not test(c)
        if not char or char.isalnum():
            raise BadPattern("uses a construct of regular expressions that is not read here")
        return lambda c: c == char

    def bracket(self) -> Test:
        inverted = self.peek() == "^"
        self.at += inverted
        tests: list[Test] = []
        while self.peek() != "]":
            char = self.peek()
            self.at += 1
            if not char:
                raise BadPattern("lacks a closing bracket")
            if char == "\\":
                tests.append(self.escape())
            elif self.peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("", "]"):
                high = self.text[self.at + 1]
                self.at += 2
                tests.append(_between(char, high))
            else:
                tests.append(_equals(char))
        self.at += 1
        if not tests:
            raise BadPattern("has empty brackets")
        return lambda c: any(test(c) for test in tests) is not inverted

    def consuming(self, test: Test) -> tuple[int, int]:
        first, last = self.new(), self.new()
        self.states[first].test = test
        self.states[first].then.append(last)
        return first, last

    def new(self) -> int:
        self.states.append(_State())
        return len(self.states) - 1

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]


def _between(low: str, high: str) -> Test:
    return lambda c: low <= c <= high


def _equals(char: str) -> Test:
    return lambda c: c == char


class _Machine:
    """One pattern, ready to run."""

    def __init__(self, pattern: str) -> None:
        parser = _Parser(pattern)
        try:
            self.first, self.last = parser.whole()
        except RecursionError:
            raise BadPattern("nests too deeply") from None
        self.states: Sequence[_State] = parser.states

    def ends(self, name: str) -> bool:
        """Whether the pattern matches the whole name, or its end after a dot."""
        now: set[int] = set()
        self._enter(self.first, 0, now)
        for at, char in enumerate(name, 1):
            after: set[int] = set()
            for number in now:
                state = self.states[number]
                if state.test is not None and state.test(char):
                    self._enter(state.then[0], at, after)
            if char == ".":
                self._enter(self.first, at, after)
            now = after
        return self.last in now

    def _enter(self, number: int, at: int, into: set[int]) -> None:
        waiting = [number]
        while waiting:
            number = waiting.pop()
            state = self.states[number]
            if number in into or (state.only_at_start and at):
                continue
            into.add(number)
            if state.test is None:
                waiting += state.then


class Patterns:
    """Values by pattern, as in `rank_pattern`; the first pattern that matches decides. Raises `BadPattern`."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self._plain: dict[str, tuple[int, float]] = {}
        self._machines: list[tuple[int, _Machine, float]] = []
        self._work = 0
        self._known: dict[str, float | None] = {}
        for order, (pattern, value) in enumerate(values.items()):
            if len(pattern) > PATTERN_LIMIT:
                raise BadPattern(f"is longer than {PATTERN_LIMIT} characters")
            if _PLAIN.fullmatch(pattern):
                self._plain[pattern] = (order, value)
            elif len(self._machines) == EXPRESSIONS_LIMIT:
                raise BadPattern(f"is one more than the {EXPRESSIONS_LIMIT} expressions that are read")
            else:
                self._machines.append((order, _Machine(pattern), value))
        self._states = sum(len(machine.states) for _, machine, _ in self._machines)

    def value(self, module: str) -> float | None:
        """The value for a module by its full name, None if no pattern matches."""
        if module not in self._known:
            self._known[module] = self._match(module)
        return self._known[module]

    def _match(self, module: str) -> float | None:
        parts = module.split(".")
        ends = ["^" + module, *(".".join(parts[i:]) for i in range(len(parts)))]
        found = [self._plain[end] for end in ends if end in self._plain]
        first = min(found, default=None)
        self._work += self._states * len(module)
        if self._work > WORK_LIMIT:
            raise BadPattern("and its neighbours are too many for the modules they are tried on")
        for order, machine, value in self._machines:
            if first is not None and first[0] < order:
                break
            if machine.ends(module):
                return value
        return None if first is None else first[1]
