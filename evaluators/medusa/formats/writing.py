"""Writing of heads in five formats. A variant that a format does not support is refused with the reason.

| variant          | v1                    | v2            | tgi          | vllm      | ours |
|------------------|-----------------------|---------------|--------------|-----------|------|
| own              | yes                   | no            | as v1        | yes       | yes  |
| shared, 1 block  | copies of the lm_head | yes           | as v2        | one copy  | yes  |
| shared, more     | copies of the lm_head | yes           | as v1        | one copy  | yes  |
| shared, reduced  | vocabulary restored   | dropped       | dropped      | token_map | yes  |
| own, reduced     | no                    | no            | no           | token_map | yes  |
| conditioned      | no                    | no            | no           | no        | yes  |

TGI tries the V1 reader first; its V2 reader asserts one block per head and opens only `medusa_lm_head.safetensors`.
With an `architectures` key in the config TGI treats the folder as a model and ignores the heads. vLLM renames every
config key that contains "num" and "heads" or "layers", so the config has one of each.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from bot.errors import EvaluationError
from bot.storage import move_into_place
from evaluators.medusa import custom_generate
from evaluators.medusa.drafting.heads import Heads
from evaluators.medusa.formats.reading import MODEL, WEIGHTS
from evaluators.medusa.trees.tree import Tree

Format = Literal["ours", "v1", "v2", "tgi", "vllm"]
FORMATS: tuple[Format, ...] = get_args(Format)
CONFIG = "config.json"
GENERATE = "custom_generate/generate.py"
LAST_VLLM = "0.32"  # 0.33.0 has no Medusa


def save(
    heads: Heads,
    folder: Path,
    fmt: Format = "ours",
    *,
    base_model: str = "",
    tree: Tree | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """Write the heads, each file atomically. Returns notes for the user.

    `base_model` is the repo_id of the base, by which TGI downloads it. `tree` is stored only in our format. Raises
    EvaluationError HEADS_UNSUPPORTED for a variant that `fmt` does not support, OUTPUT_EXISTS for another format than
    ours in a folder that is not empty.
    """
    copied = _copies_output(heads, fmt)
    _check(heads, fmt)
    if fmt != "ours" and folder.is_dir() and any(folder.iterdir()):
        raise EvaluationError(
            "OUTPUT_EXISTS",
            f"{folder} is not empty, and {fmt} heads need an empty folder.",
            "Choose a new folder.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _vllm_tensors(heads) if fmt == "vllm" else _medusa_tensors(heads, fmt, copied)
    typed = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in tensors.items()
    }
    target = folder / (MODEL if fmt == "vllm" else WEIGHTS)
    temporary = target.with_name(target.name + ".part")
    # Copies of one tensor share memory, which safetensors does not write.
    save_file(_separate(typed), str(temporary), metadata={"format": "pt"})
    move_into_place(temporary, target)
    write_json(folder / CONFIG, _vllm_config(heads) if fmt == "vllm" else _config(heads, fmt, copied, base_model, tree))
    return _notes(heads, fmt, copied, base_model)


def block(heads: Heads, head: int, index: int) -> tuple[Tensor, Tensor]:
    """Weight [H, H or 2H] and bias [H] of one block, as views of the stacked parameters."""
    if index == 0:
        return heads.first.data[head], heads.first_bias.data[head]
    return heads.more.data[head, index - 1], heads.more_bias.data[head, index - 1]


def write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    move_into_place(temporary, path)


def write_generate_code(model: Path) -> None:
    """Write the code of `model.generate(custom_generate=...)`, which reads the heads in `medusa/` of the same repo."""
    target = model / GENERATE
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(custom_generate.__file__), target)


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return tensors


# -- contents ----------------------------------------------------------------------------------------------------


def _copies_output(heads: Heads, fmt: Format) -> bool:
    """Return True if `fmt` stores shared heads only with copies of the base's output embedding."""
    if heads.spec.kind == "own":
        return False
    return fmt in ("v1", "vllm") or (fmt == "tgi" and heads.spec.layers > 1)


def formats_of(heads: Heads) -> list[Format]:
    """Formats that support these heads."""
    return [fmt for fmt in FORMATS if _obstacle(heads, fmt) is None]


def _obstacle(heads: Heads, fmt: Format) -> tuple[str, str] | None:
    """(predicate, next step) for heads that `fmt` does not support; None if it does."""
    spec = heads.spec
    if fmt == "ours":
        return None
    if spec.conditioned:
        return (
            f"reads the base's next token (conditioned), which {fmt} does not support",
            "Train heads with --no-conditioned, or keep these in mergebot's own format.",
        )
    if spec.kind == "own" and spec.keep is not None and fmt != "vllm":
        return (
            f"has its own projection onto {len(spec.keep)} tokens, and {fmt} supports only the whole vocabulary",
            "Train heads with --vocab full, or export these for vllm.",
        )
    if spec.kind == "own" and fmt == "v2":
        return "has its own projection, and v2 uses the base's", "Export for v1, tgi or vllm."
    if _copies_output(heads, fmt) and heads.unembed_bias is not None:
        return f"shares an output embedding that has a bias, which {fmt} does not support", "Export for v2."
    return None


