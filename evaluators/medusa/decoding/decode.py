"""Decoding: one loop for plain and for Medusa, so that neither can be favoured.

Invariant before a step: the cache holds exactly x[0..L-1]; `root` = x[L] is emitted but not cached; `h` is the state
at L-1. A step drafts from h, verifies all nodes of the tree in one forward pass, accepts one path, compacts the cache
to it and emits the accepted tokens and the next root. Plain decoding is the same step with a tree of the root alone.

Reference: Medusa, arXiv 2401.10774, sections 2.1.2 and 2.3.1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from evaluators.medusa.decoding.acceptance import GREEDY, Rule
from evaluators.medusa.decoding.runners import Runner, Step
from evaluators.medusa.decoding.stops import StopStrings
from evaluators.medusa.drafting.drafters import Drafter
from evaluators.medusa.model.causal_lm import Base, not_finite
from evaluators.medusa.trees.tree import ROOT_ONLY, Tree

Finish = Literal["stop", "length", "context"]


@dataclass(frozen=True, slots=True)
class Limits:
    """When to stop: after `max_new_tokens`, after the first of `stop_ids`, or after the token that completes one of
    the stop strings. What ends the text is emitted."""

    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    stop_strings: StopStrings | None = None

    def cut(self, seen: Sequence[int], block: Sequence[int], emitted: int) -> tuple[list[int], Finish | None]:
        """`block` as far as it is emitted after `seen` (prompt and answer), and why the text ends there, if it does.

        `emitted` counts the tokens of the answer so far.
        """
        kept: list[int] = []
        for token in block:
            kept.append(token)
            if token in self.stop_ids or (self.stop_strings and self.stop_strings.completed_by([*seen, *kept])):
                return kept, "stop"
            if emitted + len(kept) >= self.max_new_tokens:
                return kept, "length"
        return kept, None


@dataclass(slots=True)
class Clock:
    """Seconds on the wall and of this process's CPUs."""

    wall_s: float = 0.0
    cpu_s: float = 0.0


@dataclass(slots=True)
class Trace:
    """What one generation did. `emitted[i]` tokens came out of step i; the prefill emits one token more.

    Where the runner takes a step in one piece, all of it counts as `forward_s`.
    """

    tokens: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    paths: list[tuple[int, ...]] = field(default_factory=list)
    finish: Finish = "length"
    prefill: Clock = field(default_factory=Clock)
    decode: Clock = field(default_factory=Clock)
    draft_s: float = 0.0
    forward_s: float = 0.0
    accept_s: float = 0.0
    hidden: list[Tensor] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Forward passes after the prefill."""
        return len(self.emitted)

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens after the prefill's one, per forward pass; None if the prefill already ended it."""
        return (len(self.tokens) - 1) / self.steps if self.steps else None


def plain(
    runner: Runner, ids: Sequence[int], limits: Limits, rule: Rule = GREEDY, *, keep_hidden: bool = False
) -> Trace:
    """One token per step. With `keep_hidden` the state that predicted each emitted token is kept, [H] each."""
    return _run(runner, None, ROOT_ONLY, ids, limits, rule, keep_hidden)


def medusa(
    runner: Runner, drafter: Drafter, tree: Tree, ids: Sequence[int], limits: Limits, rule: Rule = GREEDY
) -> Trace:
    """Draft, verify, accept. Greedy acceptance gives the tokens of `plain`, one for one, in float32."""
    return _run(runner, drafter, tree, ids, limits, rule, False)


def _run(
    runner: Runner,
    drafter: Drafter | None,
    tree: Tree,
    ids: Sequence[int],
    limits: Limits,
    rule: Rule,
    keep_hidden: bool,
) -> Trace:
    trace = Trace()
    for _ in stream(runner, drafter, tree, ids, limits, rule, trace=trace, keep_hidden=keep_hidden):
        pass
    return trace


@torch.inference_mode()
def stream(
    runner: Runner,
    drafter: Drafter | None,
    tree: Tree,
    ids: Sequence[int],
    limits: Limits,
    rule: Rule = GREEDY,
    *,
    trace: Trace,
    keep_hidden: bool = False,
) -> Iterator[list[int]]:
    """Yield the tokens of the prefill, then of each step, as they are decided; `trace` is filled on the way."""
    fused = _prepared(runner, drafter, tree, ids, limits, rule)
    with clocked(trace.prefill, runner.base.device):
        h, logits = runner.prefill(ids)
        require_finite(logits, 0)
        root = rule.pick(logits, len(ids))
    _, finish = limits.cut(ids, [root], 0)
    seen = [*ids, root]
    trace.tokens.append(root)
    if keep_hidden:
        trace.hidden.append(h.clone())
    yield [root]
    trees = Cuts(tree)
    while finish is None and not past_context(runner.base, runner.length):
        with clocked(trace.decode, runner.base.device):
            room = runner.base.depth_room(runner.length)
            if fused is not None:  # the tree stays whole to the last token: a shape more would cost more than it saves
                h, block = _fused_step(fused, trees.at(room), trace)
            else:
                room = min(limits.max_new_tokens - len(trace.tokens) - 1, room)
                h, block = _step(runner, drafter, trees.at(room), h, seen, rule, trace)
            block, finish = limits.cut(seen, block, len(trace.tokens))
        seen += block
        trace.tokens += block
        trace.emitted.append(len(block))
        if keep_hidden:
            trace.hidden.append(h.clone())
        yield block
    trace.finish = finish or "context"


