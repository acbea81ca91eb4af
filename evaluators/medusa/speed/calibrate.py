"""Choice of the tree: cost of a forward pass on this machine and tokens per step on held-out answers.

speedup = tokens per step / overhead. The numerator comes from held-out answers without running the base again, the
denominator from timing this base on this machine; "do not speculate" is one of the candidates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from evaluators.medusa.decoding.decode import Clock, clocked
from evaluators.medusa.decoding.runners import Runner
from evaluators.medusa.drafting.drafters import HeadDrafter
from evaluators.medusa.drafting.heads import Heads
from evaluators.medusa.speed.report import ClockName
from evaluators.medusa.training.distillation import Features
from evaluators.medusa.training.simulation import accuracy, simulate_each
from evaluators.medusa.trees.tree import ROOT_ONLY, Tree, chain, expected_tokens, full, greedy_tree

LEAST_GAIN = 1.02
REPEATS = 3
WIDTHS = (1, 4, 8, 2, 16, 6, 12, 32, 64)  # in the order of timing, the most useful ones first


@dataclass(frozen=True, slots=True)
class CostCurve:
    """Milliseconds per forward pass by tree width, after `context` cached tokens; `draft_ms` is one draft."""

    context: int
    clock: ClockName
    points: tuple[tuple[int, float], ...]
    draft_ms: float

    def overhead(self, nodes: int) -> float:
        """(forward + draft) / baseline step, interpolated linearly between the measured widths."""
        if nodes <= 1:
            return 1.0
        widths, times = [width for width, _ in self.points], [spent for _, spent in self.points]
        forward_ms = float(np.interp(nodes, widths, times)) * max(1.0, nodes / widths[-1])
        return (forward_ms + self.draft_ms) / self.points[0][1]


@dataclass(frozen=True, slots=True)
class Choice:
    """The best tree, or the given one, with its expected tokens per step and the decision to speculate."""

    tree: Tree
    expected: float
    overhead: float
    gain: float
    speculate: bool
    chosen: Literal["cost", "given"] = "cost"


@torch.inference_mode()
def cost_curve(
    runner: Runner,
    heads: Heads | None,
    context: int,
    *,
    widths: Sequence[int] = WIDTHS,
    repeats: int = REPEATS,
    deadline: float | None = None,
) -> CostCurve:
    """Time one forward pass per width after `context` tokens, and one draft; take the minimum of `repeats` each.

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
    points = sorted((width, 1000 * (spent.cpu_s if shared else spent.wall_s)) for width, spent in timings)
    draft_ms = 1000 * (draft.cpu_s if shared else draft.wall_s)
    return CostCurve(context, clock, tuple(points), draft_ms)


@torch.inference_mode()
def with_draft_of(cost: CostCurve, heads: Heads) -> CostCurve:
    """Return the curve for other heads on the same model: only the drafting time differs."""
    spent = _draft(heads, torch.zeros(heads.base.hidden, device=heads.base.device, dtype=heads.base.dtype), REPEATS)
    return replace(cost, draft_ms=1000 * (spent.cpu_s if cost.clock == "cpu" else spent.wall_s))


def _draft(heads: Heads, h: Tensor, repeats: int) -> Clock:
    drafter, tree = HeadDrafter(heads), chain(heads.spec.heads)
    return _least(partial(drafter.propose, h, 0, (), tree), repeats, heads.base.device)


def _of_width(nodes: int) -> Tree:
    """Build a tree of exactly `nodes` nodes; the cost depends on its width and hardly on its shape."""
    return full((nodes - 1,)) if nodes <= 4 else full((3, nodes)).first(nodes)


def _undone(runner: Runner, tokens: Tensor, tree: Tree) -> None:
    """Run one forward pass, then restore the cache: keep only the root, then remove the root."""
    runner.forward(tokens, tree)
    runner.keep((0,))
    runner.rewind(1)


def _least(call: Callable[[], object], repeats: int, device: torch.device) -> Clock:
    """Minimum seconds of several calls on each clock, after one warm-up call."""
    call()
    spent = []
    for _ in range(repeats):
        clock = Clock()
        with clocked(clock, device):
            call()
        spent.append(clock)
    return Clock(min(clock.wall_s for clock in spent), min(clock.cpu_s for clock in spent))


def choose_tree(heads: Heads, features: Features, cost: CostCurve, given: Tree | None = None) -> Choice:
    """Choose the width with the largest simulated tokens per step / overhead; below a gain of 1.02 do not speculate.

    The best tree is returned in either case, so that it can be timed. A `given` tree is returned as it is.
    """
    shares = accuracy(heads, features).shares
    trees = _grown(shares, cost) if given is None else [given]
    candidates = list(zip(trees, simulate_each(heads, features, trees), strict=True))
    tree, expected = max(candidates, key=lambda pair: pair[1] / cost.overhead(pair[0].nodes))
    overhead = cost.overhead(tree.nodes)
    gain = expected / overhead
    return Choice(tree, expected, overhead, gain, gain >= LEAST_GAIN, "cost" if given is None else "given")


def tree_by_accuracy(shares: Sequence[Sequence[float]], cost: CostCurve) -> Tree:
    """Choose the tree from accuracies by head and rank, without answers to simulate on; the root alone below 1.02."""

    def gain(tree: Tree) -> float:
        # More tokens never cost less than one: a lower time is noise.
        return expected_tokens(shares, tree) / max(1.0, cost.overhead(tree.nodes))

    best = max(_grown(shares, cost), key=gain)
    return best if gain(best) >= LEAST_GAIN else ROOT_ONLY


def _grown(shares: Sequence[Sequence[float]], cost: CostCurve) -> list[Tree]:
    """Grow the best tree of each timed width, without width 1."""
    return [greedy_tree(shares, width) for width, _ in cost.points if width > 1]
