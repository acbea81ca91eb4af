"""The speed report `mergebot.decode_speed/1` as a value: every key is always there, None means not measured.

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
    """The checkpoint, and the type it was run in."""

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
    """The questions as they were asked; `looping` answers repeat themselves, of `shortened` ones the context holds only
    the end."""

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
    """A forward pass of `n` tokens; `ratio` is to one token."""

    n: int
    forward_ms: float
    ratio: float


@dataclass(frozen=True, slots=True)
class Curve:
    """What a forward pass costs by the number of tokens."""

    context_tokens: int | None = None
    clock: ClockName | None = None
    points: tuple[Point, ...] = ()


@dataclass(frozen=True, slots=True)
class Steadiness:
    """Equal work against equal work: the first plain run of each question over the second."""

    ratio: float | None = None
    ci95: Interval | None = None
    ok: bool | None = None


@dataclass(frozen=True, slots=True)
class Plain:
    """Plain decoding, all its runs together."""

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
    """What a set of heads is; `vocab_coverage` is the share of the timed text's tokens that it may propose."""

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
    """How often one head is right at its first guess, and among its first five."""

    head: int
    top1: float | None
    top5: float | None
    positions: int


@dataclass(frozen=True, slots=True)
class TreeFacts:
    """The tree that was tried, and how it was come by."""

    nodes: int | None = None
    depth: int | None = None
    paths: tuple[tuple[int, ...], ...] | None = None
    chosen: Literal["none", "cost", "common", "given"] = "none"


@dataclass(frozen=True, slots=True)
class StepMs:
    """Milliseconds of a step by its parts."""

    draft: float | None = None
    forward: float | None = None
    accept: float | None = None


@dataclass(frozen=True, slots=True)
class TokensPerStep:
    """Expected by the calibration text, simulated on the timed one, measured; `common_tree` is simulated with one tree
    for all sets, `without_loops` measured on answers that do not repeat themselves."""

    expected: float | None = None
    simulated: float | None = None
    measured: float | None = None
    ci95: Interval | None = None
    common_tree: float | None = None
    without_loops: float | None = None


@dataclass(frozen=True, slots=True)
class Macro:
    """Means in which every category counts once."""

    tokens_per_step: float | None = None
    speedup: float | None = None


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """With reading the prompt."""

    tokens_per_s: float | None = None
    speedup: float | None = None


@dataclass(frozen=True, slots=True)
class Speedup:
    """Over plain decoding, by each clock; `clock_used` is the one that counts, None where nothing was timed."""

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
        """The ratio by the clock that counts."""
        return {"wall": self.wall, "cpu": self.cpu, None: None}[self.clock_used]


@dataclass(frozen=True, slots=True)
class Parting:
    """Where a run left the plain text; `tie` says whether rounding explains it, None where that was not judged."""

    prompt: str
    index: int
    gap: float | None
    limit: float | None
    tie: bool | None


@dataclass(frozen=True, slots=True)
class Exact:
    """How many answers are those of plain decoding."""

    prompts: int | None = None
    equal: int | None = None
    divergences: tuple[Parting, ...] = ()


@dataclass(frozen=True, slots=True)
class Category:
    """The figures of one category of questions."""

    name: str
    prompts: int
    tokens_per_step: float | None
    speedup: float | None


@dataclass(frozen=True, slots=True)
class Made:
    """What it cost to make a set of heads, and after how many tokens that is won back."""

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
    """A way of decoding; where it was not tried, `absent_because` says why."""

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
    macro: Macro = Macro()
    end_to_end: EndToEnd = EndToEnd()
    speedup: Speedup = Speedup()
    exact: Exact = Exact()
    categories: tuple[Category, ...] = ()
    training: Made = Made()


@dataclass(frozen=True, slots=True)
class Report:
    """A whole speed check. From `chosen` to `transfer` it is what conclusions.drawn makes of the rest."""

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
    """What stands in the file."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(value), allow_nan=False))
    return found
