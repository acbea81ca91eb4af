"""Speed report `mergebot.decode_speed/1`: its types, and the encoder and decoder of its JSON. Imports no torch.

The JSON has the fields of the types as keys. None means not measured; speeds are tokens per second. The decoder ignores
unknown keys and fills in missing ones, so that reports of other releases stay readable.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Literal

from pydantic import TypeAdapter

SCHEMA = "mergebot.decode_speed/1"
Interval = tuple[float, float]
ClockName = Literal["wall", "cpu"]
Verdict = Literal["faster", "slower", "same", "inconclusive"]
CONCLUSIVE = ("faster", "slower", "same")
_LABELS = {
    "none": "baseline, repeated",
    "native": "transformers' generate",
    "prompt_lookup": "prompt lookup",
    "identity": "untrained heads",
    "fresh": "heads trained for it",
    "merged": "its parents' heads, merged",
    "merged_tuned": "merged heads, tuned",
}
_LABEL_PREFIXES = {"parent:": "heads of ", "heads:": "given heads "}


@dataclass(frozen=True, slots=True)
class Model:
    """The checkpoint and the dtype it ran in."""

    weights_sha256: str | None = None
    architecture: str | None = None
    parameters: int | None = None
    layers: int | None = None
    hidden_size: int | None = None
    vocab_size: int | None = None
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Environment:
    """The machine and the libraries; loads are one-minute averages."""

    device: str | None = None
    cores: int | None = None
    threads: int | None = None
    torch: str | None = None
    transformers: str | None = None
    attention: str | None = None
    execution: str | None = None
    load_before: float | None = None
    load_after: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Suite:
    """The questions as run; `looping` counts repetitive answers, `shortened` prompts cut to the context."""

    name: str | None = None
    sha256: str | None = None
    questions: int | None = None
    turns: int | None = None
    max_new_tokens: int | None = None
    chat_template: bool | None = None
    mean_context_tokens: float | None = None
    repeats: int | None = None
    order: str | None = None
    looping: int | None = None
    shortened: int | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """A forward pass of `n` tokens; `ratio` is relative to one token."""

    n: int
    forward_ms: float
    ratio: float


@dataclass(frozen=True, slots=True)
class Curve:
    """Cost of a forward pass by the number of tokens."""

    context_tokens: int | None = None
    clock: ClockName | None = None
    points: tuple[Point, ...] = ()


@dataclass(frozen=True, slots=True)
class Steadiness:
    """A/A comparison: the first baseline run of each question over the second."""

    ratio: float | None = None
    ci95: Interval | None = None
    ok: bool | None = None


@dataclass(frozen=True, slots=True)
class Baseline:
    """All runs of baseline decoding together."""

    tokens: int | None = None
    steps: int | None = None
    wall_s: float | None = None
    cpu_s: float | None = None
    tokens_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Shape of a set of heads."""

    kind: str | None = None
    count: int | None = None
    layers: int | None = None
    conditioned: bool | None = None
    kept_vocab: int | None = None


@dataclass(frozen=True, slots=True)
class HeadAccuracy:
    """Top-1 accuracy of one head."""

    head: int | None = None
    top1: float = 0.0


@dataclass(frozen=True, slots=True)
class TimedTree:
    """The timed tree and its origin."""

    nodes: int | None = None
    depth: int | None = None
    paths: tuple[tuple[int, ...], ...] | None = None
    chosen: Literal["none", "cost", "common", "given"] = "none"


@dataclass(frozen=True, slots=True)
class TokensPerStep:
    """Expected from the calibration text, simulated on the timed text, measured; `common_tree` is simulated with one
    tree for all sets of heads."""

    expected: float | None = None
    simulated: float | None = None
    measured: float | None = None
    common_tree: float | None = None


