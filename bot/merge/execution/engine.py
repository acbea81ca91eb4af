"""Execute a plan: several tensors at a time, each read, computed and written chunk by chunk.

plan -> check sources unchanged -> steps (worker.py) -> index, config, provenance, manifest -> rename
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bot.errors import Refused
from bot.merge.checkpoints.checkpoint import LocalFiles
from bot.merge.checkpoints.ties import require_equal
from bot.merge.execution.copying import Copier, only_copies, read_ahead
from bot.merge.execution.options import DEFAULTS, MergeOptions
from bot.merge.execution.provenance import (
    MANIFEST,
    PROVENANCE,
    FileFact,
    Known,
    manifest,
    provenance,
    torch_version,
)
from bot.merge.execution.unchanged import Watch
from bot.merge.execution.writer import Record, TensorWriter, Writer
from bot.merge.planning.plan import Plan, Step
from bot.merge.recipe.spec import ModelRef, Notice

if TYPE_CHECKING:
    import torch

LARGE = 1 / 32  # of all bytes; larger tensors come first, so that none of them is left over for one worker at the end
CORNERS = {  # code -> text of the notice; the first tensor and the count follow
    "ZERO_TENSOR": "a vector of zeros has no direction and counted as orthogonal",
    "MEAN_VANISHES": "the weighted directions cancel; the weighted sum was taken",
    "ANTIPODAL": "a model lies opposite the mean and was skipped in the iteration",
    "EVEN_SHARES": "the energies of the deltas add up to less than 1e-6; sce weighted them equally",
    "COSINE_DAMPED": "deltas are so small that model_stock counts their cosine as smaller than it is",
}


@dataclass(frozen=True, slots=True)
class Merged:
    """A finished merge. `manifest_id` is the SHA-256 of manifest.json."""

    files: Mapping[str, FileFact]
    bytes: int
    seconds: float
    notices: tuple[Notice, ...]
    manifest_id: str


def merge(plan: Plan, folders: Mapping[ModelRef, Path], out: Path, options: MergeOptions = DEFAULTS) -> Merged:
    """Carry out `plan` with the sources in `folders`; `out` appears only when it is complete.

    A partial output of the same plan is continued. Raises `bot.errors`: OUTPUT_EXISTS, DISK_LOW, TOO_LARGE, DISK_FULL,
    NOT_FINITE, SOURCE_CHANGED_OR_GONE, DEVICE_UNAVAILABLE.
    """
    sources = {ref: LocalFiles(folder) for ref, folder in folders.items()}
    devices = _load(plan, sources, options)
    kind, started = devices[0].type if devices else "cpu", time.monotonic()
    watch = watched(plan, sources)
    identity = f"{plan.digest} {kind} torch-{torch_version()}"  # another torch may round otherwise
    with Writer(
        plan, Path(out), identity, watch.facts(), sync_bytes=options.sync_bytes, on_event=options.on_event
    ) as writer:
        run_steps(plan, sources, writer, options, devices)
        writer.sync()
        notices = (*plan.notices, *step_notices(plan, writer.done))
        files, manifest_id = _complete(plan, sources, writer, notices, kind, options.known)
        watch.require_unchanged()
        options.on_event("writer.before_rename")
        writer.finish()
    total = sum(fact.bytes for fact in files.values())
    return Merged(files, total, time.monotonic() - started, notices, manifest_id)


def choose_device(name: str) -> torch.device:
    """First torch device of those that `name` (cpu, cuda, cuda:N, auto) stands for."""
    from bot.merge.execution.device import choose_devices

    return choose_devices(name)[0]


def require_device(name: str, plan: Plan) -> None:
    """Raise DEVICE_UNAVAILABLE if `plan` cannot be carried out on `name`. Imports torch only if needed."""
    if name != "cpu" and not (name == "auto" and all(map(only_copies, plan.parts))):
        choose_device(name)


def _load(plan: Plan, sources: Mapping[ModelRef, LocalFiles], options: MergeOptions) -> list[torch.device]:
    """Devices of the merge, none for a plan of copies. The system reads the first tensors while torch is imported."""
    if options.device in ("cpu", "auto") and only_copies(plan):
        return []
    for step in in_working_order(plan.steps)[: options.threads]:
        read_ahead(step, sources)
    from bot.merge.execution.device import choose_devices

    return choose_devices(options.device)


def watched(plan: Plan, sources: Mapping[ModelRef, LocalFiles]) -> Watch:
    """Compare the folders with the headers that the plan was made from, now and at the end of the merge."""
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
    writer: TensorWriter,
    options: MergeOptions = DEFAULTS,
    devices: Sequence[torch.device] = (),
) -> None:
    """Hand every step that `writer` lacks to a thread: `options.threads` on the CPU, or one per GPU for its shards.

    `devices` are those of `choose_devices`, by default the CPU; `options.device` is not read. An error in one thread
    ends the run; the other steps stop at the end of a chunk.
    """
    todo = in_working_order([step for step in plan.steps if step.index not in writer.done])
    stopped = threading.Event()
    with _pools(plan, sources, writer, options, devices, stopped) as pools:
        try:
            waiting = []
            for place, step in enumerate(todo):
                ahead = todo[place + options.threads :][:1]
                waiting.append((step, pools[step.shard % len(pools)].submit(_carry_out, step, ahead)))
            done_bytes = plan.bytes_out - sum(step.nbytes for step in todo)
            for step, future in waiting:
                future.result()
                done_bytes += step.nbytes
                if options.progress is not None:
                    options.progress(done_bytes, plan.bytes_out, step.name)
                options.on_event("merge.after_step")
        except BaseException:
            stopped.set()
            raise


_thread = threading.local()  # `worker`: the Copier or Worker of a pool's thread


def _begin(make_worker: Callable[[], Copier]) -> None:
    _thread.worker = make_worker()


def _carry_out(step: Step, ahead: Sequence[Step]) -> None:
    worker: Copier = _thread.worker
    for later in ahead:
        read_ahead(later, worker.sources)
    worker.carry_out(step)


@contextmanager
def _pools(
    plan: Plan,
    sources: Mapping[ModelRef, LocalFiles],
    writer: TensorWriter,
    options: MergeOptions,
    devices: Sequence[torch.device],
    stopped: threading.Event,
) -> Iterator[list[ThreadPoolExecutor]]:
    """One pool of threads per device, shut down when the context ends. Only a plan that computes imports torch."""
    restore: Callable[[], None] = lambda: None  # noqa: E731
    workers: list[tuple[Callable[[], Copier], int]] = []  # and the threads of each pool
    if only_copies(plan):
        workers.append((partial(Copier, sources, writer, options, stopped), options.threads))
    else:
        import torch

        from bot.merge.execution.worker import Worker

        restore = partial(torch.set_num_threads, torch.get_num_threads())
        for device in devices or (torch.device("cpu"),):
            make_worker = partial(Worker, sources, writer, options, stopped, device)
            workers.append((make_worker, options.threads if device.type == "cpu" else 1))
    pools = [ThreadPoolExecutor(threads, "merge", _begin, (make_worker,)) for make_worker, threads in workers]
    try:
        yield pools
    finally:
        for pool in pools:
            pool.shutdown(wait=True, cancel_futures=True)
        restore()


def in_working_order(steps: Sequence[Step]) -> list[Step]:
    """Steps with large tensors first, otherwise in the order of the plan."""
    large = LARGE * sum(step.nbytes for step in steps)
    return sorted(steps, key=lambda step: step.nbytes < large)


def step_notices(plan: Plan, done: Mapping[int, Record]) -> tuple[Notice, ...]:
    """Notices of the steps, summed over them: non-finite values per source, then corner cases by code."""
    sums: dict[tuple[str, str], list[int]] = {}
    for index in sorted(done):
        record = done[index]
        counts = [("NOT_FINITE", source, count) for source, count in record.nonfinite.items()]
        counts += [(code, CORNERS.get(code, code), count) for code, count in record.corners.items()]
        for code, text, count in counts:
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
    """Write the files beside the weights, the manifest last."""
    files = writer.hash_shards()
    texts = plan.written_texts
    if plan.recipe.original is not None:
        texts["mergekit_config.original.yml"] = plan.recipe.original
    for name, text in texts.items():
        files[name] = writer.add(name, text.encode())
    for copied in plan.copies:
        files[copied.file] = writer.add(copied.file, sources[copied.model].read(copied.file, 0, copied.nbytes))
    facts = provenance(plan, files, notices, device, known() if known else None)
    files[PROVENANCE] = writer.add(PROVENANCE, facts)
    fact = writer.add(MANIFEST, manifest(files))
    return {**files, MANIFEST: fact}, fact.sha256
