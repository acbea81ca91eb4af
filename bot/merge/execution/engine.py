"""Execute a plan: several tensors at a time, each read, computed and written piece by piece.

plan -> check sources unchanged -> steps (lane.py) -> index, config, provenance, manifest -> rename
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict

from bot.errors import Refused
from bot.merge.checkpoints.checkpoint import INDEX, LocalFiles
from bot.merge.checkpoints.ties import require_equal
from bot.merge.execution.copying import Copier, NonFinite, only_copies, read_ahead
from bot.merge.execution.provenance import Known, manifest, provenance, torch_version
from bot.merge.execution.unchanged import Watch
from bot.merge.execution.writer import SYNC_BYTES, FileFact, Progress, Record, Sink, Writer
from bot.merge.planning.output_names import MANIFEST, PROVENANCE
from bot.merge.planning.plan import WORKERS, Plan, Step
from bot.merge.recipe.reading import write_yaml
from bot.merge.recipe.spec import ModelRef, Notice
from bot.merge.streaming.operation import CHUNK

if TYPE_CHECKING:
    import torch

Event = Callable[[str], None]  # told of moments at which a test may want to stop the process
LARGE = 1 / 32  # of all bytes; larger tensors come first, so that none of them is left over for one worker at the end
CORNERS = {  # code -> what happened, with the first tensor and the count following
    "ZERO_TENSOR": "a vector of zeros has no direction and counted as orthogonal",
    "MEAN_VANISHES": "the weighted directions cancel; the weighted sum was taken",
    "ANTIPODAL": "a model lies opposite the mean and was skipped in the iteration",
    "EVEN_SHARES": "the energies of the deltas add up to less than 1e-6; sce weighted them equally",
    "COSINE_DAMPED": "deltas are so small that model_stock counts their cosine as smaller than it is",
}


class Options(TypedDict, total=False):
    """What `merge` may be told beside device and progress."""

    on_nonfinite: NonFinite
    threads: int
    sync_bytes: int
    known: Callable[[], Known] | None
    on_event: Event | None
    chunk: int


@dataclass(frozen=True, slots=True)
class Merged:
    """A finished merge. `manifest_id` is the SHA-256 of manifest.json, which lists every file."""

    files: Mapping[str, FileFact]
    bytes: int
    seconds: float
    notices: tuple[Notice, ...]
    manifest_id: str


def merge(
    plan: Plan,
    folders: Mapping[ModelRef, Path],
    out: Path,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    on_nonfinite: NonFinite = "notice",
    threads: int = WORKERS,
    sync_bytes: int = SYNC_BYTES,
    known: Callable[[], Known] | None = None,
    on_event: Event | None = None,
    chunk: int = CHUNK,
) -> Merged:
    """Carry out `plan` with the sources in `folders`; `out` appears only when it is whole.

    device: cpu, cuda (all there are), cuda:N or auto. A partial output of the same plan is continued. on_nonfinite:
    what NaN or Inf in a source means, a notice (operator) or the end (a stranger's request). `threads` tensors are
    worked on at a time; the bytes do not depend on it. Written tensors enter the journal after `sync_bytes` bytes or
    5 s. `known` is asked at the end what is known of the sources' files. `on_event` hears merge.after_step,
    writer.after_journal, writer.before_rename. `chunk`: elements per piece; another value than the default may change
    the last bits. Raises `bot.errors`: OUTPUT_EXISTS, DISK_LOW, TOO_LARGE, DISK_FULL, NOT_FINITE,
    SOURCE_CHANGED_OR_GONE, DEVICE_UNAVAILABLE.
    """
    sources = {ref: LocalFiles(folder) for ref, folder in folders.items()}
    devices = _load(plan, sources, device, threads)
    kind, started = devices[0].type if devices else "cpu", time.monotonic()
    watch = watched(plan, sources)
    identity = f"{plan.digest} {kind} torch-{torch_version()}"  # another torch may round otherwise
    heard = on_event or (lambda event: None)
    with Writer(plan, Path(out), identity, watch.facts(), sync_bytes=sync_bytes, on_event=heard) as writer:
        run_steps(
            plan, sources, writer, devices=devices, progress=progress, on_nonfinite=on_nonfinite, threads=threads,
            on_event=heard, chunk=chunk,
        )  # fmt: skip
        writer.sync()
        notices = (*plan.notices, *found_notices(plan, writer.done))
        files, manifest_id = _complete(plan, sources, writer, notices, kind, known)
        watch.require_unchanged()
        heard("writer.before_rename")
        writer.finish()
    total = sum(fact.bytes for fact in files.values())
    return Merged(files, total, time.monotonic() - started, notices, manifest_id)


def choose_device(name: str) -> torch.device:
    """The first torch device of those that `name` (cpu, cuda, cuda:N, auto) stands for."""
    from bot.merge.execution.device import choose_devices

    return choose_devices(name)[0]


def require_device(name: str, plan: Plan) -> None:
    """Raises DEVICE_UNAVAILABLE if `plan` cannot be carried out on `name`. Imports torch only if it must."""
    if name != "cpu" and not (name == "auto" and all(map(only_copies, plan.parts))):
        choose_device(name)


def _load(plan: Plan, sources: Mapping[ModelRef, LocalFiles], device: str, threads: int) -> list[torch.device]:
    """The devices, none where nothing is computed. The system reads the first tensors while torch is imported."""
    if device in ("cpu", "auto") and only_copies(plan):
        return []
    for step in in_working_order(plan.steps)[:threads]:
        read_ahead(step, sources)
    from bot.merge.execution.device import choose_devices

    return choose_devices(device)


def watched(plan: Plan, sources: Mapping[ModelRef, LocalFiles]) -> Watch:
    """The plan was made from headers; hold the folders against them, now and at the end."""
    headers = {source.model.bare: source.headers for source in plan.sources}
    for ref in headers:
        if ref not in sources:
            raise Refused("SOURCE_NOT_FOUND", f"no folder was given for {ref}.", "Fetch it first.", value=str(ref))
    for source in plan.sources:
        for kept, left_out in source.presumed:
            require_equal(sources[source.model.bare].read, str(source.model), kept, left_out)
    return Watch(sources, headers, plan.copies)


def run_steps(
    plan: Plan,
    sources: Mapping[ModelRef, LocalFiles],
    sink: Sink,
    *,
    devices: Sequence[torch.device] = (),
    progress: Progress | None = None,
    on_nonfinite: NonFinite = "notice",
    threads: int = WORKERS,
    on_event: Event = lambda event: None,
    chunk: int = CHUNK,
) -> None:
    """Hand every step that `sink` lacks to a worker: `threads` of them, or one per GPU with the shards that are its.

    `devices` are those of `choose_devices`, by default the CPU. Progress is told in the order of the work. What a
    worker raises ends the run; steps under way stop at a piece's end.
    """
    todo = in_working_order([step for step in plan.steps if step.index not in sink.done])
    stopped = threading.Event()
    with _workers(plan, sources, sink, devices, on_nonfinite, threads, chunk, stopped) as workers:
        try:
            waiting = []
            for place, step in enumerate(todo):
                ahead = todo[place + threads : place + threads + 1]
                waiting.append((step, workers[step.shard % len(workers)].submit(step, ahead)))
            done_bytes = plan.bytes_out - sum(step.nbytes for step in todo)
            for step, future in waiting:
                future.result()
                done_bytes += step.nbytes
                if progress is not None:
                    progress(done_bytes, plan.bytes_out, step.name)
                on_event("merge.after_step")
        except BaseException:
            stopped.set()
            raise


class _Lane(Protocol):
    """Carries out steps, one after the other."""

    sources: Mapping[ModelRef, LocalFiles]

    def carry_out(self, step: Step) -> None: ...


class _Worker:
    """Threads that share a device, each with a lane of its own."""

    def __init__(self, lane: Callable[[], _Lane], threads: int) -> None:
        self._own = threading.local()
        self.pool = ThreadPoolExecutor(threads, "merge", initializer=self._begin, initargs=(lane,))

    def _begin(self, lane: Callable[[], _Lane]) -> None:
        self._own.lane = lane()

    def submit(self, step: Step, ahead: Iterable[Step]) -> Future[None]:
        return self.pool.submit(self._carry_out, step, ahead)

    def _carry_out(self, step: Step, ahead: Iterable[Step]) -> None:
        lane: _Lane = self._own.lane
        for coming in ahead:
            read_ahead(coming, lane.sources)
        lane.carry_out(step)


@contextmanager
def _workers(
    plan: Plan, sources: Mapping[ModelRef, LocalFiles], sink: Sink, devices: Sequence[torch.device],
    on_nonfinite: NonFinite, threads: int, chunk: int, stopped: threading.Event,
) -> Iterator[list[_Worker]]:  # fmt: skip
    """One per device; they have ended when the context ends. torch is imported only for a plan that computes."""
    restore: Callable[[], None] = lambda: None  # noqa: E731
    if only_copies(plan):
        made = [_Worker(partial(Copier, sources, sink, on_nonfinite, chunk, stopped), threads)]
    else:
        import torch

        from bot.merge.execution.lane import lane_of_one_thread

        restore = partial(torch.set_num_threads, torch.get_num_threads())
        made = [
            _Worker(
                partial(lane_of_one_thread, sources, sink, on_nonfinite, at, chunk, stopped),
                threads if at.type == "cpu" else 1,
            )
            for at in devices or (torch.device("cpu"),)
        ]
    try:
        yield made
    finally:
        for worker in made:
            worker.pool.shutdown(wait=True, cancel_futures=True)
        restore()


def in_working_order(steps: Sequence[Step]) -> list[Step]:
    """Large tensors first, otherwise as planned."""
    large = LARGE * sum(step.nbytes for step in steps)
    return sorted(steps, key=lambda step: step.nbytes < large)


def found_notices(plan: Plan, done: Mapping[int, Record]) -> tuple[Notice, ...]:
    """What came to light during the steps, summed over them: non-finite values per source, then odd cases by code."""
    sums: dict[tuple[str, str], list[int]] = {}
    for index in sorted(done):
        record = done[index]
        found = [*(("NOT_FINITE", source, count) for source, count in record.nonfinite.items())]
        found += [(code, CORNERS.get(code, code), count) for code, count in record.corners.items()]
        for code, text, count in found:
            sums.setdefault((code, text), [index, 0])[1] += count
    return tuple(
        Notice(
            code,
            f"{text} has NaN or infinite values, the first in {plan.steps[first].name}"
            if code == "NOT_FINITE"
            else f"{text}, the first time in {plan.steps[first].name}",
            count,
        )
        for (code, text), (first, count) in sums.items()
    )


def _complete(
    plan: Plan,
    sources: Mapping[ModelRef, LocalFiles],
    writer: Writer,
    notices: tuple[Notice, ...],
    device: str,
    known: Callable[[], Known] | None,
) -> tuple[dict[str, FileFact], str]:
    """Everything that stands beside the weights; the manifest last."""
    files = writer.hash_shards()
    if plan.index is not None:
        files[INDEX] = writer.add(INDEX, plan.index.encode())
    for copied in plan.copies:
        files[copied.file] = writer.add(copied.file, sources[copied.model].read(copied.file, 0, copied.nbytes))
    for name, text in plan.texts.items():
        files[name] = writer.add(name, text.encode())
    files["config.json"] = writer.add("config.json", plan.config.encode())
    files["mergekit_config.yml"] = writer.add("mergekit_config.yml", write_yaml(plan.recipe.document()).encode())
    if plan.recipe.original is not None:
        files["mergekit_config.original.yml"] = writer.add(
            "mergekit_config.original.yml", plan.recipe.original.encode()
        )
    facts = provenance(plan, files, notices, device, torch_version(), known() if known else None)
    files[PROVENANCE] = writer.add(PROVENANCE, facts)
    fact = writer.add(MANIFEST, manifest(files))
    return {**files, MANIFEST: fact}, fact.sha256
