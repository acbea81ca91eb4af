"""Drafters: trained heads, or the text itself (prompt lookup)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from evaluators.medusa.drafting.heads import Heads
from evaluators.medusa.model.packed import product
from evaluators.medusa.trees.tree import Tree


class Drafter(Protocol):
    """Proposes the tokens of a tree."""

    def propose(self, h: Tensor, root: int, seen: Sequence[int], tree: Tree) -> Tensor:
        """h [H] is the state that predicted `root`; `seen` is all text up to and with the root.

        Returns token ids [m] for nodes 1..m of the tree, m <= nodes - 1; fewer means a smaller tree this step.
        """
        ...


@runtime_checkable
class TensorDrafter(Drafter, Protocol):
    """A drafter that runs on the device alone, so that it can be captured in a CUDA graph."""

    def draft(self, h: Tensor, root: Tensor, position: Tensor, tree: Tree) -> Tensor:
        """h [H], the root [1] and its position in the text [1] -> token ids [nodes - 1], all on one device."""
        ...


class HeadDrafter:
    """Drafter that assigns the ranks of the heads to the nodes of the tree."""

    def __init__(self, heads: Heads) -> None:
        self.heads = drafting(heads)
        self._picks: dict[tuple[tuple[int, ...], ...], Tensor] = {}

    def propose(self, h: Tensor, root: int, seen: Sequence[int], tree: Tree) -> Tensor:
        at = torch.tensor([root, len(seen) - 1], device=h.device)
        return self.draft(h, at[:1], at[1:], tree)

    def draft(self, h: Tensor, root: Tensor, position: Tensor, tree: Tree) -> Tensor:
        if tree.paths not in self._picks:
            tree.check_fits(self.heads.spec.heads)
            self._picks[tree.paths] = torch.tensor(tree.pick, device=h.device)
        return self.heads.ranks(h[None], root, tree.topk)[:, 0].reshape(-1)[self._picks[tree.paths]]


class PromptLookup:
    """Propose the tokens after the last earlier occurrence of the newest 3-gram, or else 2-gram.

    Needs a chain. Reference: prompt lookup decoding, as in transformers' `prompt_lookup_num_tokens`.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device

    def propose(self, h: Tensor, root: int, seen: Sequence[int], tree: Tree) -> Tensor:
        found: Sequence[int] = ()
        for size in (3, 2):
            tail = list(seen[-size:])
            starts = range(len(seen) - size - 1, -1, -1)
            start = (
                next((at for at in starts if list(seen[at : at + size]) == tail), None) if len(seen) > size else None
            )
            if start is not None:
                found = seen[start + size : start + size + tree.max_depth]
                break
        return torch.tensor(list(found), dtype=torch.long, device=self._device)


@torch.no_grad()
def drafting(heads: Heads) -> Heads:
    """Copy of the heads for decoding: in the precision of the base, with packed weights if the base has them."""
    made = Heads(heads.spec, heads.base)
    made.load_state_dict(heads.state_dict())
    made.embed_scale = heads.embed_scale
    made = made.to(heads.base.dtype).eval().requires_grad_(False)
    if heads.base.execution == "packed":
        first = made.first.reshape(-1, made.first.shape[-1])
        object.__setattr__(made, "enter", product(first, made.first_bias.reshape(-1)))
        if made.spec.kind == "shared":
            whole = made.keep is None
            project = heads.base.output.forward if whole else product(made.unembed, made.unembed_bias)
            object.__setattr__(made, "project", project)
    return made
