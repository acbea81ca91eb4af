"""The orientation of square matrices: (out, in) as in nn.Linear, or (in, out) as in transformers' Conv1D (GPT-2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from bot.merge.checkpoints.header import TensorInfo
from bot.merge.checkpoints.tensor_names import stack_of


class MatrixLayout:
    """The orientation of matrices, inferred from similar ones of which it is known: (name, inputs come first)."""

    def __init__(self, evidence: Iterable[tuple[str, bool]]) -> None:
        self._votes: dict[tuple[str, ...], set[bool]] = {}
        for name, first in evidence:
            for key in _keys(name):
                self._votes.setdefault(key, set()).add(first)

    def inputs_first(self, name: str) -> bool | None:
        """True if a matrix is stored (in, out), as others of its name or else of its stack; None if unknown."""
        for key in _keys(name):
            votes = self._votes.get(key, set())
            if len(votes) == 1:
                return next(iter(votes))
        return None


def by_biases(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, bool]]:
    """The evidence of a checkpoint: the bias of a matrix that is not square is as long as the side of its outputs."""
    for name, tensor in tensors.items():
        bias = tensors.get(f"{name.removesuffix('.weight')}.bias")
        if bias is None or len(tensor.shape) != 2 or tensor.shape[0] == tensor.shape[1] or len(bias.shape) != 1:
            continue
        if bias.shape[0] in tensor.shape:
            yield name, bias.shape[0] == tensor.shape[1]


def _keys(name: str) -> Iterator[tuple[str, ...]]:
    """Groups that a matrix is compared with: those of the same name in its stack of layers, then all of the stack."""
    stack = stack_of(name)
    yield stack, name.removesuffix(".weight").rpartition(".")[2]
    yield (stack,)
