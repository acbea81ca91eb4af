"""Check of a loaded model: a model that cannot verify a tree correctly is refused with a sentence as reason."""

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
# Deeper than PROBE_WINDOW, so that a node is outside the window of another.
PROBE = Tree(((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)))
PROBE_WINDOW = 3
PROBE_TOKENS = 16


def reason_against_trees(base: Base) -> str | None:
    """A sentence on why this base cannot verify trees, by its configuration or by a trial. None if it can."""
    kernel = str(getattr(base.model.config, "_attn_implementation", "eager"))
    if kernel not in ("sdpa", GROUPED, "eager"):
        return f"{type(base.model).__name__} runs with the attention kernel {kernel}, which takes no tree mask."
    return support.reason_against_trees(base.model.config) or _tree_disagrees(base)


@torch.no_grad()
def _tree_disagrees(base: Base) -> str | None:
    """Verify a small tree after a few tokens; each node must give the logits of a pass over its path."""
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
                return f"{name} takes no attention window from its config, so the window of a tree is unknown."
            return disagreement(EagerRunner(base), ids, tokens)
    except Exception as error:  # any failure means that the model is not supported
        return f"{name} does not run with a tree mask ({type(error).__name__})."


def disagreement(runner: Runner, ids: Sequence[int], tokens: Tensor) -> str | None:
    """A sentence on logits of this runner that differ from passes without a cache; None without a difference.

    The last of `ids` is compared, then the nodes of `PROBE` with `tokens` [n] after them.
    """
    base = runner.base
    name = type(base.model).__name__
    runner.prefill(ids[:-1])
    _, logits = runner.forward(torch.tensor(ids[-1:], device=base.device), ROOT_ONLY)
    runner.keep((0,))
    if not _same(base, logits[0].float(), ids):
        return f"{name} gives other logits for a token after cached ones than for the same token without a cache."
    paths = [[*ids, *tokens[list(PROBE.ancestors(node))].tolist()] for node in range(PROBE.nodes)]
    found = runner.forward(tokens, PROBE)[1].float().clone()
    runner.keep(())
    equal = all(_same(base, *pair) for pair in zip(found, paths, strict=True))
    if not equal or (base.dtype != torch.float32 and _misplaced(runner, found, tokens, paths)):
        return f"{name} gives other logits for a token inside a tree than for the same token without a tree."
    return None


def _misplaced(runner: Runner, found: Tensor, tokens: Tensor, paths: Sequence[Sequence[int]]) -> bool:
    """Return True if logits [n, V] of the nodes differ from passes over their paths by more than rounding to 16 bit.

    The effect of rounding is measured on the same paths in a chain of the same size, where the column of each node is
    its position; on a CPU it is equal to the last bit. A fixed tolerance does not suffice: a wrong position can change
    the logits less than rounding does.
    """
    reference = torch.stack([_last_logits(runner.base, path) for path in paths])
    in_chain = torch.empty_like(reference)
    for node in range(PROBE.nodes):
        path = tokens[list(PROBE.ancestors(node))]
        row = torch.cat([path, tokens[: PROBE.nodes - len(path)]])
        in_chain[node] = runner.forward(row, chain(PROBE.nodes - 1))[1][len(path) - 1]
        runner.keep(())
    rounding = max(_distance(in_chain, reference), LEAST_ROUNDED * float(reference.std()))
    return _distance(found, reference) > MISPLACED * rounding


def _same(base: Base, found: Tensor, ids: Sequence[int]) -> bool:
    """Return True if logits [V] equal those of a pass over `ids` up to rounding.

    In 16 bit, rounding changes logits after random tokens by 0.02 to 0.17 of their standard deviation (measured, root
    mean square), most where they are most sensitive to the text. So the tolerance there is half of the change that
    another previous token causes.
    """
    reference = _last_logits(base, ids)
    if base.dtype == torch.float32:
        return close(found, reference, 2e-3)
    other = _last_logits(base, [*ids[:-2], (ids[-2] + 1) % base.vocab, ids[-1]])
    return _distance(found, reference) <= max(ROUNDED * float(reference.std()), 0.5 * _distance(other, reference))


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).square().mean().sqrt())


def _last_logits(base: Base, ids: Sequence[int]) -> Tensor:
    """Logits [V] of the last token in a pass without a cache."""
    _, logits = base.run(torch.tensor([list(ids)], device=base.device), last_only=True, use_cache=False)
    return logits[0, -1].float()


@contextlib.contextmanager
def narrow_window(base: Base) -> Iterator[None]:
    """Narrow the attention window, if there is one, inside the block, so that a few tokens exceed it."""
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
