"""What each merge method asks for: base, number of inputs, parameters with defaults and ranges.

This is the table of merging.md 2.1 as data. The parser reads it to tell a typo from a parameter of another method,
the planner reads it to check a recipe before a weight is read. Names and defaults are mergekit's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum


class Base(Enum):
    """How a method uses `base_model`."""

    REQUIRED = "required"
    OPTIONAL = "optional"  # its presence switches to task-vector mode
    IGNORED = "ignored"  # a base that is given is an ordinary input


class Missing(Enum):
    """What happens to an optional tensor (a bias, a tied head) that only some inputs have."""

    MERGE = "merge those that have it"
    ONE = "copy it if exactly one input has it"
    BASE = "copy it only if that one is the base"
    STOCK = "copy the base's, leave out with too few inputs"


class Kind(Enum):
    """The type of a parameter's value."""

    NUMBER = "a number"
    INTEGER = "a whole number"
    BOOLEAN = "true or false"


class Absent(Enum):
    """Stands for a default: REQUIRED has none, NONE leaves the parameter unset."""

    REQUIRED = "required"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter: its type, default and range `low <= v <= high` (an open end excludes the bound)."""

    name: str
    default: float | int | bool | Absent
    kind: Kind = Kind.NUMBER
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    used: bool = True

    def admits(self, value: float) -> bool:
        """Whether a finite value lies in the range."""
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    @property
    def range_text(self) -> str:
        """The range in interval notation, for a sentence: `[0, 1]`, `(0, inf)`."""
        left = "(" if self.low_open or math.isinf(self.low) else "["
        right = ")" if self.high_open or math.isinf(self.high) else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


@dataclass(frozen=True, slots=True)
class Method:
    """The contract of one method. `least` and `most` count inputs; the base is not counted unless ignored."""

    name: str
    base: Base
    least: int
    most: int | None
    per_input: tuple[Parameter, ...]
    shared: tuple[Parameter, ...]
    missing: Missing
    reference: str
    elects_sign: bool = False
    draws: bool = False

    def parameter(self, name: str) -> Parameter | None:
        """The parameter of that name, whatever its scope."""
        return next((p for p in (*self.per_input, *self.shared) if p.name == name), None)


def _flag(name: str, default: bool, used: bool = True) -> Parameter:
    return Parameter(name, default, Kind.BOOLEAN, used=used)


_WEIGHT = Parameter("weight", Absent.REQUIRED)
_DENSITY = Parameter("density", 1.0, low=0, high=1)
_LAMBDA = Parameter("lambda", 1.0)


def _task_vector(
    name: str,
    reference: str,
    *,
    normalize: bool = False,
    rescale: bool = False,
    extra: tuple[Parameter, ...] = (),
    sparse: bool = True,
    elects: bool = False,
    draws: bool = False,
) -> Method:
    density = _DENSITY if sparse else Parameter("density", Absent.NONE, used=False)
    shared = (_flag("normalize", normalize), _LAMBDA, _flag("rescale", rescale, used=sparse))
    return Method(
        name, Base.REQUIRED, 1, None, (_WEIGHT, density, *extra), shared, Missing.MERGE, reference, elects, draws
    )


_EPSILON = Parameter("epsilon", 0.15, low=0, high=1)
_GAMMA = Parameter("gamma", 0.01, low=0, high=1, high_open=True)
_ACTIVE = Parameter("epsilon", 1e-5, low=0)
_DARE, _DELLA, _CRUMBS = "arXiv:2311.03099", "arXiv:2406.11617", "arXiv:2312.06795"

_TABLE = (
    Method(
        "linear", Base.IGNORED, 1, None, (_WEIGHT,), (_flag("normalize", True),), Missing.MERGE, "arXiv:2203.05482"
    ),
    Method(
        "slerp", Base.REQUIRED, 1, 1, (), (Parameter("t", Absent.REQUIRED),), Missing.ONE,
        "K. Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985",
    ),
    Method(
        "nuslerp", Base.OPTIONAL, 2, 2, (_WEIGHT,), (_flag("nuslerp_flatten", True), _flag("nuslerp_row_wise", False)),
        Missing.ONE, "mergekit",
    ),
    Method(
        "multislerp", Base.OPTIONAL, 1, None, (_WEIGHT,),
        (_flag("normalize_weights", True), Parameter("eps", 1e-8, low=0, low_open=True)), Missing.MERGE,
        "S. Buss and J. Fillmore, Spherical averages and applications to spherical splines, ACM TOG 2001",
    ),
    Method(
        "karcher", Base.IGNORED, 1, None, (),
        (Parameter("max_iter", 10, Kind.INTEGER, low=0), Parameter("tol", 1e-5, low=0, low_open=True)),
        Missing.MERGE, "arXiv:2603.04972",
    ),
    _task_vector("task_arithmetic", "arXiv:2212.04089", sparse=False),
    _task_vector("ties", "arXiv:2306.01708", normalize=True, elects=True),
    _task_vector("dare_linear", _DARE, rescale=True, draws=True),
    _task_vector("dare_ties", _DARE, rescale=True, elects=True, draws=True),
    _task_vector("della", _DELLA, normalize=True, rescale=True, extra=(_EPSILON,), elects=True, draws=True),
    _task_vector("della_linear", _DELLA, rescale=True, extra=(_EPSILON,), draws=True),
    _task_vector("breadcrumbs", _CRUMBS, extra=(_GAMMA,)),
    _task_vector("breadcrumbs_ties", _CRUMBS, extra=(_GAMMA,), elects=True),
    Method(
        "model_stock", Base.REQUIRED, 2, None, (), (_flag("filter_wise", False),), Missing.STOCK, "arXiv:2403.19522"
    ),
    Method(
        "passthrough", Base.IGNORED, 1, 1, (Parameter("scale", Absent.NONE),), (), Missing.MERGE,
        "cf. depth up-scaling, arXiv:2312.15166",
    ),
    Method(
        "nearswap", Base.REQUIRED, 1, 1, (), (Parameter("t", Absent.REQUIRED, low=0),), Missing.BASE,
        "model card of QuartetAnemoi-70B-t0.0001",
    ),
    Method("arcee_fusion", Base.REQUIRED, 1, 1, (), (), Missing.ONE, "vendor method, no paper"),
    Method(
        "sce", Base.REQUIRED, 1, None, (), (Parameter("select_topk", 1.0, low=0, high=1),), Missing.MERGE,
        "arXiv:2408.07990",
    ),
    Method("ram", Base.REQUIRED, 1, None, (), (_ACTIVE,), Missing.MERGE, "arXiv:2601.13572"),
    Method(
        "ramplus_tl", Base.REQUIRED, 1, None, (),
        (Parameter("r", 0.1), Parameter("alpha", 0.2, low=0), _ACTIVE), Missing.MERGE, "arXiv:2601.13572",
    ),
)  # fmt: skip

METHODS: dict[str, Method] = {method.name: method for method in _TABLE}

# Written by mergekit or by older recipes, without effect on any method here.
HARMLESS = frozenset(
    {"int8_mask", "residual_weight", "embed_slerp", "random_seed", "name", "consensus_method", "swapping"}
)
KNOWN_PARAMETERS: dict[str, Kind] = {p.name: p.kind for method in _TABLE for p in (*method.per_input, *method.shared)}
