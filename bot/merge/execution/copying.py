"""Steps that copy stored bytes. They need no arithmetic, hence no torch, whose import takes a second."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bot.errors import Failed
from bot.merge.checkpoints.checkpoint import LocalFiles
from bot.merge.execution.options import MergeOptions, NonFinite
from bot.merge.execution.stored import StoredBytes
from bot.merge.execution.writer import StepCounts, TensorWriter
from bot.merge.planning.plan import Plan, Step
from bot.merge.planning.work import Operand, Work
from bot.merge.recipe.spec import ModelRef

Bytes = NDArray[np.uint8]
_EXPONENTS: dict[str, Any] = {  # exponent bits: all set only in NaN and infinite numbers
    "float16": np.uint16(0x7C00),
    "bfloat16": np.uint16(0x7F80),
    "float32": np.uint32(0x7F800000),
    "float64": np.uint64(0x7FF0000000000000),
}


class Copier:
    """State of one thread: buffers that are reused for every tensor."""

    def __init__(
        self,
        sources: Mapping[ModelRef, LocalFiles],
        writer: TensorWriter,
        options: MergeOptions,
        stopped: threading.Event,
    ) -> None:
        self.sources, self.writer, self._options, self._stopped = sources, writer, options, stopped
        self._buffers: dict[int, Bytes] = {}

    def carry_out(self, step: Step) -> None:
        """Copy one tensor to the writer. Raises `bot.errors.Failed`."""
        self.writer.finished(step, self._copy_equal(step) if step.work.action == "equal" else self._copy(step))

    def _copy(self, step: Step) -> StepCounts:
        """Copy one operand and count its non-finite values."""
        (operand,) = step.work.operands
        stored, nonfinite, counts = self._stored(operand), 0, dict[str, int]()
        for start, count in self._parts(step.work):
            data = self._read(stored, 0, start, count)
            nonfinite += count_nonfinite(data, step.work.dtype.name)
            if nonfinite:
                counts[str(operand.source)] = nonfinite
            require_finite(step, counts, self._options.on_nonfinite)
            self.writer.write(step, start, data.data)
        return StepCounts(counts)

    def _copy_equal(self, step: Step) -> StepCounts:
        """Copy a tensor that is not floating point if it is equal in every source."""
        every = [self._stored(operand) for operand in step.work.operands]
        for start, count in self._parts(step.work):
            first, *others = (self._read(stored, i, start, count) for i, stored in enumerate(every))
            if any(not np.array_equal(first, other) for other in others):
                raise Failed(
                    "SHAPE_MISMATCH",
                    f"{step.name} is not floating point and differs between the sources.",
                    "Use models that agree on it.",
                    value=step.name,
                )
            self.writer.write(step, start, first.data)
        return StepCounts()

    def _parts(self, work: Work) -> Iterator[tuple[int, int]]:
        """(first byte, bytes) of each chunk."""
        size, end = self._options.chunk * work.dtype.itemsize, work.elements * work.dtype.itemsize
        for start in range(0, end, size):
            if self._stopped.is_set():
                raise CancelledError
            yield start, min(size, end - start)

    def _read(self, stored: StoredBytes, number: int, start: int, count: int) -> Bytes:
        if number not in self._buffers or len(self._buffers[number]) < count:
            self._buffers[number] = np.empty(count, dtype=np.uint8)
        data = self._buffers[number][:count]
        stored.fill(start, data.data)
        return data

    def _stored(self, operand: Operand) -> StoredBytes:
        return StoredBytes(self.sources[operand.model], operand.tensor)


def only_copies(plan: Plan) -> bool:
    """Return True if every step of `plan` copies."""
    return all(copies(step.work) for step in plan.steps)


def copies(work: Work) -> bool:
    """Return True if the output's bytes are those of an operand."""
    if work.action == "equal":
        return True
    first = work.operands[0]
    plain = work.aligned is None and first.tensor.dtype == work.dtype and first.patch is None
    unscaled = work.method == "passthrough" and work.per_input.get("scale", (None,)) == (None,)
    return plain and (work.action == "copy" or (work.action == "merge" and unscaled))


def count_nonfinite(data: Bytes, dtype: str) -> int:
    """Count NaN and infinite values; 0 for types that are not floating point."""
    if dtype not in _EXPONENTS or not len(data):
        return 0
    exponent = _EXPONENTS[dtype]
    bits = np.bitwise_and(data.view(exponent.dtype), exponent)
    return int(np.count_nonzero(bits == exponent)) if bits.max() == exponent else 0


def require_finite(step: Step, nonfinite: Mapping[str, int], on_nonfinite: NonFinite) -> None:
    """Raise Failed NOT_FINITE for NaN or infinite values if `on_nonfinite` is fail."""
    if nonfinite and on_nonfinite == "fail":
        source, count = next(iter(nonfinite.items()))
        raise Failed(
            "NOT_FINITE",
            f"{step.name} has {count} NaN or infinite values in {source}.",
            "Use another source: merged with other weights, such values spread.",
            value=step.name,
        )


def read_ahead(step: Step, sources: Mapping[ModelRef, LocalFiles]) -> None:
    """Ask the operating system to read the operands of `step` ahead."""
    for operand in step.work.reads:
        StoredBytes(sources[operand.model], operand.tensor).will_need()
