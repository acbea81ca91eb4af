"""Execute a plan: read, compute and write one tensor after the other, the next one being read meanwhile.

plan -> check sources unchanged -> read | compute | write ... -> index, config, provenance, manifest -> rename
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bot.errors import Failed, Refused
from bot.merge.checkpoint import LocalFiles
from bot.merge.chunked import can_stream, merge_chunked
from bot.merge.gather import gather
from bot.merge.lora_rows import PatchedView, stored_tensor
from bot.merge.methods import apply
from bot.merge.plan import WORKERS, Plan, Step
from bot.merge.provenance import Known, manifest, provenance
from bot.merge.recipe import write_yaml
from bot.merge.spec import ModelRef, Notice
from bot.merge.steps import Operand, Work
from bot.merge.unchanged import Watch
from bot.merge.views import HeldView
from bot.merge.writer import SYNC_BYTES, FileFact, Record, Writer

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, the tensor just finished
NonFinite = Literal["notice", "fail"]
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Merged:
    """A finished merge. `manifest_id` is the SHA-256 of manifest.json, which lists every file."""

    files: Mapping[str, FileFact]
    bytes: int
    seconds: float
    notices: tuple[Notice, ...]
    manifest_id: str


@dataclass(frozen=True, slots=True)
class _Computed:
    """One output tensor as bytes, with the non-finite input elements found per source."""

    step: Step
    data: Tensor
    nonfinite: Mapping[str, int]


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
) -> Merged:
    """Carry out `plan` with the sources in `folders`; `out` appears only when it is whole.

    device: cpu, cuda or auto. A partial output of the same plan is continued. on_nonfinite: what NaN or Inf in a
    source means, a notice (operator) or the end (a stranger's request). `threads` tensors are worked on at a time;
    the bytes do not depend on it. Written tensors enter the journal after
    `sync_bytes` bytes or 5 s. `known` is asked at the end what is known of the sources' files. Raises `bot.errors`:
    OUTPUT_EXISTS, DISK_LOW, TOO_LARGE, DISK_FULL, NOT_FINITE, SOURCE_CHANGED_OR_GONE, DEVICE_UNAVAILABLE.
    """
    started = time.monotonic()
    chosen = choose_device(device)
    sources = {ref: LocalFiles(folder) for ref, folder in folders.items()}
    watched = _watched(plan, sources)
    identity = f"{plan.digest} {chosen.type}"
    with Writer(plan, Path(out), identity, sync_bytes=sync_bytes) as writer:
        _run_steps(plan, sources, writer, chosen, progress, on_nonfinite, threads)
        notices = (*plan.notices, *_nonfinite_notices(plan, writer.done))
        files, manifest_id = _complete(plan, sources, writer, notices, chosen, known)
        watched.require_unchanged()
        writer.finish()
    total = sum(fact.bytes for fact in files.values())
    return Merged(files, total, time.monotonic() - started, notices, manifest_id)


def choose_device(name: str) -> torch.device:
    """The torch device for cpu, cuda or auto."""
    cuda = torch.cuda.is_available()
    if name not in ("cpu", "cuda", "auto"):
        raise Refused("DEVICE_UNAVAILABLE", f"{name[:40]!r} is not a device.", "Use cpu, cuda or auto.", value=name)
    if name == "cuda" and not cuda:
        raise Refused("DEVICE_UNAVAILABLE", "no CUDA device is to be seen here.", "Use `--device cpu`.", value=name)
    return torch.device("cuda" if cuda and name != "cpu" else "cpu")


def _watched(plan: Plan, sources: Mapping[ModelRef, LocalFiles]) -> Watch:
    """The plan was made from headers; hold the folders against them, now and at the end."""
    headers = {source.model.bare: source.headers for source in plan.sources}
    for ref in headers:
        if ref not in sources:
            raise Refused("SOURCE_NOT_FOUND", f"no folder was given for {ref}.", "Fetch it first.", value=str(ref))
    return Watch(sources, headers)


def _run_steps(
    plan: Plan,
    sources: Mapping[ModelRef, LocalFiles],
    writer: Writer,
    device: torch.device,
    progress: Progress | None,
    on_nonfinite: NonFinite,
    threads: int,
) -> None:
    """Read, compute and write the steps that are not done, `threads` at a time, reporting them in order."""

    def carry_out(step: Step) -> None:
        computed = _compute(step, _read(step.work, sources), sources, device, on_nonfinite)
        writer.write(step, computed.data.numpy().data, computed.nonfinite)

    todo = [step for step in plan.steps if step.index not in writer.done]
    done_bytes = plan.bytes_out - sum(step.nbytes for step in todo)
    before = torch.get_num_threads()
    # one torch thread per worker: how torch splits a tensor among threads would show in the last bits
    pool = ThreadPoolExecutor(threads, "merge", initializer=torch.set_num_threads, initargs=(1,))
    try:
        waiting: deque[tuple[Step, Future[None]]] = deque()
        for step in [*todo, *[None] * threads]:
            if step is not None:
                waiting.append((step, pool.submit(carry_out, step)))
            if waiting and (step is None or len(waiting) > threads):
                finished, future = waiting.popleft()
                future.result()
                done_bytes += finished.nbytes
                if progress is not None:
                    progress(done_bytes, plan.bytes_out, finished.name)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)
    writer.sync()


def _read(work: Work, sources: Mapping[ModelRef, LocalFiles]) -> list[Tensor]:
    out = []
    for operand in work.reads:
        tensor = operand.tensor
        raw = torch.empty(tensor.nbytes, dtype=torch.uint8)
        if sources[operand.model].read_into(tensor.file, tensor.start, raw.numpy().data) != tensor.nbytes:
            raise Failed(
                "SOURCE_CHANGED_OR_GONE", f"{tensor.file} of {operand.model} ends inside {tensor.name}.",
                "The source was changed or cut while merging: fetch it again.", value=tensor.name,
            )  # fmt: skip
        out.append(raw)
    return out


def _compute(
    step: Step,
    raw: list[Tensor],
    sources: Mapping[ModelRef, LocalFiles],
    device: torch.device,
    on_nonfinite: NonFinite,
) -> _Computed:
    work = step.work
    if work.action == "equal":
        if any(not torch.equal(raw[0], other) for other in raw[1:]):
            raise Failed(
                "SHAPE_MISMATCH", f"{step.name} is not floating point and differs between the sources.",
                "Use models that agree on it.", value=step.name,
            )  # fmt: skip
        return _Computed(step, raw[0], {})
    stored = [
        data.view(getattr(torch, operand.tensor.dtype.name)).reshape(operand.tensor.shape)
        for data, operand in zip(raw, work.reads, strict=True)
    ]
    wide = torch.float64 if any(t.dtype == torch.float64 for t in stored) else torch.float32
    stored = [_through(operand, data, sources, wide) for operand, data in zip(work.reads, stored, strict=True)]
    nonfinite = _count_nonfinite(work, stored)
    if nonfinite and on_nonfinite == "fail":
        source, count = next(iter(nonfinite.items()))
        raise Failed(
            "NOT_FINITE", f"{step.name} has {count} NaN or infinite values in {source}.",
            "Use another source: such weights spoil whatever they are merged into.", value=step.name,
        )  # fmt: skip
    if work.aligned is not None:
        stored = gather(work.aligned.maps, [tensor.to(wide) for tensor in stored])
    spoilt = _spoilt(stored) if nonfinite else None
    target = getattr(torch, work.dtype.name)
    if work.action == "copy":
        result = stored[0].to(target)
    elif spoilt is None and device.type == "cpu" and can_stream(work):
        result = merge_chunked(work, stored, wide, target).reshape(work.shape)
    else:
        result = _merged(work, [tensor.to(device, wide) for tensor in stored], spoilt).to(target).to("cpu")
    result = result.contiguous()
    if not _finite(result) and not bool((torch.isfinite(result) | (spoilt if spoilt is not None else False)).all()):
        raise Failed(
            "NOT_FINITE", f"{step.name} overflows {work.dtype.name}, though its inputs are finite.",
            "Use a wider `out_dtype` such as bfloat16 or float32, or smaller weights.", value=step.name,
        )  # fmt: skip
    return _Computed(step, result.reshape(-1).view(torch.uint8), nonfinite)


def _through(operand: Operand, stored: Tensor, sources: Mapping[ModelRef, LocalFiles], wide: torch.dtype) -> Tensor:
    """The tensor seen through its adapter."""
    if operand.patch is None:
        return stored
    files = sources[operand.patch.adapter]
    view = PatchedView(HeldView(stored, wide), operand.patch, lambda tensor: stored_tensor(files, tensor, wide))
    return view.read(0, stored.numel()).reshape(stored.shape)


def _spoilt(tensors: list[Tensor]) -> Tensor:
    """Where any input is NaN or infinite."""
    spoilt = torch.zeros_like(tensors[0], dtype=torch.bool)
    for tensor in tensors:
        spoilt |= ~torch.isfinite(tensor)
    return spoilt


def _merged(work: Work, tensors: list[Tensor], spoilt: Tensor | None) -> Tensor:
    """Apply the method. A non-finite element stays in its place: it takes part in no norm, sum or ranking."""
    if spoilt is None:
        return apply(work.method, tensors, work.base, work.per_input, work.shared, work.keys)
    spoilt = spoilt.to(tensors[0].device)
    clean = [tensor.masked_fill(spoilt, 0.0) for tensor in tensors]
    result = apply(work.method, clean, work.base, work.per_input, work.shared, work.keys).clone()
    result[spoilt] = torch.stack([tensor[spoilt] for tensor in tensors]).sum(0)
    return result


def _finite(tensor: Tensor) -> bool:
    """Whether every element surely is finite: one cheap sum. False means that a closer look is due."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32)))


def _count_nonfinite(work: Work, stored: list[Tensor]) -> dict[str, int]:
    out: dict[str, int] = {}
    for operand, tensor in zip(work.reads, stored, strict=True):
        if not _finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                out[str(operand.source)] = bad
    return out


def _nonfinite_notices(plan: Plan, done: Mapping[int, Record]) -> tuple[Notice, ...]:
    found: dict[str, tuple[str, int]] = {}
    for index in sorted(done):
        for source, count in done[index].nonfinite.items():
            first, sum_ = found.get(source, (plan.steps[index].name, 0))
            found[source] = (first, sum_ + count)
    return tuple(
        Notice("NOT_FINITE", f"{source} has NaN or infinite values, the first in {name}", count)
        for source, (name, count) in found.items()
    )


def _complete(
    plan: Plan,
    sources: Mapping[ModelRef, LocalFiles],
    writer: Writer,
    notices: tuple[Notice, ...],
    device: torch.device,
    known: Callable[[], Known] | None,
) -> tuple[dict[str, FileFact], str]:
    """Everything that stands beside the weights; the manifest last."""
    files = writer.hash_shards()
    if len(plan.shards) > 1:
        weight_map = {step.name: plan.shards[step.shard].file for step in plan.steps}
        index = {"metadata": {"total_size": plan.bytes_out}, "weight_map": dict(sorted(weight_map.items()))}
        files[INDEX] = writer.add(INDEX, (json.dumps(index, indent=2) + "\n").encode())
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
    facts = provenance(plan, files, notices, device.type, torch.__version__, known() if known else None)
    files["merge_provenance.json"] = writer.add("merge_provenance.json", facts)
    fact = writer.add("manifest.json", manifest(files))
    return {**files, "manifest.json": fact}, fact.sha256
