"""A checkpoint as described by its headers: config, tensors, shards. Reads no weights and imports no torch.

All bytes come through `Files`, so a folder and a Hub repo at a commit (`bot.hub`) look the same. Rules:
docs/design/reliability.md 4.2 and 4.3. Refused are pickled weights, truncated or hostile headers, shard names that
leave the folder, and quantised weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bot.errors import Failed, Refused
from bot.merge.checkpoints.header import TRUSTED, UNTRUSTED, Limits, TensorInfo, header_length, parse, refuse
from bot.merge.checkpoints.model_files import NAMED_TEMPLATES
from bot.merge.checkpoints.ties import as_loaded
from bot.merge.checkpoints.weight_files import (
    INDEX,
    SHARD_NAME,
    against_index,
    beside,
    require_usual_name,
    shard_like,
    shards_without_index,
    weight_file,
)

if TYPE_CHECKING:
    from bot.merge.checkpoints.patches import Patch
    from bot.merge.recipe.spec import ModelRef

__all__ = [
    "INDEX",
    "TRUSTED",
    "UNTRUSTED",
    "Checkpoint",
    "Files",
    "Limits",
    "LocalFiles",
    "TensorInfo",
    "open_checkpoint",
    "shard_like",
]

DEPTH = 64  # levels of nesting in a JSON file; what comes later walks them by recursion
_QUANTISED = (".qweight", ".qzeros", ".g_idx", ".absmax", ".quant_map", ".weight_scale_inv", ".SCB", ".weight_packed")


class Files(Protocol):
    """The files of one model at one commit. `str(files)` names the model in a sentence."""

    def sizes(self) -> dict[str, int]:
        """Name -> size in bytes of every file, names relative with `/`."""
        ...

    def read(self, name: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`, fewer only at the end of the file."""
        ...


class LocalFiles:
    """A folder on this machine. Links are followed only inside the folder or its own cache entry."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            next_step = "Check the name: a local folder, or owner/name on the Hub."
            raise Refused("SOURCE_NOT_FOUND", f"There is no model folder {self.path}.", next_step, value=str(self.path))
        real = self.path.resolve()
        # a snapshot of the Hub's cache links to ../../blobs of the same repo
        in_cache = real.parent.name == "snapshots" and (real.parent.parent / "blobs").is_dir()
        self._root = real.parent.parent if in_cache else real

    def __str__(self) -> str:
        return str(self.path)

    def sizes(self) -> dict[str, int]:
        top = {entry.name: entry.stat().st_size for entry in self.path.iterdir() if entry.is_file()}
        named = (entry for entry in self.path.glob(f"{NAMED_TEMPLATES}/*.jinja") if entry.is_file())
        return top | {f"{NAMED_TEMPLATES}/{entry.name}": entry.stat().st_size for entry in named}

    def locate(self, name: str) -> Path:
        """Real path of a file; refused if it is outside the folder."""
        real = (self.path / name).resolve()
        inner = name.removeprefix(f"{NAMED_TEMPLATES}/")
        if "/" in inner or "\\" in inner or not real.is_relative_to(self._root):
            message = f"{name[:80]!r} leads out of the folder {self.path}."
            raise Refused("BAD_SHARD_NAME", message, "Put the file itself into the folder.", value=name)
        return real

    def read(self, name: str, start: int, length: int) -> bytes:
        buffer = bytearray(length)
        return bytes(buffer[: self.read_into(name, start, memoryview(buffer))])

    def read_into(self, name: str, start: int, buffer: memoryview) -> int:
        """Fill a writable buffer with bytes from `start`; returns their number."""
        try:
            handle = os.open(self.locate(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            message = f"{name} of {self.path} cannot be read: {os.strerror(error.errno or 0)}."
            next_step = "Check that the file is there and that you may read it."
            raise Failed("SOURCE_CHANGED_OR_GONE", message, next_step, value=name) from None
        try:
            filled = 0
            while filled < len(buffer) and (count := os.preadv(handle, [buffer[filled:][: 2**26]], start + filled)):
                filled += count
            return filled
        finally:
            os.close(handle)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One source, as described by its headers. `headers` is shard -> (file bytes, SHA-256 of length and header).

    `config` and `tensors` are those of the loaded model (`ties.as_loaded`); `presumed` are pairs of tied tensors (kept,
    left out) of which only samples were compared. With an adapter, some tensors have `patches`, and the bytes of
    others, and of some files, are `elsewhere`.
    """

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    headers: Mapping[str, tuple[int, str]]
    sizes: Mapping[str, int]
    files: Files
    notices: tuple[str, ...] = ()
    patches: Mapping[str, Patch] = field(default_factory=dict)
    elsewhere: Mapping[str, ModelRef] = field(default_factory=dict)
    presumed: tuple[tuple[TensorInfo, TensorInfo], ...] = ()

    @property
    def header_ends(self) -> dict[str, int]:
        """Shard -> bytes before its first tensor: the length and the header."""
        ends: dict[str, int] = {}
        for tensor in self.tensors.values():
            if tensor.file not in self.headers:
                continue  # an adapter's, which lies in another folder
            ends[tensor.file] = min(tensor.start, ends.get(tensor.file, tensor.start))
        return ends

    def text(self, name: str, limit_bytes: int = 64 * 2**20) -> str | None:
        """A small file as text; None if missing. Refused if larger than `limit_bytes`."""
        return _text(self.files, self.sizes, name, limit_bytes)

    def document(self, name: str) -> dict[str, Any] | None:
        """A small JSON file; None if missing. Refused if it is not a JSON object that can be written again."""
        text = self.text(name)
        return None if text is None else _json_object(text, f"{self.name}: {name}")


