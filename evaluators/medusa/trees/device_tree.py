"""A tree as tensors, and greedy acceptance on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from evaluators.medusa.trees.tree import Tree


class DeviceTree:
    """Tensors of a tree on a device; n nodes, d = max_depth.

    parent [n] (that of the root is 0), depth [n], visible [n, n]: column j is i or an ancestor of i, elder [n, n]:
    column j is an earlier sibling of i, level [d + 1, n]: 1 where node j lies at depth i, steps [d + 1] and index [n]
    count from 0.
    """

    def __init__(self, tree: Tree, device: torch.device) -> None:
        n = tree.nodes
        self.nodes = n
        self.parent = torch.tensor([0, *tree.parent[1:]], device=device)
        self.depth = torch.tensor(tree.depth, device=device)
        self.visible = torch.tensor(tree.visible(), device=device)
        self.index = torch.arange(n, device=device)
        self.steps = torch.arange(tree.max_depth + 1, device=device)
        older = self.index[None] < self.index[:, None]
        self.elder = (self.parent[None] == self.parent[:, None]) & older & (self.index > 0)
        self.level = (self.depth[None] == self.steps[:, None]).long()

    def mask_strip(self, span: int, dtype: torch.dtype, tiles: int = 1, window: int | None = None) -> Tensor:
        """[n, span + n + span]: additive mask for the cached tokens, the tree, and the unused rows after it.

        The mask after L cached tokens is the `span` columns from `span - L` on. All rows are repeated `tiles` times.
        With `window` a node sees only the last `window` positions.
        """
        before = torch.arange(-span, 0, device=self.depth.device)  # positions relative to the root
        seen = torch.cat([before.new_ones((self.nodes, span), dtype=torch.bool), self.visible], dim=1)
        if window is not None:
            seen &= self.depth[:, None] - torch.cat([before, self.depth]) < window
        # finfo.min, not -inf: a row of -inf would give NaN in some kernels.
        strip = torch.full((self.nodes, 2 * span + self.nodes), torch.finfo(dtype).min, device=seen.device)
        strip[:, : span + self.nodes].masked_fill_(seen, 0.0)
        return strip.to(dtype).repeat(tiles, 1)

    def greedy_path(self, tokens: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
        """Node tokens [n] and the base's choices after them [n] -> (path [d + 1], accepted [1]).

        path[0..accepted] is the path of `acceptance.Greedy`; later entries continue the count and are unused.
        """
        hit = (tokens == best[self.parent]) | (self.index == 0)
        hit = hit & ~(self.elder & hit).any(-1)  # of siblings with the same token only the first, as in Greedy
        line = (hit | ~self.visible).all(-1)  # correct from the root on: at most one node per level
        accepted = line.sum(0, keepdim=True) - 1
        path = (self.level * (line * self.index)).sum(-1)
        return torch.where(self.steps <= accepted, path, self.steps), accepted
