"""Decoding: one loop for the baseline and for Medusa, so that neither has an advantage.

Invariant before a step: the cache holds exactly the tokens x[0..L-1]; the root x[L] is emitted but not cached; `h` is
the hidden state at position L-1. A step drafts from h, verifies all nodes of the tree in one forward pass, accepts one
path, reduces the cache to it and emits the accepted tokens and the next root. Baseline decoding is the same step with a
tree of the root alone.

Shapes: n nodes of a tree, H hidden size, V vocabulary.

Reference: Medusa, arXiv 2401.10774, sections 2.1.2 and 2.3.1.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from evaluators.medusa.decoding.acceptance import GREEDY, Rule
from evaluators.medusa.decoding.runners import Runner, Step
from evaluators.medusa.drafting.drafters import Drafter
from evaluators.medusa.model.causal_lm import Base, not_finite
from evaluators.medusa.trees.tree import ROOT_ONLY, Tree

Finish = Literal["stop", "length", "context"]

# The decoded tail may begin inside a character (at most four bytes) or with a token that loses its leading space there.
STOP_MARGIN = 4


class StopStrings:
    """Strings that end a generation, by the rule of transformers' `stop_strings`.

    The token that completes a string is the last one, whatever text follows in that token. A string may begin in the
    prompt. Raises ValueError for an empty string.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        if isinstance(strings, str) or not all(strings):
            raise ValueError("stop strings must be a list of non-empty strings")
        self.strings = tuple(strings)
        self._tokenizer = tokenizer
        # Each token adds at least one byte, so this many tokens hold the longest string and the margin.
        self._tail = STOP_MARGIN + max((len(string.encode()) for string in strings), default=0)

    def completed_by(self, seen: Sequence[int]) -> bool:
        """Return True if a string ends in the text of the last token of `seen` (prompt and answer).

        The tail is decoded as a whole, because the bytes of a character may be spread over several tokens.
        """
        tail = list(seen[-self._tail - 1 :])
        before, after = self._decode(tail[:-1]), self._decode(tail)
        # An unfinished character at the end of `before` differs in `after`: the new text begins there.
        new = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
        return any(after.find(string, max(0, new - len(string) + 1)) >= 0 for string in self.strings)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


@dataclass(frozen=True, slots=True)
class Limits:
    """End of a generation: `max_new_tokens`, the first of `stop_ids`, or the token that completes a stop string.

    The token that ends the text is emitted.
    """

    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    stop_strings: StopStrings | None = None

    def cut(self, seen: Sequence[int], block: Sequence[int], emitted: int) -> tuple[list[int], Finish | None]:
        """Cut `block`, which follows `seen` (prompt and answer), at the end of the text.

        `emitted` is the number of answer tokens so far. Returns the tokens to emit, and the reason if the text ends.
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
    """Wall-clock seconds and CPU seconds of this process."""

    wall_s: float = 0.0
    cpu_s: float = 0.0


@dataclass(slots=True)
class Trace:
    """Record of one generation. Step i emitted `emitted[i]` tokens; the prefill emitted one more.

    If the runner fuses a step, all of its time counts as `forward_s`.
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
        """Tokens per forward pass, both without the prefill; None if the prefill ended the text."""
        return (len(self.tokens) - 1) / self.steps if self.steps else None


def baseline(
    runner: Runner, ids: Sequence[int], limits: Limits, rule: Rule = GREEDY, *, keep_hidden: bool = False
) -> Trace:
    """Baseline decoding: one token per step. `keep_hidden` keeps the state [H] that predicted each emitted token."""
    trace = Trace()
    deque(stream(runner, None, ROOT_ONLY, ids, limits, rule, trace=trace, keep_hidden=keep_hidden), maxlen=0)
    return trace


