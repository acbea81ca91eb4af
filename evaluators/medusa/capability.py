"""Whether a model's cache and positions can take a tree at all, in a sentence.

A silent wrong answer would be worse than any refusal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import DummyLayer, DynamicLayer

from evaluators.medusa.adapters import Base, close
from evaluators.medusa.runners import EagerRunner
from evaluators.medusa.tree import full

ROUNDED = 0.15
ALIBI_MODELS = frozenset({"bloom", "mpt"})


@dataclass(frozen=True, slots=True)
class Capability:
    """Whether trees may be verified on this base. `reason` is a sentence, None if `tree`."""

    tree: bool
    reason: str | None
    kernel: str


def capability(base: Base) -> Capability:
    """May trees be verified on this base? First by what its config says, then by trying it on a few tokens."""
    kernel = str(getattr(base.model.config, "_attn_implementation", "eager"))
    reason = _reason_against_trees(base, kernel) or _tree_disagrees(base)
    return Capability(reason is None, reason, kernel)


def _reason_against_trees(base: Base, kernel: str) -> str | None:
    name = type(base.model).__name__
    if kernel not in ("sdpa", "eager"):
        return f"{name} runs with the attention kernel {kernel}, which takes no tree mask."
    if base.config.model_type in ALIBI_MODELS or getattr(base.config, "alibi", False):
        return f"{name} takes its ALiBi bias from the cache column, so sibling tokens of a tree would be misplaced."
    if base.rope[0] == "mrope":
        return f"{name} uses three-dimensional rotary positions (mrope), which a tree of tokens does not have."
    try:
        layers = list(base.new_cache().layers)
    except Exception as error:  # a config whose cache cannot even be described
        return f"{name} has a cache that transformers cannot build ({type(error).__name__})."
    for layer in layers:
        if type(layer) is DynamicLayer or isinstance(layer, DummyLayer):
            continue
        kind = type(layer).__name__
        if "Linear" in kind:
            return f"{name} keeps a recurrent state ({kind}), which the branches of a tree would share."
        if "Sliding" in kind:
            return f"{name} uses a sliding attention window ({kind}), which cannot hold a tree past its length."
        return f"{name} uses the cache layer {kind}, which is not known to hold a tree."
    return None


@torch.no_grad()
def _tree_disagrees(base: Base) -> str | None:
    """Verify a small tree and compare every node with a plain pass over its own path."""
    generator = torch.Generator().manual_seed(1)
    room = 16 if base.max_positions is None else min(16, base.max_positions)
    probe = full((2, 2))
    if room < 2 + probe.max_depth + 1:
        return f"{type(base.model).__name__} has only {base.max_positions} positions."
    ids = torch.randint(0, base.vocab, (room - probe.max_depth - 1,), generator=generator).tolist()
    tokens = torch.randint(0, base.vocab, (probe.nodes,), generator=generator).to(base.device)
    runner = EagerRunner(base)
    name = type(base.model).__name__
    try:
        runner.prefill(ids)
        _, logits = runner.forward(tokens, probe)
    except Exception as error:  # any failure here is an answer: this model cannot verify a tree
        return f"{name} does not run with a tree mask ({type(error).__name__})."
    for node in range(probe.nodes):
        path = [int(tokens[step]) for step in probe.ancestors(node)]
        _, plain = base.run(torch.tensor([ids + path], device=base.device), last_only=True, use_cache=False)
        if not _same(logits[node].float(), plain[0, -1].float(), base.dtype):
            return f"{name} gives other logits for a token inside a tree than for the same token in plain text."
    return None


def _same(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> bool:
    """Equal but for rounding. In 16 bit single logits stray far on text as odd as the probe's, so the root mean square
    counts there: measured 0.02 to 0.07 of their spread, and 0.28 and more for a token that sees another path."""
    if dtype == torch.float32:
        return close(left, right, 2e-3)
    return float((left - right).square().mean().sqrt()) <= ROUNDED * float(right.std())
