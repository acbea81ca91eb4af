"""Token sequences packed by shared prefixes, so that a model reads each shared prefix once.

Sequences are sorted. A prefix shared by more tokens than one pass should read is read first and cached; what follows it
is packed into chunks. A chunk is a tree of tokens in one row: each token has a position and attends to its ancestors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

MIN_CACHED = 32  # tokens; a shorter prefix is read again with each chunk, which is cheaper than one more pass


@dataclass(frozen=True, slots=True)
class Segment:
    """A pass over tokens `start` to `end` of sequence `first`, cached for the sequences [first, stop)."""

    first: int
    stop: int
    start: int
    end: int
    passes: tuple[Segment | Chunk, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A pass over the sequences [first, stop) behind a cached prefix of `start` tokens."""

    first: int
    stop: int
    start: int


@dataclass(slots=True)
class PackedTokens:
    """Tokens of a pass in one row of N: ids, positions, the mask [N, N] of what each attends to, and the slots in the
    row of each sequence's tokens."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[list[int]] = field(default_factory=list)
    mask: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros((0, 0), bool))


class PrefixTree:
    """Distinct sequences in lexicographic order, with the length of the prefix that neighbours share."""

    def __init__(self, sequences: Sequence[tuple[int, ...]]) -> None:
        self.sequences = sorted(set(sequences))
        pairs = itertools.pairwise(self.sequences)
        self._shared = [0, *(shared_length(left, right) for left, right in pairs)]

    def plan(self, max_tokens: int) -> tuple[Segment | Chunk, ...]:
        """Passes in order. A chunk reads at most `max_tokens`, unless one sequence alone is longer."""
        return tuple(self._planned(0, len(self.sequences), 0, max_tokens))

    def pack(self, part: Segment | Chunk) -> PackedTokens:
        """Lay out the tokens of one pass in a row; each attends to its ancestors and itself."""
        end = part.end if isinstance(part, Segment) else None
        stop = part.first + 1 if isinstance(part, Segment) else part.stop
        size = part.end - part.start if isinstance(part, Segment) else self._tokens(part.first, stop, part.start)
        out = PackedTokens(mask=np.zeros((size, size), bool))
        path: list[int] = []
        for i in range(part.first, stop):
            sequence = self.sequences[i][:end]
            kept = 0 if i == part.first else self._shared[i] - part.start
            del path[kept:]
            begin, end_slot = len(out.ids), len(out.ids) + len(sequence) - part.start - kept
            if path:
                out.mask[begin:end_slot] = out.mask[path[-1]]
            out.mask[begin:end_slot, begin:end_slot] = np.tri(end_slot - begin, dtype=bool)
            out.ids += sequence[part.start + kept :]
            out.positions += range(part.start + kept, len(sequence))
            path += range(begin, end_slot)
            out.slots.append(path.copy())
        if isinstance(part, Segment):  # all its sequences share these tokens
            out.slots *= part.stop - part.first
        return out

    def tokens_read(self, passes: Sequence[Segment | Chunk]) -> int:
        """Tokens of all passes together."""
        return sum(
            part.end - part.start + self.tokens_read(part.passes)
            if isinstance(part, Segment)
            else self._tokens(part.first, part.stop, part.start)
            for part in passes
        )

    def _planned(self, first: int, stop: int, start: int, max_tokens: int) -> Iterator[Segment | Chunk]:
        """Passes for the sequences [first, stop), whose first `start` tokens are cached."""
        groups = self._groups(first, stop, start, max_tokens)
        begin = next_stop = first
        for group_first, group_stop, shared in groups:
            if shared - start >= MIN_CACHED and group_stop - group_first > 1:
                if begin < next_stop:
                    yield from self._chunks(begin, next_stop, start, max_tokens)
                inner = tuple(self._planned(group_first, group_stop, shared, max_tokens))
                yield Segment(group_first, group_stop, start, shared, inner)
                begin = group_stop
            next_stop = group_stop
        if begin < next_stop:
            yield from self._chunks(begin, next_stop, start, max_tokens)

    def _groups(self, first: int, stop: int, start: int, max_tokens: int) -> Iterator[tuple[int, int, int]]:
        """(first, stop, shared) of the largest groups that share a prefix worth caching; the rest one by one."""
        pending = [(first, stop)]
        while pending:
            low, high = pending.pop()
            shared = min(self._shared[low + 1 : high], default=len(self.sequences[low]))
            large = self._tokens(low, high, start) > max_tokens
            if high - low == 1 or not large or shared - start >= MIN_CACHED:
                yield low, high, shared if large else start
                continue
            cuts = [i for i in range(low + 1, high) if self._shared[i] == shared]
            pending += reversed(list(itertools.pairwise([low, *cuts, high])))

    def _chunks(self, first: int, stop: int, start: int, max_tokens: int) -> Iterator[Chunk]:
        begin, size = first, len(self.sequences[first]) - start
        for i in range(first + 1, stop):
            more = len(self.sequences[i]) - self._shared[i]
            if size + more > max_tokens:
                yield Chunk(begin, i, start)
                begin, size = i, len(self.sequences[i]) - start
            else:
                size += more
        yield Chunk(begin, stop, start)

    def _tokens(self, first: int, stop: int, start: int) -> int:
        """Tokens of the tree of the sequences [first, stop) behind `start`."""
        own = sum(len(self.sequences[i]) - self._shared[i] for i in range(first + 1, stop))
        return len(self.sequences[first]) - start + own


def shared_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Tokens at the start of both."""
    size = min(len(left), len(right))
    if left[:size] == right[:size]:
        return size
    low, high = 0, size  # left[:low] is shared, left[:high] is not
    while high - low > 1:
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low
