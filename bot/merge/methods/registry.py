"""Registry of the merge methods. `@merge_method` adds a method: its parameters with ranges, its kernel, its memory.

One file of this folder holds one family of methods. Modules here import torch inside functions only, because planning
reads the registry and starts without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from bot.merge.streaming.operation import Operation

if TYPE_CHECKING:
    from bot.merge.streaming.inputs import Inputs, Kernel


class Base(Enum):
    """Role of `base_model` in a method."""

    REQUIRED = "required"
    OPTIONAL = "optional"  # with a base the method works on task vectors
    IGNORED = "ignored"  # a given base is an ordinary input


class Missing(Enum):
    """Treatment of an optional tensor (a bias, a tied head) that only some inputs have."""

    MERGE = "merge those that have it"
    ONE = "copy it if exactly one input has it"
    BASE = "copy it only if that one is the base"
    STOCK = "copy the base's, leave out with too few inputs"


class Kind(Enum):
    """Type of a parameter's value."""

    NUMBER = "a number"
    INTEGER = "a whole number"
    BOOLEAN = "true or false"


class Absent(Enum):
    """Default of a parameter without one: REQUIRED must be given, NONE may stay unset."""

    REQUIRED = "required"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter with its type, default and range `low <= v <= high` (an open end excludes the bound)."""

    name: str
    default: float | int | bool | Absent
    kind: Kind = Kind.NUMBER
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    used: bool = True  # False: accepted for compatibility with mergekit

    def admits(self, value: float) -> bool:
        """True if a finite value lies in the range."""
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    @property
    def range_text(self) -> str:
        """The range in interval notation: `[0, 1]`, `(0, inf)`."""
        left = "(" if self.low_open or math.isinf(self.low) else "["
        right = ")" if self.high_open or math.isinf(self.high) else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem with the resolved parameters of one tensor: a refusal if it has a next step, else a notice."""

    code: str
    message: str
    next_step: str = ""


def one_element(operation: Operation) -> int:
    """Row length of methods that do not look at rows."""
    return 1


def no_state(operation: Operation, itemsize: int) -> int:
    """State of methods that keep no more than sums."""
    return 0


def no_findings(operation: Operation, paths: Sequence[str]) -> Iterator[Finding]:
    """Check of methods whose parameters need no more than their ranges."""
    yield from ()


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method.

    kernel: makes the passes it needs over the inputs and returns the function that computes a chunk of the result.
    least, most: number of inputs; the base is not counted unless ignored.
    row_length: elements that a chunk must hold together, 1 if the method does not look at rows.
    state_bytes: memory kept about the whole tensor between passes, given the item size of the compute dtype.
    check: problems that show once all parameters of a tensor are resolved; receives the YAML path of each operand.
    """

    name: str
    base: Base
    least: int
    most: int | None
    per_input: tuple[Parameter, ...]
    shared: tuple[Parameter, ...]
    missing: Missing
    reference: str
    summary: str
    kernel: Callable[[Inputs], Kernel]
    draws: bool = False
    row_length: Callable[[Operation], int] = one_element
    state_bytes: Callable[[Operation, int], int] = no_state
    check: Callable[[Operation, Sequence[str]], Iterator[Finding]] = no_findings

    def parameter(self, name: str) -> Parameter | None:
        """The parameter of that name, per input or shared."""
        return next((p for p in (*self.per_input, *self.shared) if p.name == name), None)


METHODS: dict[str, Method] = {}


def merge_method(
    name: str,
    *,
    base: Base,
    inputs: tuple[int, int | None],
    reference: str,
    per_input: tuple[Parameter, ...] = (),
    shared: tuple[Parameter, ...] = (),
    missing: Missing = Missing.MERGE,
    **hooks: object,
) -> Callable[[Callable[[Inputs], Kernel]], Callable[[Inputs], Kernel]]:
    """Register the decorated kernel as the method `name`. `inputs`: least and most; `hooks`: see `Method`.

    The first line of the kernel's docstring becomes the summary in the documentation.
    """

    def register(kernel: Callable[[Inputs], Kernel]) -> Callable[[Inputs], Kernel]:
        summary = (kernel.__doc__ or "").strip().partition("\n")[0]
        METHODS[name] = Method(
            name,
            base,
            *inputs,
            per_input,
            shared,
            missing,
            reference,
            summary,
            kernel,
            **hooks,  # type: ignore[arg-type]
        )
        return kernel

    return register


def flag(name: str, default: bool, used: bool = True) -> Parameter:
    """A boolean parameter."""
    return Parameter(name, default, Kind.BOOLEAN, used=used)


WEIGHT = Parameter("weight", Absent.REQUIRED)
