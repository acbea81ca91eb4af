"""Pickled PyTorch weights -> safetensors, tensor by tensor. Only for trusted users, only with `--allow-pickle`.

A pickle is a program. It is read by torch's restricted unpickler (`weights_only=True`, which knows tensors and plain
containers and calls nothing else), mapped rather than loaded, and only ever in a child process with limits and
without any token: `bot/stages/unpickling.py` starts it.

    python -m bot.merge.checkpoints.pickled INTO MEMORY_BYTES FROM...     each FROM becomes INTO/<its name>.safetensors
"""

from __future__ import annotations

import json
import re
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bot.errors import Refused
from bot.merge.recipe.dtypes import BY_NAME
from bot.storage import sync_file

if TYPE_CHECKING:
    import torch

REFUSED = 3  # exit status: the last line of the output is a JSON object with code, message and next step
_WEIGHTS = re.compile(r"(pytorch_model|adapter_model|model|consolidated)[\w.\-]*\.(bin|pt|pth)", re.ASCII)
_WRAPPERS = ("state_dict", "model", "module")
_CHUNK_BYTES = 64 * 2**20
_NAME_LIMIT = 1024


def pickles(names: Mapping[str, int]) -> list[str]:
    """Files that hold pickled weights, by name; optimizer states and the like are none."""
    return sorted(name for name in names if _WEIGHTS.fullmatch(name))


def converted_name(name: str) -> str:
    """The safetensors file that stands for a pickled one, named as transformers names it."""
    return name.rsplit(".", 1)[0].replace("pytorch_model", "model") + ".safetensors"


def convert(source: Path, target: Path) -> None:
    """Write the tensors of the pickled `source` to the new file `target`. Raises `Refused` BAD_CHECKPOINT."""
    import torch

    tensors = _tensors(source, torch)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    order = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    for name, tensor in order:
        dtype = BY_NAME.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None:
            _bad(source, f"stores `{name[:80]}` as {tensor.dtype}")
        size = tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": dtype.code, "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("xb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in order:
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(flat), _CHUNK_BYTES):
                out.write(flat[start : start + _CHUNK_BYTES])
    sync_file(target)


def _tensors(source: Path, torch: Any) -> dict[str, torch.Tensor]:
    zipped = torch.serialization._is_zipfile(source.open("rb"))
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=True if zipped else None)
    except MemoryError:
        raise
    except Exception as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"asks for `{name[1][:80]}`, which is not a tensor" if name else "is not a file of tensors"
        _bad(source, what)
    for key in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict):
        _bad(source, "holds no table of tensors")
    tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not 0 < len(name) <= _NAME_LIMIT or not name.isprintable():
            _bad(source, "has a tensor without a proper name")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            _bad(source, f"stores `{name[:80]}` in a layout that is not plain")
        if tensor.numel() * tensor.element_size() > source.stat().st_size:
            _bad(source, f"repeats the numbers of `{name[:80]}`")  # a huge tensor made of a small one
    if not tensors or sum(t.numel() * t.element_size() for t in tensors.values()) > 4 * source.stat().st_size:
        _bad(source, "holds no tensors" if not tensors else "describes more numbers than it holds")
    return tensors


def _bad(source: Path, what: str) -> NoReturn:
    next_step = "Ask its author for safetensors; nothing in it was run."
    raise Refused("BAD_CHECKPOINT", f"{source.name} {what}.", next_step, value=source.name)


def _limit(memory_bytes: int, file_bytes: int) -> None:
    """Limit the child: memory, the size of a file, open files; no core file, no further process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def main() -> None:
    """Run the program of the child process."""
    into, memory_bytes = Path(sys.argv[1]), int(sys.argv[2])
    sources = [Path(text) for text in sys.argv[3:]]
    import torch

    torch.set_num_threads(1)  # before the limit: threads started later would need address space
    largest = max(source.stat().st_size for source in sources)
    _limit(memory_bytes, 4 * largest + 2**20)
    try:
        for source in sources:
            convert(source, into / converted_name(source.name))
    except Refused as error:
        print(json.dumps(error.as_dict()))
        sys.exit(REFUSED)


if __name__ == "__main__":
    main()
