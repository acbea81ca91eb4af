"""Reading of an untrusted head checkpoint: sizes and headers are checked first, tensors are read on demand.

    medusa_lm_head.safetensors        ours, V1, V2, TGI
    medusa_lm_head.pt                 V1 as first published: a pickle, from which only tensors are read
    model.safetensors, or its shards  vLLM, or a full model with heads inside (Medusa-2)
    medusa/...                        heads in the repo of a merged model

A pickle can run code. It is opened only under that one name, only as a zip archive of torch without compression, and
only by the restricted unpickler of torch (`weights_only=True`: tensors and plain containers).
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bot.errors import EvaluationError

WEIGHTS = "medusa_lm_head.safetensors"
PICKLED = "medusa_lm_head.pt"
MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
CARRIED = "medusa"
LIMIT_BYTES = 16 << 30
HEADER_LIMIT_BYTES = 8 << 20
PICKLE_LIMIT_BYTES = 4 << 20
JSON_LIMIT_BYTES = 16 << 20
TENSOR_LIMIT = 50_000
INSIDE = "medusa_head."  # prefix of the tensors of heads in a full model
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class Stored:
    """Shapes and types of the tensors of a head checkpoint; `read` loads one. An unknown type is None."""

    folder: Path
    file: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype | None]
    read: Callable[[str], Tensor]


def find(folder: Path) -> Stored:
    """Find the head checkpoint in `folder`. Raises EvaluationError BAD_HEADS with the reason."""
    place = folder / CARRIED if (folder / CARRIED / WEIGHTS).is_file() else folder
    if (place / WEIGHTS).is_file():
        return _safetensors(place, [WEIGHTS])
    if (place / PICKLED).is_file():
        return _pickled(place / PICKLED)
    if (place / INDEX).is_file():
        return _safetensors(place, _shards(place / INDEX), inside=True)
    if (place / MODEL).is_file():
        return _safetensors(place, [MODEL])
    if any(place.glob("pytorch_model*.bin")):
        raise refused(
            f"{folder.name} is a full model in pickled files, and {PICKLED} is the only pickle that is read.",
            "Save the model as safetensors first.",
        )
    raise refused(f"There is no {WEIGHTS} in {folder.name}.", f"Give a folder with {WEIGHTS}, {PICKLED} or {MODEL}.")


def config(folder: Path) -> dict[str, Any]:
    """Contents of the config.json of the heads; empty if it cannot be read, because only warnings depend on it."""
    path = folder / "config.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= JSON_LIMIT_BYTES else None
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def refused(sentence: str, next_step: str = "Train heads on this model or give heads made for it.") -> EvaluationError:
    return EvaluationError("BAD_HEADS", sentence, next_step)


# -- safetensors -------------------------------------------------------------------------------------------------


def _safetensors(folder: Path, files: list[str], *, inside: bool = False) -> Stored:
    """With `inside` only the tensors of heads in a full model are read."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype | None] = {}
    home: dict[str, Path] = {}
    for file in files:
        path = folder / file
        _check_header(path)
        try:
            with safe_open(str(path), framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118
                    if inside and not name.startswith(INSIDE):
                        continue
                    part = handle.get_slice(name)
                    shapes[name], dtypes[name] = tuple(part.get_shape()), _DTYPES.get(part.get_dtype())
                    home[name] = path
        except (SafetensorError, OSError, ValueError) as error:
            raise _broken(path, error) from error
    if len(shapes) > TENSOR_LIMIT:
        raise refused(f"{files[0]} holds {len(shapes):,} tensors; heads have at most {TENSOR_LIMIT:,}.")

    def read(name: str) -> Tensor:
        try:
            with safe_open(str(home[name]), framework="pt") as handle:
                tensor: Tensor = handle.get_tensor(name)
                return tensor
        except (SafetensorError, OSError, ValueError) as error:
            raise _broken(home[name], error) from error

    return Stored(folder, files[0] if len(files) == 1 else INDEX, shapes, dtypes, read)


def _check_header(path: Path) -> None:
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            announced = int.from_bytes(handle.read(8), "little")
    except OSError as error:
        raise refused(f"{path.name} cannot be read: {error.strerror}.", "Download it again.") from error
    if size > LIMIT_BYTES:
        raise _too_large(path)
    if size >= 8 and announced > HEADER_LIMIT_BYTES:
        raise refused(
            f"{path.name} declares a header of {announced:,} bytes; the limit is {HEADER_LIMIT_BYTES:,}.",
            "Ask its author for a complete safetensors file.",
        )
    if size < 8 or announced + 8 > size:
        raise _broken(path, "it is shorter than its own header")


def _broken(path: Path, error: object) -> EvaluationError:
    return refused(f"{path.name} is not a whole safetensors file: {error}.", "Download it again.")


def _too_large(path: Path) -> EvaluationError:
    return refused(f"{path.name} is larger than {LIMIT_BYTES >> 30} GiB.", "Give a file of heads alone.")


def _shards(index: Path) -> list[str]:
    """Names of the shards that hold heads, from the index of a full model."""
    try:
        listed = json.loads(index.read_text(encoding="utf-8")) if index.stat().st_size <= JSON_LIMIT_BYTES else None
        weights = dict(listed["weight_map"]) if isinstance(listed, dict) else {}
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        weights = {}
    wanted = sorted({str(file) for name, file in weights.items() if str(name).startswith(INSIDE)})
    if not wanted:
        raise refused(
            f"{index.parent.name} is a model without heads: its index names no `{INSIDE}*`.",
            "Train heads on this model.",
        )
    foreign = next((file for file in wanted if not re.fullmatch(r"[\w.\-]+\.safetensors", file, re.ASCII)), None)
    if foreign is not None:
        raise refused(
            f"{index.name} names the file {foreign[:80]!r}, which is not a shard in the same folder.",
            "Correct the index and try again.",
        )
    return wanted


# -- pickle ------------------------------------------------------------------------------------------------------


def _pickled(path: Path) -> Stored:
    _check_archive(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except Exception as error:  # a malformed file can raise anything
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"asks for `{asked[1][:80]}`, which is not a tensor" if asked else "is not a file of tensors"
        raise refused(f"{path.name} {what}; nothing in it was run.", "Ask its author for safetensors.") from error
    if not isinstance(loaded, dict) or not loaded:
        raise refused(f"{path.name} holds no dictionary of tensors.", "Ask its author for safetensors.")
    tensors: dict[str, Tensor] = {}
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise refused(
                f"{path.name} holds {type(value).__name__} under {str(name)[:80]!r}, not only tensors by name.",
                "Ask its author for safetensors.",
            )
        tensors[name] = _checked(path, name, value.detach())
    return Stored(
        path.parent,
        path.name,
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {name: tensor.dtype for name, tensor in tensors.items()},
        tensors.__getitem__,
    )


def _checked(path: Path, name: str, tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise refused(
            f"{path.name} stores {name[:80]} in a layout that is not supported.", "Ask its author for safetensors."
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise refused(
            f"{path.name} describes more values of {name[:80]} than it holds.", "Ask its author for safetensors."
        )
    return tensor


def _check_archive(path: Path) -> None:
    """Check the zip archive of torch: no compression, no more bytes than the file has, one small pickle."""
    size = path.stat().st_size
    if size > LIMIT_BYTES:
        raise _too_large(path)
    try:
        with path.open("rb") as handle:
            is_zip = handle.read(4) == b"PK\x03\x04"
        entries = zipfile.ZipFile(path).infolist() if is_zip else []
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise refused(f"{path.name} is a truncated or broken zip archive.", "Download it again.") from error
    if not is_zip:
        raise refused(
            f"{path.name} is not the zip archive that torch writes since 1.6.", "Ask its author for safetensors."
        )
    names = [entry.filename for entry in entries]
    pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
    if len(entries) > TENSOR_LIMIT or len(set(names)) != len(names):
        raise refused(f"{path.name} has too many or repeated parts.", "Ask its author for safetensors.")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
        raise refused(f"{path.name} would unpack to more than its {size:,} bytes.", "Ask its author for safetensors.")
    if len(pickles) != 1 or pickles[0].file_size > PICKLE_LIMIT_BYTES:
        raise refused(
            f"{path.name} does not hold exactly one small dictionary of tensors.", "Ask its author for safetensors."
        )
