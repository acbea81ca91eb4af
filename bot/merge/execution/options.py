"""Options of a merge that do not belong to its recipe: device, threads, progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from bot.merge.execution.provenance import Known
from bot.merge.execution.writer import SYNC_BYTES, Progress
from bot.merge.planning.plan import WORKERS
from bot.merge.streaming.operation import CHUNK

Event = Callable[[str], None]  # receives the name of a moment at which a test may stop the process
NonFinite = Literal["notice", "fail"]


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """Options of a merge. The bytes of the output do not depend on `threads` or `sync_bytes`.

    device: cpu, cuda (all GPUs), cuda:N or auto.
    threads: tensors processed at a time.
    on_nonfinite: effect of NaN or Inf in a source, a notice (trusted request) or the end (untrusted request).
    progress: called after each tensor, in the order of the work.
    known: returns the known facts of the sources' files; called once, at the end.
    sync_bytes: written tensors enter the journal after this many bytes or 5 s.
    on_event: called at merge.after_step, writer.after_journal and writer.before_rename.
    chunk: elements per chunk on the CPU; another value than the default may change the last bits.
    """

    device: str = "cpu"
    threads: int = WORKERS
    on_nonfinite: NonFinite = "notice"
    progress: Progress | None = None
    known: Callable[[], Known] | None = None
    sync_bytes: int = SYNC_BYTES
    on_event: Event = lambda event: None
    chunk: int = CHUNK


DEFAULTS = MergeOptions()
