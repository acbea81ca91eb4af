"""Check of whether a loaded model can verify a tree of guesses, with the reason against it as a sentence.

A silent wrong answer would be worse than any refusal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from evaluators.medusa.decoding.runners import EagerRunner, Runner
from evaluators.medusa.model import support
from evaluators.medusa.model.attention import GROUPED
from evaluators.medusa.model.causal_lm import Base, close
from evaluators.medusa.trees.tree import ROOT_ONLY, Tree, chain

ROUNDED = 0.15
LEAST_ROUNDED = 0.005
MISPLACED = 2.0
# Deeper than the window it is tried with, so that a node falls out of the sight of another.
PROBE = Tree(((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)))
PROBE_WINDOW = 3
PROBE_TOKENS = 16


def reason_against_trees(base: Base) -> str | None:
    """A sentence on why trees may not be verified on this base, by its configuration or by trying one on a few
    tokens. None if they may."""
    kernel = str(getattr(base.model.config, "_attn_implementation", "eager"))
    if kernel not in ("sdpa", GROUPED, "eager"):
        return f"{type(base.model).__name__} runs with the attention kernel {kernel}, which takes no tree mask."
    return support.reason_against_trees(base.model.config) or _tree_disagrees(base)


@torch.no_grad()
def _tree_disagrees(base: Base) -> str | None:
    """Verify a small tree after a few tokens; every node must read as in a plain pass over its own path."""
    name = type(base.model).__name__
    bounds = [bound for bound in (base.max_positions, base.rope[1]) if bound is not None]
    room = min([PROBE_TOKENS, *bounds])
    if room < 2 + PROBE.nodes:
        return f"{name} has only {room} positions."
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, base.vocab, (room - PROBE.nodes,), generator=generator).tolist()
    tokens = torch.randint(0, base.vocab, (PROBE.nodes,), generator=generator).to(base.device)
    try:
        wide = None if base.window is None else _last_logits(base, ids)
        with narrow_window(base):
            if wide is not None and close(_last_logits(base, ids), wide):
                return f"{name} takes no attention window from its config, so what a tree sees past it is not known."
            return disagreement(EagerRunner(base), ids, tokens)
    except Exception as error:  # any failure here is an answer: this model cannot verify a tree
        return f"{name} does not run with a tree mask ({type(error).__name__})."


def disagreement(runner: Runner, ids: Sequence[int], tokens: Tensor) -> str | None:
    """In a sentence, what reads otherwise through this runner than in plain passes: the last of `ids`, or the nodes
    of `PROBE` [n] after them. None if nothing does."""
    base = runner.base
    name = type(base.model).__name__
    runner.prefill(ids[:-1])
    _, logits = runner.forward(torch.tensor(ids[-1:], device=base.device), ROOT_ONLY)
    runner.keep((0,))
    if not _same(base, logits[0].float(), ids):
        return f"{name} gives other logits for a token after cached ones than for the same token in plain text."
    paths = [[*ids, *tokens[list(PROBE.ancestors(node))].tolist()] for node in range(PROBE.nodes)]
    found = runner.forward(tokens, PROBE)[1].float().clone()
    runner.keep(())
    alike = all(_same(base, *pair) for pair in zip(found, paths, strict=True))
    if not alike or (base.dtype != torch.float32 and _misplaced(runner, found, tokens, paths)):
        return f"{name} gives other logits for a token inside a tree than for the same token in plain text."
    return None


def _misplaced(runner: Runner, found: Tensor, tokens: Tensor, paths: Sequence[Sequence[int]]) -> bool:
    """Whether the nodes' logits [n, V] are further from plain passes over their paths than rounding to 16 bit takes
    them: a wrong position can change less than rounding may.

    What rounding does here is seen on the same paths in a tree of the same size that is a chain, where every node
    stands in the column of its position. Measured on a CPU, that is the same to the last bit.
    """
    plain = torch.stack([_last_logits(runner.base, path) for path in paths])
    in_line = torch.empty_like(plain)
    for node in range(PROBE.nodes):
        path = tokens[list(PROBE.ancestors(node))]
        row = torch.cat([path, tokens[: PROBE.nodes - len(path)]])
        in_line[node] = runner.forward(row, chain(PROBE.nodes - 1))[1][len(path) - 1]
        runner.keep(())
    rounding = max(_distance(in_line, plain), LEAST_ROUNDED * float(plain.std()))
    return _distance(found, plain) > MISPLACED * rounding


def _same(base: Base, found: Tensor, ids: Sequence[int]) -> bool:
    """Whether logits [V] are, but for rounding, those of a plain pass after `ids`.

    In 16 bit rounding moves them on text as odd as the probe's: measured, by root mean squares, 0.02 to 0.17 of their
    spread, most where the text is most sensitive. So there they may be off by half of what another token before them
    would change.
    """
    plain = _last_logits(base, ids)
    if base.dtype == torch.float32:
        return close(found, plain, 2e-3)
    other = _last_logits(base, [*ids[:-2], (ids[-2] + 1) % base.vocab, ids[-1]])
    return _distance(found, plain) <= max(ROUNDED * float(plain.std()), 0.5 * _distance(other, plain))


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).square().mean().sqrt())


def _last_logits(base: Base, ids: Sequence[int]) -> Tensor:
    """Logits [V] of the last token in a plain pass without a cache."""
    _, logits = base.run(torch.tensor([list(ids)], device=base.device), last_only=True, use_cache=False)
    return logits[0, -1].float()


@contextlib.contextmanager
def narrow_window(base: Base) -> Iterator[None]:
    """While it lasts the attention window, if there is one, is so narrow that a few tokens pass it."""
    whole = base.window
    if whole is None:
        yield
        return
    narrow = min(PROBE_WINDOW, whole.size)
    try:
        base.window, base.config.sliding_window = replace(whole, size=narrow), narrow
        yield
    finally:
        base.window, base.config.sliding_window = whole, whole.size
