"""Conversion of trusted pickled weights to safetensors in a child process, stored by their content.

CACHE/<sha256 of every file>/      a model folder
CACHE/<sha256 ...>.<pid>.partial/  a model folder under construction, renamed when complete
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from bot.errors import Failed, Refused
from bot.merge.checkpoints.checkpoint import INDEX, LocalFiles, read_json, shard_like
from bot.merge.checkpoints.header import TRUSTED
from bot.merge.checkpoints.pickled import REFUSED, converted_name, pickles
from bot.settings import Settings, child_environment
from bot.storage import sha256_file, sync_tree

TIME_LIMIT_S = 3600.0
MEMORY_BYTES = 6 * 2**30  # on top of twice the largest file, which is mapped
SMALL_BYTES = 64 * 2**20
_SMALL = (".json", ".txt", ".model", ".jinja")
_PICKLED_INDEX = "pytorch_model.bin.index.json"


def as_safetensors(folder: Path, settings: Settings) -> Path:
    """`folder`, or its safetensors conversion if it holds only pickled weights.

    Raises `Refused` BAD_CHECKPOINT if a file holds anything but tensors; `Failed` TIME_LIMIT, MEMORY_LIMIT.
    """
    files = LocalFiles(folder)
    sizes = files.sizes()
    wanted = pickles(sizes)
    if not wanted or any(shard_like(name) or name == "adapter_model.safetensors" for name in sizes):
        return folder
    small = sorted(name for name, size in sizes.items() if name.endswith(_SMALL) and size <= SMALL_BYTES)
    place = settings.home / "cache" / "unpickled" / _digest(files, [*small, *wanted])
    if place.is_dir():
        return place
    names = [converted_name(name) for name in wanted]
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise Refused(
            "BAD_CHECKPOINT", f"{folder}: two of its pickled files would both become {twice}.",
            "Leave one of them in the folder.", value=twice,
        )  # fmt: skip
    partial = place.with_name(f"{place.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name in small:
            if name != _PICKLED_INDEX:
                shutil.copyfile(files.locate(name), partial / name)
        _run([files.locate(name) for name in wanted], partial, folder, settings)
        _write_index(files, sizes, partial)
        sync_tree(partial)
        try:
            partial.rename(place)
        except OSError:
            if not place.is_dir():  # else another process made the same from the same files meanwhile
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return place


def _run(sources: list[Path], into: Path, folder: Path, settings: Settings) -> None:
    memory = MEMORY_BYTES + 2 * max(source.stat().st_size for source in sources)
    command = [sys.executable, "-P", "-m", "bot.merge.checkpoints.pickled", str(into), str(memory), *map(str, sources)]
    try:
        done = subprocess.run(
            command, env=child_environment(settings, "worker"), stdin=subprocess.DEVNULL, capture_output=True,
            timeout=TIME_LIMIT_S, start_new_session=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Failed(
            "TIME_LIMIT", f"reading the pickled weights of {folder} took longer than {TIME_LIMIT_S:.0f} s.",
            "Use safetensors.",
        ) from None  # fmt: skip
    if done.returncode == REFUSED:
        told = json.loads(done.stdout.splitlines()[-1])
        raise Refused(told["code"], f"{folder}: {told['message']}", told["next"], value=told["value"])
    if done.returncode:
        raise Failed(
            "MEMORY_LIMIT" if b"MemoryError" in done.stderr or done.returncode < 0 else "INTERNAL",
            f"the process that read the pickled weights of {folder} ended with status {done.returncode}.",
            "Use safetensors.", value=str(folder),
        )  # fmt: skip


def _write_index(files: LocalFiles, sizes: dict[str, int], into: Path) -> None:
    """The index of several shards, with the names their files have now."""
    if _PICKLED_INDEX not in sizes:
        return
    index, _ = read_json(files, sizes, _PICKLED_INDEX, str(files), TRUSTED)
    mapped = index.get("weight_map")
    if not isinstance(mapped, dict) or not all(isinstance(shard, str) for shard in mapped.values()):
        raise Refused("BAD_CHECKPOINT", f"{files}: {_PICKLED_INDEX} has no weight_map.", "Use safetensors.")
    renamed = {name: converted_name(shard) for name, shard in mapped.items()}
    (into / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": renamed}))


def _digest(files: LocalFiles, names: list[str]) -> str:
    whole = hashlib.sha256()
    for name in names:
        whole.update(f"{name}\0{sha256_file(files.locate(name))}\n".encode())
    return whole.hexdigest()