def medusa(
    runner: Runner, drafter: Drafter, tree: Tree, ids: Sequence[int], limits: Limits, rule: Rule = GREEDY
) -> Trace:
    """Medusa decoding. Greedy acceptance in float32 gives exactly the tokens of `baseline`."""
    trace = Trace()
    deque(stream(runner, drafter, tree, ids, limits, rule, trace=trace), maxlen=0)
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
    """Yield the token of the prefill, then the tokens of each step, and fill `trace`."""
    if not ids or limits.max_new_tokens < 1:
        raise ValueError("decoding needs at least one prompt token and one token to generate")
    base, cuts = runner.base, Cuts(tree)
    fused_step = runner.prepare(drafter, tree, rule, range(len(ids), len(ids) + limits.max_new_tokens))
    with clocked(trace.prefill, base.device):
        h, logits = runner.prefill(ids)  # [H], [V]
        require_finite(logits, 0)
        root = rule.pick(logits, len(ids))
    seen, (block, finish) = list(ids), limits.cut(ids, [root], 0)
    while True:
        seen += block
        trace.tokens += block
        trace.hidden += [h.clone()] if keep_hidden else []
        yield block
        if finish is not None or past_context(base, runner.length):
            break
        with clocked(trace.decode, base.device):
            room = base.depth_room(runner.length)
            if fused_step is None:  # a fused step keeps the whole tree: one more shape costs more than it saves
                room = min(room, limits.max_new_tokens - len(trace.tokens) - 1)
                step = _step(runner, drafter, cuts.at(room), h, seen, rule, trace)
            else:
                step = _timed(fused_step, cuts.at(room), trace)
            h = step.hidden
            block, finish = limits.cut(seen, step.block, len(trace.tokens))
        trace.paths.append(step.path)
        trace.emitted.append(len(block))
    trace.finish = finish or "context"


def _step(
    runner: Runner, drafter: Drafter | None, tree: Tree, h: Tensor, seen: list[int], rule: Rule, trace: Trace
) -> Step:
    """Draft from h [H] after the tokens `seen`, verify, accept and reduce the cache."""
    started = time.perf_counter()
    tokens, tree = draft(drafter, tree, h, seen, runner.base.device)  # [n], the root first
    drafted = time.perf_counter()
    hidden, logits = runner.forward(tokens, tree)  # [n, H], [n, V]
    require_finite(logits, trace.steps + 1)
    verified = time.perf_counter()
    token_of = tokens.tolist() if tree.nodes > 1 else seen[-1:]
    path, next_root = rule.accept(tree, token_of, logits, runner.length)
    runner.keep(path)
    trace.draft_s += drafted - started
    trace.forward_s += verified - drafted
    trace.accept_s += time.perf_counter() - verified
    return Step(path, [*(token_of[node] for node in path[1:]), next_root], hidden[path[-1]], True)


def _timed(fused_step: Callable[[Tree], Step], tree: Tree, trace: Trace) -> Step:
    """Run a step that the runner fuses. Raises EvaluationError for logits that are not finite."""
    started = time.perf_counter()
    step = fused_step(tree)
    if not step.finite:
        raise not_finite(f"at decoding step {trace.steps + 1}")
    trace.forward_s += time.perf_counter() - started
    return step


def draft(
    drafter: Drafter | None, tree: Tree, h: Tensor, seen: Sequence[int], device: torch.device
) -> tuple[Tensor, Tree]:
    """Tokens [n] to verify, the root first, and their tree, which is smaller if the drafter proposed fewer tokens."""
    root = torch.tensor(seen[-1:], device=device)
    if drafter is None or tree.nodes == 1:
        return root, ROOT_ONLY
    proposed = drafter.propose(h, seen[-1], seen, tree)
    return torch.cat([root, proposed.to(device)]), tree.first(len(proposed) + 1)


class Cuts:
    """A tree cut to the room that is left; each cut is built once."""

    def __init__(self, tree: Tree) -> None:
        self._full = tree
        self._cut: dict[int, Tree] = {}

    def at(self, depth: int) -> Tree:
        """The tree without the nodes that are deeper than `depth`."""
        if depth >= self._full.max_depth:
            return self._full
        if depth not in self._cut:
            self._cut[depth] = self._full.shallow(depth)
        return self._cut[depth]


def past_context(base: Base, length: int) -> bool:
    """Return True if the token after `length` cached tokens exceeds the positions of the model."""
    last = base.last_position()
    return last is not None and length > last


def require_finite(logits: Tensor, step: int) -> None:
    """Raise EvaluationError SPEED_CHECK_FAILED if the largest logit of any row is NaN or infinite."""
    # max() propagates NaN, so one number covers the whole tensor.
    if not bool(torch.isfinite(logits.max())):
        raise not_finite(f"at decoding step {step}")


class clocked:
    """Context manager that adds the seconds of its block to a clock and synchronizes a GPU before and after."""

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