def open_checkpoint(
    files: Files, *, limits: Limits = TRUSTED, name: str | None = None, unwritten: bool = False
) -> Checkpoint:
    """Read config, index and the header of every shard; refuse what cannot be merged safely.

    `name` is used in messages (default `str(files)`). The bytes of tied tensors are compared, unless the weights are
    still `unwritten`: the merge engine writes no tied tensor twice. Raises `bot.errors.Refused` with BAD_CHECKPOINT,
    BAD_SHARD_NAME, SOURCE_NOT_SAFETENSORS, NEEDS_REMOTE_CODE, NOT_SUPPORTED, SOURCE_NOT_FOUND or TENSOR_MISSING.
    """
    label = name or str(files)
    sizes = files.sizes()
    notices: list[str] = []
    config = _config(files, sizes, label, limits, notices)
    indexed = weight_file(sizes) == INDEX
    require_usual_name(config, sizes, label)
    mapped, total = _index(files, sizes, label, limits, notices) if indexed else ({}, None)
    shards = sorted(set(mapped.values())) if indexed else shards_without_index(sizes, label)
    if len(shards) > limits.shards:
        refuse(label, f"is split over {len(shards):,} shards; the limit is {limits.shards:,}.")
    tensors, headers = _every_header(files, sizes, shards, label, limits, notices)
    if indexed:
        notices += against_index(label, mapped, total, tensors, limits)
    notices += beside(sizes, shards, label)
    _refuse_quantised(label, config, tensors)
    if unwritten:
        return Checkpoint(label, config, tensors, headers, sizes, files, tuple(notices))
    loaded = as_loaded(files.read, label, config, tensors, thorough=isinstance(files, LocalFiles))
    notices += loaded.notices
    return Checkpoint(
        label, loaded.config, loaded.tensors, headers, sizes, files, tuple(notices), presumed=loaded.presumed
    )


def _every_header(
    files: Files, sizes: Mapping[str, int], shards: Sequence[str], label: str, limits: Limits, notices: list[str]
) -> tuple[dict[str, TensorInfo], dict[str, tuple[int, str]]]:
    """The tensors of all shards by name, and size and header hash of each shard."""
    tensors: dict[str, TensorInfo] = {}
    headers: dict[str, tuple[int, str]] = {}
    for shard in shards:
        shard_tensors, digest = read_header(files, shard, sizes.get(shard), label, limits)
        headers[shard] = (sizes[shard], digest)
        for tensor in shard_tensors.values():
            if tensor.name in tensors:
                repeats = f"repeats `{tensor.name}`, which {tensors[tensor.name].file} has too."
                if limits.strict:
                    refuse(f"{label}: {shard}", repeats)
                notices.append(f"{label}: {shard} {repeats} The later one counts, as in transformers.")
            tensors[tensor.name] = tensor
        if len(tensors) > limits.tensors:
            refuse(label, f"has more than {limits.tensors:,} tensors.")
    return tensors, headers


def read_header(
    files: Files, shard: str, size: int | None, label: str, limits: Limits
) -> tuple[dict[str, TensorInfo], str]:
    """Tensors of one shard and the SHA-256 of its length and header bytes."""
    where = f"{label}: {shard}"
    if size is None:
        refuse(where, "is named by the index but is not there.")
    first = files.read(shard, 0, 8)
    length = header_length(where, first, size, limits)
    raw = files.read(shard, 8, length)
    if len(raw) != length:
        refuse(where, f"is truncated: its header ends after {len(raw):,} of {length:,} bytes.")
    try:
        tensors = parse(shard, raw, size, limits)
    except Refused as error:
        raise Refused(error.code, f"{label}: {error.message}", error.next_step, value=error.value) from None
    return tensors, hashlib.sha256(first + raw).hexdigest()