def _check(heads: Heads, fmt: Format) -> None:
    if (found := _obstacle(heads, fmt)) is not None:
        reason, next_step = found
        raise EvaluationError("HEADS_UNSUPPORTED", f"A head of this set {reason}.", next_step)


def _medusa_tensors(heads: Heads, fmt: Format, copied: bool) -> dict[str, Tensor]:
    spec = heads.spec
    tensors: dict[str, Tensor] = {}
    for head in range(spec.heads):
        for index in range(spec.layers):
            weight, bias = block(heads, head, index)
            tensors[f"{head}.{index}.linear.weight"] = weight
            tensors[f"{head}.{index}.linear.bias"] = bias
        if spec.kind == "own":
            tensors[f"{head}.{spec.layers}.weight"] = heads.unembed[head]
        elif copied:
            tensors[f"{head}.{spec.layers}.weight"] = heads.base.output.weight
    if heads.keep is not None and fmt == "ours":
        tensors["keep"] = heads.keep
    return tensors


def _vllm_tensors(heads: Heads) -> dict[str, Tensor]:
    spec = heads.spec
    tensors: dict[str, Tensor] = {}
    for head in range(spec.heads):
        for index in range(spec.layers):
            weight, bias = block(heads, head, index)
            tensors[f"blocks.{head}.layers.{index}.weight"] = weight
            tensors[f"blocks.{head}.layers.{index}.bias"] = bias
        if spec.kind == "own":
            tensors[f"lm_heads.{head}.weight"] = heads.unembed[head]
    if spec.kind == "shared":
        tensors["lm_heads.0.weight"] = heads.unembed
    if heads.keep is not None:
        tensors["token_map"] = heads.keep
    return tensors


def _config(heads: Heads, fmt: Format, copied: bool, base_model: str, tree: Tree | None) -> dict[str, Any]:
    spec = heads.spec
    kept = spec.keep is not None and fmt == "ours"
    config: dict[str, Any] = {
        "medusa_num_heads": spec.heads,
        "medusa_num_layers": spec.layers,
        "base_model_name_or_path": base_model,
        "version": "1" if spec.kind == "own" or copied else "2",
        "mergebot_heads": {"kind": spec.kind, "conditioned": spec.conditioned, "keep": kept},
    }
    if fmt == "ours" and tree is not None:
        config["mergebot_tree"] = [list(path) for path in tree.paths]
    return config


def _vllm_config(heads: Heads) -> dict[str, Any]:
    spec = heads.spec
    return {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": heads.base.hidden,
        "vocab_size": heads.base.vocab,
        "truncated_vocab_size": heads.base.vocab if spec.keep is None else len(spec.keep),
        "num_heads": spec.heads,
        "num_hidden_layers": spec.layers,
        "medusa_fc_bias": True,
        "original_lm_head": spec.kind == "shared",
        "logit_scale": _logit_scale(heads),
    }


def _logit_scale(heads: Heads) -> float:
    """Factor between lm_head(h) and the logits of the base; 1 for a soft cap, which does not change ranks."""
    one, two = (float(heads.base.post(torch.tensor([value]))) for value in (1.0, 2.0))
    return one if abs(two - 2 * one) < 1e-6 * abs(two) else 1.0


def _notes(heads: Heads, fmt: Format, copied: bool, base_model: str) -> list[str]:
    spec = heads.spec
    found: list[str] = []
    if fmt in ("v1", "v2", "tgi") and spec.keep is not None:
        found.append(
            f"the draft vocabulary of {len(spec.keep)} tokens was dropped, because {fmt} supports only the whole one: "
            "measure the accuracy of the heads again"
        )
    if copied and fmt != "vllm":
        found.append(f"the base's output embedding was copied {spec.heads} times, once per head")
    if fmt == "v2" and spec.layers > 1:
        found.append("TGI reads v2 heads only with one block per head: export with format tgi to serve them with TGI")
    if fmt == "tgi":
        found.append(
            f"TGI downloads the base from the Hub as `{base_model}`, branch main: change base_model_name_or_path in "
            f"{CONFIG} if its name there differs, and start TGI with `--speculate` of at most {spec.heads}"
        )
    if fmt == "vllm":
        found.append("vLLM uses only the best token of each head, not a tree")
        found.append(f"vLLM reads Medusa heads up to release {LAST_VLLM}; later releases have no Medusa")
    return found
