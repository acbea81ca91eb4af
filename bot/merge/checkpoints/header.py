"""The header of one safetensors file: bytes -> tensors, or a refusal. docs/design/reliability.md 3.2 and 4.2.

What we accept, the safetensors library accepts too; we refuse more: duplicate keys, oversized headers, hostile
names, extra keys. Headers are checked here only.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from bot.errors import Refused
from bot.merge.recipe.dtypes import BY_CODE, Dtype

_STRICT_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,256}")


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a checkpoint: `UNTRUSTED` (untrusted) and `TRUSTED` (trusted), docs/design/architecture.md."""

    header_bytes: int
    tensors: int
    strict: bool  # allow-listed names, no empty dimensions, no remote code, exact totals
    index_bytes: int = 8 * 2**20
    config_bytes: int = 4 * 2**20
    metadata_bytes: int = 64 * 2**10
    rank: int = 8
    dimension: int = 2**31
    shards: int = 1_000
    layers: int = 1_000  # of one output
    source_tensors: int = 1_000_000  # visited by planning, over all documents of a recipe


UNTRUSTED = Limits(header_bytes=8 * 2**20, tensors=50_000, strict=True)
TRUSTED = Limits(
    header_bytes=100_000_000,
    tensors=1_000_000,
    strict=False,
    index_bytes=100_000_000,
    shards=100_000,
    layers=100_000,
    source_tensors=20_000_000,
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes at `start` (from the beginning of the file) of `file`."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int

    @property
    def elements(self) -> int:
        return self.nbytes // self.dtype.itemsize


class _Bad(Exception):
    """A header that is refused; its text continues the sentence."""


def header_length(file: str, first_bytes: bytes, file_size: int, limits: Limits) -> int:
    """Length in bytes of the JSON header, from the first 8 bytes of the file."""
    if len(first_bytes) < 8 or file_size < 8:
        refuse(file, f"has {file_size} bytes, which is too short for a safetensors file.")
    length = int.from_bytes(first_bytes[:8], "little")
    if length > limits.header_bytes:
        refuse(file, f"announces a header of {length:,} bytes; the limit is {limits.header_bytes:,}.")
    if length > file_size - 8:
        refuse(file, f"is truncated: its header needs {length + 8:,} bytes, the file has {file_size:,}.")
    return length


def parse(file: str, raw: bytes, file_size: int, limits: Limits) -> dict[str, TensorInfo]:
    """The tensors of `file` by name, in order of their offsets. `raw` is the header without its length.

    Raises `Refused(BAD_CHECKPOINT)` naming the file.
    """
    try:
        entries = _load(raw, limits)
        metadata = entries.pop("__metadata__", None)
        _metadata({} if metadata is None else metadata, limits)
        tensors = [_tensor(file, name, entry, limits) for name, entry in entries.items()]
    except _Bad as bad:
        refuse(file, str(bad))
    if not tensors:
        refuse(file, "holds no tensors.")
    tensors.sort(key=lambda t: (t.start, t.nbytes))
    at = 0
    for tensor in tensors:
        if tensor.start != at:
            refuse(file, f"has a {'hole' if tensor.start > at else 'overlap'} before `{tensor.name}`.")
        at += tensor.nbytes
    data = 8 + len(raw)
    if data + at != file_size:
        how = "is truncated" if data + at > file_size else "has bytes after its last tensor"
        refuse(file, f"{how}: its header describes {data + at:,} bytes, the file has {file_size:,}.")
    return {t.name: TensorInfo(t.name, t.dtype, t.shape, file, t.start + data, t.nbytes) for t in tensors}


def refuse(file: str, what: str) -> NoReturn:
    """Refuse a file as a checkpoint: `what` continues the sentence that starts with its name."""
    next_step = "Download it again, or ask its author for a whole safetensors file."
    raise Refused("BAD_CHECKPOINT", f"{file} {what}", next_step, value=file)


def _load(raw: bytes, limits: Limits) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise _Bad("does not begin with a safetensors header.")
    objects = 0

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal objects
        objects += 1
        if objects > limits.tensors + 2:
            raise _Bad(f"has more than {limits.tensors:,} tensors.")
        out = dict(items)
        if len(out) != len(items):
            names = [name for name, _ in items]
            twice = next(name for name in names if names.count(name) > 1)
            raise _Bad(f"describes {_quoted(twice)} twice.")
        return out

    def integer(digits: str) -> int:
        if digits.startswith("-") or len(digits) > 20:
            raise _Bad("has a number out of range in its header.")
        return int(digits)

    def no_float(_: str) -> NoReturn:
        raise _Bad("has a number in its header that is not whole.")

    try:
        text = raw.decode("utf-8")
        loaded = json.loads(
            text, object_pairs_hook=pairs, parse_int=integer, parse_float=no_float, parse_constant=no_float
        )
    except (ValueError, RecursionError):
        raise _Bad("has a header that is not JSON.") from None
    if not isinstance(loaded, dict):
        raise _Bad("has a header that is not a JSON object.")
    return loaded


def _metadata(metadata: object, limits: Limits) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Bad("has metadata that is not text.")
    try:
        size = sum(len(k.encode()) + len(v.encode()) for k, v in metadata.items())
    except UnicodeEncodeError:
        raise _Bad("has metadata that is not valid text.") from None
    if size > limits.metadata_bytes:
        raise _Bad(f"carries {size:,} bytes of metadata; the limit is {limits.metadata_bytes:,}.")


def _tensor(file: str, name: str, entry: object, limits: Limits) -> TensorInfo:
    """One entry, its start still relative to the data section."""
    if not _name_ok(name, limits):
        raise _Bad(f"has a tensor with the name {_quoted(name)}.")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Bad(f"does not say dtype, shape and data_offsets of {_quoted(name)}.")
    code, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = BY_CODE.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise _Bad(f"stores {_quoted(name)} as {_quoted(str(code))}, which is not a type we read.")
    if not _whole(shape) or len(shape) > limits.rank or any(d > limits.dimension for d in shape):
        raise _Bad(f"gives {_quoted(name)} a shape out of range.")
    if limits.strict and 0 in shape:
        raise _Bad(f"has the empty tensor {_quoted(name)}.")
    if not _whole(span) or len(span) != 2 or span[0] > span[1]:
        raise _Bad(f"gives {_quoted(name)} offsets out of range.")
    elements = 1
    for dimension in shape:
        elements *= dimension
        if elements >= 2**63:
            raise _Bad(f"gives {_quoted(name)} a shape out of range.")
    if span[1] - span[0] != elements * dtype.itemsize:
        raise _Bad(
            f"gives {_quoted(name)} {span[1] - span[0]:,} bytes where its shape needs {elements * dtype.itemsize:,}."
        )
    return TensorInfo(name, dtype, tuple(shape), file, span[0], span[1] - span[0])


def _whole(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _name_ok(name: str, limits: Limits) -> bool:
    if limits.strict:
        return bool(_STRICT_NAME.fullmatch(name))
    return 0 < len(name) <= 1024 and name.isprintable()


def _quoted(text: str) -> str:
    return "`" + text[:80].encode("unicode_escape").decode().replace("`", "'") + "`"