def _text(files: Files, sizes: Mapping[str, int], name: str, limit_bytes: int) -> str | None:
    if name not in sizes:
        return None
    if sizes[name] > limit_bytes:
        refuse(f"{files}: {name}", f"has {sizes[name]:,} bytes; the limit is {limit_bytes:,}.")
    try:
        return files.read(name, 0, sizes[name]).decode("utf-8")
    except UnicodeDecodeError:
        refuse(f"{files}: {name}", "is not UTF-8 text.")


def _json_object(text: str, where: str, notices: list[str] | None = None) -> dict[str, Any]:
    """A JSON object. The last value of a doubled key counts, with a notice; without `notices` it is refused."""

    def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(items)
        if len(out) != len(items) and notices is None:
            refuse(where, "gives a key twice.")
        if len(out) != len(items) and notices is not None:
            seen: set[str] = set()
            twice = next(name for name, _ in items if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            notices.append(f"{where} gives `{twice[:80]}` twice; the last value counts, as in transformers")
        return out

    try:
        loaded = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        refuse(where, "is not JSON.")
    if not isinstance(loaded, dict):
        refuse(where, "is not a JSON object.")
    if nests_deeper(loaded):
        refuse(where, f"is nested more than {DEPTH} levels deep.")
    try:  # \\ud800 is a character in JSON, but in no file
        json.dumps(loaded, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        refuse(where, "holds half a character (a lone surrogate).")
    return loaded


def nests_deeper(value: object, depth: int = DEPTH) -> bool:
    """True if lists and objects nest deeper than `depth` levels."""
    level: list[object] = [value]
    for _ in range(depth):
        parts = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [inner for part in parts for inner in part]
        if not level:
            return False
    return True


def read_json(
    files: Files, sizes: Mapping[str, int], name: str, label: str, limits: Limits
) -> tuple[dict[str, Any], str]:
    """A JSON object of a source and its text. Refuses doubled keys, large files and other values."""
    text = _text(files, sizes, name, limits.index_bytes if name.endswith(".index.json") else limits.config_bytes)
    if text is None:
        refuse(label, f"has no {name}.")
    return _json_object(text, f"{label}: {name}"), text


def _config(files: Files, sizes: Mapping[str, int], label: str, limits: Limits, notices: list[str]) -> dict[str, Any]:
    text = _text(files, sizes, "config.json", limits.config_bytes)
    if text is None and "adapter_config.json" in sizes:
        message = f"{label} is a LoRA adapter, not a model."
        raise Refused("NOT_SUPPORTED", message, "Write MODEL+ADAPTER in the recipe.", value=label)
    if text is None:
        message = f"{label} {'has no config.json' if sizes else 'holds no files'}."
        next_step = "Name the folder or repo that holds config.json and the weights."
        raise Refused("BAD_CHECKPOINT" if sizes else "SOURCE_NOT_FOUND", message, next_step, value=label)
    config = _json_object(text, f"{label}: config.json", None if limits.strict else notices)
    if limits.strict and "auto_map" in config:
        message = f"{label} ships its own modelling code; the bot never runs it."
        next_step = "Use a model of an architecture that transformers itself has."
        raise Refused("NEEDS_REMOTE_CODE", message, next_step, value=label)
    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        refuse(f"{label}: config.json", "has a model_type that is not text.")
    return config


def _index(
    files: Files, sizes: Mapping[str, int], label: str, limits: Limits, notices: list[str]
) -> tuple[dict[str, str], int | None]:
    """Tensor -> shard, and the bytes of all tensors if the index has them."""
    where = f"{label}: {INDEX}"
    text = _text(files, sizes, INDEX, limits.index_bytes)
    assert text is not None
    index = _json_object(text, where, None if limits.strict else notices)
    mapped = index.get("weight_map")
    if not isinstance(mapped, dict) or not mapped:
        refuse(where, "has no weight_map.")
    for name, shard in mapped.items():
        if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard) or ".." in shard:
            message = f"{where} puts `{name[:80]}` into {str(shard)[:80]!r}, not a plain file name."
            next_step = "A shard must be a .safetensors file in the same folder."
            raise Refused("BAD_SHARD_NAME", message, next_step, value=str(shard))
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return mapped, total if isinstance(total, int) else None


def _refuse_quantised(label: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    scheme = config.get("quantization_config")
    quantised = next((t.name for t in tensors.values() if t.dtype.quantised or t.name.endswith(_QUANTISED)), None)
    if not scheme and quantised is None:
        return
    how = scheme.get("quant_method") if isinstance(scheme, dict) else None
    message = f"{label} is quantised ({how or quantised or 'see its config'}); rounded weights cannot be merged."
    raise Refused("NOT_SUPPORTED", message, "Use the unquantised model it was made from.", value=label)
