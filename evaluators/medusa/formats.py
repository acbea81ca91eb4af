"""Heads on disk: V2's key names in safetensors, plus what our variants need to be loaded again.

    medusa_lm_head.safetensors   {i}.{j}.linear.weight / .bias   block j of head i
                                 {i}.{L}.weight                  own projection of head i (V1)
                                 keep                            token ids of a reduced draft vocabulary
    config.json                  medusa_num_heads, medusa_num_layers, base_model_name_or_path, version,
                                 mergebot_heads: {kind, conditioned, keep}

Keys and shapes decide, never the config: the published 7B config says two heads where the file holds five.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from evaluators.errors import EvaluationError
from evaluators.medusa.adapters import Base
from evaluators.medusa.heads import Heads, HeadSpec

WEIGHTS = "medusa_lm_head.safetensors"
CONFIG = "config.json"
LIMIT_BYTES = 16 << 30
_BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)")
_PROJECTION = re.compile(r"(\d+)\.(\d+)\.weight")


def save(heads: Heads, folder: Path, *, base_model: str = "") -> None:
    """Write the heads; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = heads.spec
    tensors: dict[str, Tensor] = {}
    for head in range(spec.heads):
        for block in range(spec.layers):
            weight, bias = _block(heads, head, block)
            tensors[f"{head}.{block}.linear.weight"] = weight.detach().cpu().contiguous()
            tensors[f"{head}.{block}.linear.bias"] = bias.detach().cpu().contiguous()
        if spec.kind == "own":
            tensors[f"{head}.{spec.layers}.weight"] = heads.unembed[head].detach().cpu().contiguous()
    if heads.keep is not None:
        tensors["keep"] = heads.keep.cpu()
    config = {
        "medusa_num_heads": spec.heads,
        "medusa_num_layers": spec.layers,
        "base_model_name_or_path": base_model,
        "version": "1" if spec.kind == "own" else "2",
        "mergebot_heads": {"kind": spec.kind, "conditioned": spec.conditioned, "keep": spec.keep is not None},
    }
    temporary = folder / (WEIGHTS + ".part")
    save_file(tensors, str(temporary), metadata={"format": "pt"})
    _settle(temporary, folder / WEIGHTS)
    write_json(folder / CONFIG, config)


def load(folder: Path, base: Base) -> tuple[Heads, list[str]]:
    """Read heads for `base`; the second value is warnings. Raises EvaluationError where they do not fit."""
    tensors = _read(folder / WEIGHTS)
    spec, warnings = _spec(tensors, _config(folder / CONFIG), base)
    heads = Heads(spec, base)
    with torch.no_grad():
        for head in range(spec.heads):
            for block in range(spec.layers):
                weight, bias = _block(heads, head, block)
                weight.copy_(tensors[f"{head}.{block}.linear.weight"])
                bias.copy_(tensors.get(f"{head}.{block}.linear.bias", torch.zeros_like(bias)))
            if spec.kind == "own":
                heads.unembed[head].copy_(tensors[f"{head}.{spec.layers}.weight"])
    return heads.eval().requires_grad_(False), warnings


def write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    _settle(temporary, path)


def _settle(temporary: Path, final: Path) -> None:
    with temporary.open("rb+") as handle:
        os.fsync(handle.fileno())
    temporary.replace(final)


def _block(heads: Heads, head: int, block: int) -> tuple[Tensor, Tensor]:
    """Weight [H, H or 2H] and bias [H] of one block, as views of the stacked parameters."""
    if block == 0:
        return heads.first.data[head], heads.first_bias.data[head]
    return heads.more.data[head, block - 1], heads.more_bias.data[head, block - 1]


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise _unfit(f"There is no {path.name} in {path.parent.name}.")
    if path.stat().st_size > LIMIT_BYTES:
        raise _unfit(f"{path.name} is larger than {LIMIT_BYTES >> 30} GiB.")
    try:
        with safe_open(str(path), framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _unfit(f"{path.name} is not a whole safetensors file: {error}.") from error


def _config(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _spec(tensors: dict[str, Tensor], config: dict[str, Any], base: Base) -> tuple[HeadSpec, list[str]]:
    """What the file holds, checked whole: after this every tensor `load` copies is there and has its shape."""
    blocks = [(int(m[1]), int(m[2])) for name in tensors if (m := _BLOCK.fullmatch(name))]
    if not blocks:
        raise _unfit("The head file holds no `{i}.{j}.linear.weight`.")
    heads, layers = max(head for head, _ in blocks) + 1, max(block for _, block in blocks) + 1
    if heads * layers > len(tensors):
        raise _unfit(f"The head file names head {heads - 1} and block {layers - 1}, but holds {len(tensors)} tensors.")
    own = any(_PROJECTION.fullmatch(name) for name in tensors)
    keep = _keep(tensors.get("keep"), base)
    first = tensors.get("0.0.linear.weight", torch.empty(0))
    width = base.hidden
    conditioned = tuple(first.shape) == (width, 2 * width)
    for head in range(heads):
        for block in range(layers):
            entering = 2 * width if conditioned and block == 0 else width
            _expect(tensors, f"{head}.{block}.linear.weight", (width, entering))
            if f"{head}.{block}.linear.bias" in tensors:
                _expect(tensors, f"{head}.{block}.linear.bias", (width,))
        if own:
            _expect(tensors, f"{head}.{layers}.weight", (base.vocab if keep is None else len(keep), width))
    warnings = [
        f"the config says {config[key]} for {key}, the file holds {found}: the file was believed"
        for key, found in (("medusa_num_heads", heads), ("medusa_num_layers", layers))
        if key in config and config[key] != found
    ]
    return HeadSpec("own" if own else "shared", heads, layers, conditioned, keep), warnings


def _expect(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> None:
    if name not in tensors:
        raise _unfit(f"The head file lacks {name}.")
    found = tuple(tensors[name].shape)
    if found != shape:
        raise _unfit(f"{name} has shape {found}, but this model needs {shape}.")


def _keep(keep: Tensor | None, base: Base) -> tuple[int, ...] | None:
    if keep is None:
        return None
    ids = keep.tolist() if keep.ndim == 1 and not keep.is_floating_point() else []
    if not ids or len(set(ids)) != len(ids) or min(ids) < 0 or max(ids) >= base.vocab:
        raise _unfit(f"The draft vocabulary of the heads is not a list of different tokens below {base.vocab}.")
    return tuple(ids)


def _unfit(message: str) -> EvaluationError:
    return EvaluationError("SPEED_CHECK_FAILED", message, "Train heads on this model or give heads made for it.")
