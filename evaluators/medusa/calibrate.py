"""Which tree, if any: head accuracies, exact simulation, the cost of a forward pass here, and the choice.

speedup = tokens per step / overhead. The numerator comes from held-out answers without running the base again, the
denominator from timing this base on this machine; "do not speculate" is one of the candidates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from evaluators.medusa.data import Features
from evaluators.medusa.decode import Clock, timed
from evaluators.medusa.drafters import HeadDrafter
from evaluators.medusa.heads import Heads
from evaluators.medusa.runners import Runner
from evaluators.medusa.tree import ROOT_ONLY, Tree, chain, full, greedy_tree

RANKS = 10
LEAST_GAIN = 1.02
WIDTHS = (1, 4, 8, 2, 16, 6, 12, 32, 64)  # in the order they are timed: the telling ones first
ROWS = 512
ClockName = Literal["wall", "cpu"]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """`shares[k][j]`: share of positions where rank j of head k + 1 is right. A token outside the draft vocabulary
    is a miss. `positions[k]` is the sample size."""

    shares: tuple[tuple[float, ...], ...]
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CostCurve:
    """Milliseconds of one forward pass by tree width, after `context` cached tokens; `draft_ms` is the heads'.

    `plain_wall_s` is the plain step on the wall, whichever clock the points are from.
    """

    context: int
    clock: ClockName
    points: tuple[tuple[int, float], ...]
    draft_ms: float
    plain_wall_s: float

    def overhead(self, nodes: int) -> float:
        """(forward + draft) / plain step, between the measured widths by straight lines."""
        if nodes <= 1:
            return 1.0
        return (self._forward_ms(nodes) + self.draft_ms) / self.points[0][1]

    def _forward_ms(self, nodes: int) -> float:
        for (left, left_ms), (right, right_ms) in zip(self.points, self.points[1:], strict=False):
            if nodes <= right:
                return left_ms + (right_ms - left_ms) * (nodes - left) / (right - left)
        return self.points[-1][1] * nodes / self.points[-1][0]


@dataclass(frozen=True, slots=True)
class Choice:
    """The best speculating tree, or the one that was given, what it is expected to bring, and whether to speculate."""

    tree: Tree
    expected: float
    overhead: float
    gain: float
    speculate: bool
    chosen: Literal["cost", "given"] = "cost"


@torch.no_grad()
def _right_ranks(heads: Heads, features: Features, k: int) -> tuple[Tensor, Tensor]:
    """(right [K, T, k] bool, valid [K, T] bool): which ranks name the token that really came."""
    labels = features.labels(heads.spec.heads)
    ranks = [
        heads.ranks(features.hidden[at : at + ROWS], features.tokens[at : at + ROWS], k)
        for at in range(0, len(features.tokens), ROWS)
    ]
    right = torch.cat(ranks, dim=1) == labels[..., None]
    return right, labels >= 0


def accuracy(heads: Heads, features: Features, ranks: int = RANKS) -> Accuracy:
    """Marginal accuracy of each rank of each head on `features`."""
    if not len(features.tokens):
        empty = tuple((0.0,) * ranks for _ in range(heads.spec.heads))
        return Accuracy(empty, (0,) * heads.spec.heads)
    right, valid = _right_ranks(heads, features, ranks)
    counts = valid.sum(-1)
    shares = (right & valid[..., None]).sum(1).float() / counts.clamp_min(1)[:, None]
    return Accuracy(tuple(tuple(row) for row in shares.tolist()), tuple(counts.tolist()))


def simulate(heads: Heads, features: Features, tree: Tree) -> float:
    """Tokens per step of greedy decoding with these heads and this tree on these answers, without the base."""
    return simulate_each(heads, features, [tree])[0]


def simulate_each(heads: Heads, features: Features, trees: Sequence[Tree]) -> list[float]:
    """`simulate` for several trees from one pass of the heads.

    At row i the root is y_i; node (a1..ad) is right iff rank a_j of head j at i names y_{i+j} for all j <= d; the
    step brings 1 + the deepest right depth tokens.
    """
    topk = max(tree.topk for tree in trees)
    if not topk or not len(features.tokens):
        return [1.0 for _ in trees]
    right, _ = _right_ranks(heads, features, topk)
    return [_walk(_advance(right, tree), features.lengths) for tree in trees]


def _advance(right: Tensor, tree: Tree) -> list[int]:
    """[K, T, k] -> 1 + the deepest right depth at every row."""
    rows = right.shape[1]
    good: dict[tuple[int, ...], Tensor] = {(): torch.ones(rows, dtype=torch.bool, device=right.device)}
    depth = torch.zeros(rows, dtype=torch.long, device=right.device)
    for path in tree.paths:
        good[path] = good[path[:-1]] & right[len(path) - 1, :, path[-1]]
        depth = torch.maximum(depth, good[path].long() * len(path))
    advance: list[int] = (depth + 1).tolist()
    return advance


def _walk(advance: Sequence[int], lengths: Sequence[int]) -> float:
    tokens = steps = start = 0
    for length in lengths:
        at = 0
        while at < length - 1:
            at += advance[start + at]
            steps += 1
        tokens += max(length - 1, 0)
        start += length
    return tokens / steps if steps else 1.0


@torch.inference_mode()
def cost_curve(
    runner: Runner,
    heads: Heads | None,
    context: int,
    *,
    widths: Sequence[int] = WIDTHS,
    repeats: int = 3,
    deadline: float | None = None,
) -> CostCurve:
    """Time one forward pass per width after `context` tokens, and one draft; the smallest of `repeats` each.

    The wall clock counts unless this process got less than 85 % of its threads' time, which means the machine is
    shared: then its CPU clock does. Past `deadline` (time.monotonic) only the widths timed so far are given, at
    least two.
    """
    base = runner.base
    context = max(1, min(context, base.depth_room(0) - 4))
    h, _ = runner.prefill([index % base.vocab for index in range(context)])
    timings: list[tuple[int, Clock]] = []
    for width in (1, *(width for width in widths if width != 1)):
        if deadline is not None and len(timings) >= 2 and time.monotonic() > deadline:
            break
        tree = ROOT_ONLY if width == 1 else _of_width(width)
        tokens = torch.zeros(tree.nodes, dtype=torch.long, device=base.device)
        timings.append((width, _least(partial(_undone, runner, tokens, tree), repeats, base.device)))
    draft = Clock() if heads is None else _draft(heads, h, repeats)
    wall, cpu = (sum(getattr(clock, name) for _, clock in timings) for name in ("wall_s", "cpu_s"))
    shared = base.device.type == "cpu" and cpu < 0.85 * wall * torch.get_num_threads()
    clock: ClockName = "cpu" if shared else "wall"
    plain_wall_s = timings[0][1].wall_s
    points = sorted((width, 1000 * (spent.cpu_s if shared else spent.wall_s)) for width, spent in timings)
    draft_ms = 1000 * (draft.cpu_s if shared else draft.wall_s)
    return CostCurve(context, clock, tuple(points), draft_ms, plain_wall_s)


@torch.inference_mode()
def with_draft_of(cost: CostCurve, heads: Heads, repeats: int = 3) -> CostCurve:
    """The same curve for other heads on the same model: only drafting costs something else."""
    spent = _draft(heads, torch.zeros(heads.base.hidden, device=heads.base.device, dtype=heads.base.dtype), repeats)
    return replace(cost, draft_ms=1000 * (spent.cpu_s if cost.clock == "cpu" else spent.wall_s))


def _draft(heads: Heads, h: Tensor, repeats: int) -> Clock:
    drafter, tree = HeadDrafter(heads), chain(heads.spec.heads)
    return _least(partial(drafter.propose, h, 0, (), tree), repeats, heads.base.device)


def _of_width(nodes: int) -> Tree:
    """A tree of exactly `nodes` nodes; its shape hardly matters for the cost, its width does."""
    return full((nodes - 1,)) if nodes <= 4 else full((3, nodes)).first(nodes)


def _undone(runner: Runner, tokens: Tensor, tree: Tree) -> None:
    """One forward pass, then the cache as before: keep only the root, and forget that as well."""
    runner.forward(tokens, tree)
    runner.keep((0,))
    runner.rewind(1)


def _least(call: Callable[[], object], repeats: int, device: torch.device) -> Clock:
    """The smallest seconds of several calls, on each clock; one more call warms up."""
    call()
    spent = []
    for _ in range(repeats):
        clock = Clock()
        with timed(clock, device):
            call()
        spent.append(clock)
    return Clock(min(clock.wall_s for clock in spent), min(clock.cpu_s for clock in spent))


def choose_tree(heads: Heads, features: Features, cost: CostCurve, given: Tree | None = None) -> Choice:
    """argmax over widths of simulated tokens per step / overhead; below a gain of 1.02 do not speculate.

    The tree of the best speculating width is returned either way, so that it can be measured honestly; with a `given`
    tree there is nothing to choose.
    """
    shares = accuracy(heads, features).shares
    trees = [greedy_tree(shares, width) for width, _ in cost.points if width > 1] if given is None else [given]
    candidates = list(zip(trees, simulate_each(heads, features, trees), strict=True))
    tree, expected = max(candidates, key=lambda pair: pair[1] / cost.overhead(pair[0].nodes))
    overhead = cost.overhead(tree.nodes)
    gain = expected / overhead
    return Choice(tree, expected, overhead, gain, gain >= LEAST_GAIN, "cost" if given is None else "given")