def _prepared(
    runner: Runner, drafter: Drafter | None, tree: Tree, ids: Sequence[int], limits: Limits, rule: Rule
) -> Callable[[Tree], Step] | None:
    """What takes whole steps on the runner's device, if it has that for this drafter and rule."""
    if not ids or limits.max_new_tokens < 1:
        raise ValueError("decoding needs at least one prompt token and one token to generate")
    return runner.prepare(drafter, tree, rule, range(len(ids), len(ids) + limits.max_new_tokens))


def _step(
    runner: Runner,
    drafter: Drafter | None,
    tree: Tree,
    h: Tensor,
    seen: list[int],
    rule: Rule,
    trace: Trace,
) -> tuple[Tensor, list[int]]:
    """One forward pass. Returns the state of the last accepted node [H] and the tokens it brought."""
    started = time.perf_counter()
    tokens, tree = draft(drafter, tree, h, seen, runner.base.device)
    drafted_at = time.perf_counter()
    hidden, logits = runner.forward(tokens, tree)
    require_finite(logits, trace.steps + 1)
    forwarded_at = time.perf_counter()
    names = tokens.tolist() if tree.nodes > 1 else seen[-1:]
    path, following = rule.accept(tree, names, logits, runner.length)
    runner.keep(path)
    trace.paths.append(path)
    trace.draft_s += drafted_at - started
    trace.forward_s += forwarded_at - drafted_at
    trace.accept_s += time.perf_counter() - forwarded_at
    return hidden[path[-1]], [*(names[node] for node in path[1:]), following]


def draft(
    drafter: Drafter | None, tree: Tree, h: Tensor, seen: Sequence[int], device: torch.device
) -> tuple[Tensor, Tree]:
    """The tokens [n] to verify, the root first, and the tree they fill: a smaller one where fewer were guessed."""
    tokens = torch.tensor(seen[-1:], device=device)
    if drafter is None or tree.nodes == 1:
        return tokens, ROOT_ONLY
    drafted = drafter.propose(h, seen[-1], seen, tree)
    return torch.cat([tokens, drafted.to(device)]), tree.first(len(drafted) + 1)


def _fused_step(fused: Callable[[Tree], Step], tree: Tree, trace: Trace) -> tuple[Tensor, list[int]]:
    """As `_step`, by a runner that takes the whole step on its device."""
    started = time.perf_counter()
    step = fused(tree)
    if not step.finite:
        raise not_finite(f"at decoding step {trace.steps + 1}")
    trace.paths.append(step.path)
    trace.forward_s += time.perf_counter() - started
    return step.hidden, step.block


class Cuts:
    """A tree cut to what room is left, each cut made once."""

    def __init__(self, tree: Tree) -> None:
        self._full = tree
        self._cut: dict[int, Tree] = {}

    def at(self, depth: int) -> Tree:
        """The tree without what lies deeper than `depth`."""
        if depth >= self._full.max_depth:
            return self._full
        if depth not in self._cut:
            self._cut[depth] = self._full.shallow(depth)
        return self._cut[depth]


def past_context(base: Base, length: int) -> bool:
    """Whether the token after `length` cached ones has no position any more."""
    last = base.last_position()
    return last is not None and length > last


def require_finite(logits: Tensor, step: int) -> None:
    """Raise EvaluationError SPEED_CHECK_FAILED if NaN or infinity is the largest logit of any row."""
    # max() hands a NaN through, so one number tells for the whole tensor.
    if not bool(torch.isfinite(logits.max())):
        raise not_finite(f"at decoding step {step}")


class clocked:
    """Adds the block's seconds to a clock; on a GPU the queue is drained first and last."""

    def __init__(self, clock: Clock, device: torch.device) -> None:
        self._clock, self._cuda = clock, device.type == "cuda"

    def __enter__(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        self._clock.wall_s += time.perf_counter() - self._wall
        self._clock.cpu_s += time.process_time() - self._cpu
