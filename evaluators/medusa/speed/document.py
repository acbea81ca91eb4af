"""Speed report `mergebot.decode_speed/1` as a value: every key is always present, None means not measured.

Speeds are tokens per second; intervals are pairs; `asdict` of a Report is the file, key for key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SCHEMA = "mergebot.decode_speed/1"
Interval = tuple[float, float]
ClockName = Literal["wall", "cpu"]
Verdict = Literal["faster", "slower", "same", "inconclusive"]


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
    """The questions as asked; `looping` counts repetitive answers, `shortened` prompts cut to the context."""

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
class Plain:
    """The baseline, all its runs together."""

    tokens: int | None = None
    steps: int | None = None
    wall_s: float | None = None
    cpu_s: float | None = None
    tokens_per_s: float | None = None
    step_ms: float | None = None
    prefill_ms: float | None = None
    end_to_end_tokens_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class HeadFacts:
    """Shape of a set of heads; `vocab_coverage` is the share of the timed text's tokens that it can propose."""

    kind: str | None = None
    count: int | None = None
    layers: int | None = None
    conditioned: bool | None = None
    kept_vocab: int | None = None
    vocab_coverage: float | None = None
    parameters: int | None = None
    bytes: int | None = None


@dataclass(frozen=True, slots=True)
class HeadAccuracy:
    """Top-1 and top-5 accuracy of one head."""

    head: int
    top1: float | None
    top5: float | None
    positions: int


@dataclass(frozen=True, slots=True)
class TreeFacts:
    """The timed tree and its origin."""

    nodes: int | None = None
    depth: int | None = None
    paths: tuple[tuple[int, ...], ...] | None = None
    chosen: Literal["none", "cost", "common", "given"] = "none"


@dataclass(frozen=True, slots=True)
class StepMs:
    """Milliseconds per step by its parts."""

    draft: float | None = None
    forward: float | None = None
    accept: float | None = None


@dataclass(frozen=True, slots=True)
class TokensPerStep:
    """Expected from the calibration text, simulated on the timed text, measured; `common_tree` is simulated with one
    tree for all sets, `without_loops` measured on answers that do not repeat themselves."""

    expected: float | None = None
    simulated: float | None = None
    measured: float | None = None
    ci95: Interval | None = None
    common_tree: float | None = None
    without_loops: float | None = None


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """Figures that include the prefill."""

    tokens_per_s: float | None = None
    speedup: float | None = None


@dataclass(frozen=True, slots=True)
class Speedup:
    """Speedup over the baseline by each clock; `clock_used` is the decisive one, None if nothing was timed."""

    wall: float | None = None
    wall_ci95: Interval | None = None
    cpu: float | None = None
    cpu_ci95: Interval | None = None
    clock_used: ClockName | None = None
    predicted_here: float | None = None
    predicted_at_1_2: float | None = None
    verdict: Verdict | None = None

    @property
    def counting(self) -> float | None:
        """The ratio by the decisive clock."""
        return {"wall": self.wall, "cpu": self.cpu, None: None}[self.clock_used]


@dataclass(frozen=True, slots=True)
class Parting:
    """First difference from the baseline; `tie`: True if rounding explains it, None if that was not checked."""

    prompt: str
    index: int
    gap: float | None
    limit: float | None
    tie: bool | None


@dataclass(frozen=True, slots=True)
class Exact:
    """Number of answers equal to the baseline's."""

    prompts: int | None = None
    equal: int | None = None
    divergences: tuple[Parting, ...] = ()


@dataclass(frozen=True, slots=True)
class Category:
    """Figures of one category of questions."""

    name: str
    prompts: int
    tokens_per_step: float | None
    speedup: float | None


@dataclass(frozen=True, slots=True)
class Made:
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
    identity_error: float | None = None
    tokens_per_s: float | None = None
    heads: HeadFacts = HeadFacts()
    hidden_cosine: float | None = None
    retention: tuple[float | None, ...] | None = None
    accuracy: tuple[HeadAccuracy, ...] = ()
    tree: TreeFacts = TreeFacts()
    step_ms: StepMs = StepMs()
    tokens_per_step: TokensPerStep = TokensPerStep()
    end_to_end: EndToEnd = EndToEnd()
    speedup: Speedup = Speedup()
    exact: Exact = Exact()
    categories: tuple[Category, ...] = ()
    training: Made = Made()


@dataclass(frozen=True, slots=True)
class Report:
    """A whole speed report. The keys from `chosen` to `transfer` come from conclusions.drawn."""

    schema: str = SCHEMA
    mode: Literal["quick", "full"] = "quick"
    chosen: str = "none"
    recommendation: str | None = None
    verdict: Verdict | None = None
    refusal: str | None = None
    transfer: str | None = None
    warnings: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    model: Model = Model()
    environment: Environment = Environment()
    suite: Suite = Suite()
    cost_curve: Curve = Curve()
    aa: Steadiness = Steadiness()
    plain: Plain = Plain()
    candidates: tuple[Row, ...] = ()


def as_json(value: Report | Row) -> dict[str, Any]:
    """Return the content of the report file."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(value), allow_nan=False))
    return found
