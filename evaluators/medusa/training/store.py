"""Content-addressed store of training data: answers of a model and the hidden states that predicted them.

ROOT/<key>.safetensors            one batch of answers; the key is a hash of all inputs
ROOT/<key>.safetensors.<pid>.part an unfinished file; renamed when it is complete and synced

Files are memory-mapped. Above the size limit the least recently used files are deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bot.storage import move_into_place

LIMIT_BYTES = 8 << 30
ABANDONED_S = 24 * 3600.0


def key_of(value: Any) -> str:
    """A hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def save(tensors: Mapping[str, Tensor], file: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write a safetensors file atomically; `facts` (JSON) are stored in its header."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, str(part), metadata={"facts": json.dumps(facts or {})})
        move_into_place(part, file)
    finally:
        part.unlink(missing_ok=True)


def load(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(mapped tensors, facts) of a file that `save` wrote; None for a missing or damaged file."""
    try:
        with safe_open(str(file), framework="pt") as opened:
            facts = json.loads((opened.metadata() or {}).get("facts", "{}"))
            return {name: opened.get_tensor(name) for name in opened.keys()}, facts  # noqa: SIM118
    except (OSError, SafetensorError, ValueError):
        return None


class Store:
    """Tensors by key below one folder."""

    def __init__(self, root: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self._root, self._limit_bytes = root, limit_bytes

    def get(self, key: str) -> dict[str, Tensor] | None:
        file = self._file(key)
        with contextlib.suppress(OSError):  # another process may be making room, or the folder be somebody else's
            os.utime(file)  # used last: goes last
        found = load(file)
        return None if found is None else found[0]

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        self._make_room(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
        save(tensors, self._file(key))

    def _file(self, key: str) -> Path:
        return self._root / f"{key}.safetensors"

    def _make_room(self, coming: int) -> None:
        """Delete the least recently used files. A process keeps a deleted file mapped until it closes it."""
        if not self._root.is_dir():
            return
        for part in self._root.glob("*.part"):  # of a process that was killed
            if (age := _stat(part)) is not None and time.time() - age.st_mtime > ABANDONED_S:
                part.unlink(missing_ok=True)
        known = [(at.st_mtime, at.st_size, file) for file in self._root.glob("*.safetensors") if (at := _stat(file))]
        total = coming + sum(size for _, size, _ in known)
        for _, size, file in sorted(known):
            if total <= self._limit_bytes:
                return
            file.unlink(missing_ok=True)
            total -= size


def _stat(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except FileNotFoundError:  # another process made room
        return None


class Rows:
    """Concatenation of [n, H] tensors without a copy; a slice or a list of rows is a new tensor."""

    def __init__(self, parts: list[Tensor], width: int) -> None:
        self._parts = [part for part in parts if len(part)]
        self._width = width
        self._ends = torch.tensor([len(part) for part in self._parts], dtype=torch.long).cumsum(0)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._parts else 0

    def __getitem__(self, wanted: slice | Tensor) -> Tensor:
        at = torch.arange(len(self))[wanted] if isinstance(wanted, slice) else wanted.cpu()
        found = torch.empty((len(at), self._width), dtype=torch.float32)
        places = torch.bucketize(at, self._ends, right=True)
        for place in sorted(set(places.tolist())):
            mine = (places == place).nonzero().squeeze(-1)
            part = self._parts[place]
            found[mine] = part[at[mine] - (int(self._ends[place]) - len(part))].float()
        return found


class Checkpoint:
    """State file of an unfinished training and the interval at which it is replaced."""

    def __init__(self, file: Path, identity: str, every_s: float, saved: Callable[[int], None] | None = None) -> None:
        self._file, self._identity, self._every_s = file, identity, every_s
        self._saved, self._last = saved, time.monotonic()

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """State saved last by a training with the same identity, or None."""
        found = load(self._file)
        if found is None or found[1].get("identity") != self._identity:
            return None
        return {name: tensor.clone() for name, tensor in found[0].items()}, found[1]

    def due(self) -> bool:
        return time.monotonic() - self._last >= self._every_s

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        save(tensors, self._file, {**facts, "identity": self._identity})
        self._last = time.monotonic()
        if self._saved is not None:
            self._saved(int(facts["step"]))