@dataclass(frozen=True, slots=True)
class Speedup:
    """Speedup over the baseline by each clock; `clock_used` is the decisive one, None if nothing was timed."""

    wall: float | None = None
    wall_ci95: Interval | None = None
    cpu: float | None = None
    cpu_ci95: Interval | None = None
    clock_used: ClockName | None = None
    predicted_here: float | None = None
    verdict: Verdict | None = None

    @property
    def ratio(self) -> float | None:
        """The speedup by the decisive clock."""
        return {"wall": self.wall, "cpu": self.cpu, None: None}[self.clock_used]

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval of the speedup by the decisive clock."""
        return {"wall": self.wall_ci95, "cpu": self.cpu_ci95, None: None}[self.clock_used]


@dataclass(frozen=True, slots=True)
class Divergence:
    """First difference of a run from the baseline's text: token `index` of the answer to question `prompt`.

    `tie` is True if rounding explains every token from there on, None if that was not checked. The least explained
    token is `gap` below the best one in float32, and `limit` is the reach of rounding.
    """

    prompt: str
    index: int
    gap: float | None = None
    limit: float | None = None
    tie: bool | None = None


@dataclass(frozen=True, slots=True)
class Exact:
    """Number of answers equal to the baseline's."""

    prompts: int | None = None
    equal: int | None = None
    divergences: tuple[Divergence, ...] = ()


@dataclass(frozen=True, slots=True)
class Category:
    """Figures of one category of questions."""

    name: str
    prompts: int
    tokens_per_step: float | None = None
    speedup: float | None = None


@dataclass(frozen=True, slots=True)
class Training:
    """Cost of making a set of heads, and the tokens after which it pays off."""

    prompts: int | None = None
    tokens: int | None = None
    positions: int | None = None
    generate_s: float | None = None
    features_s: float | None = None
    fit_s: float | None = None
    steps: int | None = None
    seed: int | None = None
    break_even_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One decoding method; `absent_because` gives the reason if it was not tried."""

    id: str
    origin: str
    source: str | None = None
    absent_because: str | None = None
    overhead: float | None = None
    tokens_per_s: float | None = None
    heads: HeadShape = HeadShape()
    accuracy: tuple[HeadAccuracy, ...] = ()
    tree: TimedTree = TimedTree()
    tokens_per_step: TokensPerStep = TokensPerStep()
    speedup: Speedup = Speedup()
    exact: Exact = Exact()
    categories: tuple[Category, ...] = ()
    training: Training = Training()

    @property
    def label(self) -> str:
        """The decoding method in words."""
        for prefix, words in _LABEL_PREFIXES.items():
            if self.id.startswith(prefix):
                return words + self.id.removeprefix(prefix)
        return _LABELS.get(self.id, self.id)

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON."""
        return _as_json(asdict(self))


@dataclass(frozen=True, slots=True)
class Report:
    """A whole speed report. The fields from `chosen` to `transfer` are its conclusions; `sentence` summarises it."""

    schema: str = SCHEMA
    chosen: str = "none"
    recommendation: str | None = None
    verdict: Verdict | None = None
    refusal: str | None = None
    transfer: str | None = None
    sentence: str | None = None
    warnings: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    model: Model = Model()
    environment: Environment = Environment()
    suite: Suite = Suite()
    cost_curve: Curve = Curve()
    aa: Steadiness = Steadiness()
    plain: Baseline = Baseline()
    candidates: tuple[Row, ...] = ()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report in JSON of this or another release."""
        return _decoder().validate_python(_without_nulls(data))

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return _as_json(asdict(self))

    @property
    def heads(self) -> Row | None:
        """The timed heads, those trained for the model first; None without heads or for a refused report.

        Heads that the report advises against are included: a ratio below 1 is a result.
        """
        if self.refusal:
            return None
        origins = ("fresh", "merged", "parent")
        timed = [row for row in self.candidates if row.origin in origins and row.tokens_per_step.measured is not None]
        return min(timed, key=lambda row: row.origin != "fresh", default=None)


@cache
def _decoder() -> TypeAdapter[Report]:
    return TypeAdapter(Report)


def _without_nulls(value: Any) -> Any:
    """Drop keys whose value is null: the field has a default."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list | tuple) else value


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))  # tuples become lists
    return decoded
