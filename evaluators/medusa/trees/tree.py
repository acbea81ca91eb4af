"""Static draft trees: the ranks of the heads that are verified together in one forward pass.

A path `(a1, .., ad)` means "rank a1 of head 1, then rank a2 of head 2, ..", ranks from 0. Node 0 is the root: the base
model's own next token, which is always right. The other nodes are the paths, sorted by (length, lexicographic), so any
first m nodes of a tree are themselves a tree. Walk `children` to accept; a table of root-to-leaf rows with padding is
deliberately absent, because a padded -1 aliases an ordinary token and accepts what nobody proposed.

Reference: Medusa, arXiv 2401.10774, section 2.1.2 (tree attention) and appendix (sparse trees).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Path = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Tree:
    """A validated tree. Every per-node tuple is indexed by node, the root first; n = nodes."""

    paths: tuple[Path, ...]
    topk: int = field(init=False)
    parent: tuple[int, ...] = field(init=False)
    depth: tuple[int, ...] = field(init=False)
    children: tuple[tuple[int, ...], ...] = field(init=False)
    pick: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        paths = _sorted_and_checked(self.paths)
        node = {(): 0} | {path: index for index, path in enumerate(paths, start=1)}
        children: list[list[int]] = [[] for _ in node]
        for path in paths:
            children[node[path[:-1]]].append(node[path])
        topk = max((rank for path in paths for rank in path), default=-1) + 1
        for name, value in (
            ("paths", paths),
            ("topk", topk),
            ("parent", (-1, *(node[path[:-1]] for path in paths))),
            ("depth", (0, *(len(path) for path in paths))),
            ("children", tuple(tuple(row) for row in children)),
            ("pick", tuple(topk * (len(path) - 1) + path[-1] for path in paths)),
        ):
            object.__setattr__(self, name, value)

    @property
    def nodes(self) -> int:
        """Tokens verified in one forward pass, the root included."""
        return len(self.paths) + 1

    @property
    def max_depth(self) -> int:
        return self.depth[-1]

    def ancestors(self, node: int) -> Path:
        """The nodes from the root to `node`, both included."""
        chain = [node]
        while chain[-1] != 0:
            chain.append(self.parent[chain[-1]])
        return tuple(reversed(chain))

    def visible(self) -> list[list[bool]]:
        """[n, n]: row i may attend to column j iff j is i or an ancestor of i."""
        seen = [set(self.ancestors(node)) for node in range(self.nodes)]
        return [[column in row for column in range(self.nodes)] for row in seen]

    def first(self, nodes: int) -> Tree:
        """The tree of the first `nodes` nodes (at least the root)."""
        return self if nodes >= self.nodes else Tree(self.paths[: max(nodes, 1) - 1])

    def shallow(self, depth: int) -> Tree:
        """The tree without what lies deeper than `depth`; depth 0 leaves the root alone."""
        return self.first(sum(1 for level in self.depth if level <= max(depth, 0)))

    def check_fits(self, heads: int) -> None:
        """Raise ValueError if a path is deeper than there are heads to fill it."""
        if self.max_depth > heads:
            raise ValueError(f"the tree is {self.max_depth} levels deep, but there are only {heads} heads")


def _sorted_and_checked(paths: Iterable[Path]) -> tuple[Path, ...]:
    ordered = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
    known: set[Path] = {()}
    for path in ordered:
        if not path:
            raise ValueError("the empty path is the root, which every tree already has")
        if any(not isinstance(rank, int) or rank < 0 for rank in path):
            raise ValueError(f"path {path} holds a rank that is not an integer from 0")
        if path in known:
            raise ValueError(f"path {path} is given twice")
        if path[:-1] not in known:
            raise ValueError(f"path {path} has no parent {path[:-1]} in the tree")
        known.add(path)
    return tuple(ordered)


ROOT_ONLY = Tree(())


def chain(depth: int) -> Tree:
    """Only the best guess of each head: depth + 1 nodes."""
    return Tree(tuple((0,) * length for length in range(1, depth + 1)))


def full(widths: Sequence[int]) -> Tree:
    """Every combination of the first `widths[d]` ranks at depth d + 1."""
    levels = (itertools.product(*(range(width) for width in widths[:depth])) for depth in range(1, len(widths) + 1))
    return Tree(tuple(itertools.chain.from_iterable(levels)))


def grow(accuracy: Sequence[Sequence[float]], paths: int) -> list[tuple[Path, float]]:
    """The `paths` most valuable paths in the order they are worth adding, each with its value.

    `accuracy[k][j]` is the share of positions where rank j of head k + 1 is right; a path is worth the product along
    it (independence assumed). Fewer are returned when the ranks are used up. Optimal for the sum of values because a
    path is never worth more than its parent or its left sibling.
    """
    frontier: list[tuple[float, Path]] = []

    def offer(parent: Path, parent_value: float, rank: int) -> None:
        if len(parent) < len(accuracy) and rank < len(accuracy[len(parent)]):
            heapq.heappush(frontier, (-parent_value * accuracy[len(parent)][rank], (*parent, rank)))

    value_of: dict[Path, float] = {(): 1.0}
    offer((), 1.0, 0)
    grown: list[tuple[Path, float]] = []
    while frontier and len(grown) < paths:
        negative, path = heapq.heappop(frontier)
        value_of[path] = -negative
        grown.append((path, -negative))
        offer(path[:-1], value_of[path[:-1]], path[-1] + 1)
        offer(path, -negative, 0)
    return grown


def greedy_tree(accuracy: Sequence[Sequence[float]], nodes: int) -> Tree:
    """The best tree of at most `nodes` nodes, the root included, by best-first growth."""
    return Tree(tuple(path for path, _ in grow(accuracy, nodes - 1)))


def expected_tokens(accuracy: Sequence[Sequence[float]], tree: Tree) -> float:
    """E = 1 + the sum of all path values: tokens per step under independence."""
    total = 1.0
    for path in tree.paths:
        value = 1.0
        for level, rank in enumerate(path):
            value *= accuracy[level][rank]
        total += value
    return total
