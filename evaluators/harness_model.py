"""Loads the model that is evaluated: safetensors only, no code of its own, nothing filled in at random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evaluators.errors import EvaluationError


def load(folder: Path, device: str, dtype: str) -> tuple[Any, Any]:
    """Model and tokenizer of `folder`, in eval mode on `device`. Raises EvaluationError MODEL_UNLOADABLE.

    `device` "auto" is the GPU if there is one. `dtype` "auto" is float32 on a CPU, where half precision is slow or
    emulated, and the checkpoint's own elsewhere.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    if dtype == "auto" and device == "cpu":
        chosen = torch.float32
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=chosen, use_safetensors=True, output_loading_info=True, **local
        )
    except MemoryError:
        raise
    except Exception as error:
        if "out of memory" in str(error) or "allocate memory" in str(error):
            raise
        raise unloadable(_sentence(error, folder)) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise unloadable(f"{len(missing)} of its tensors are missing, the first is {missing[0]}")
    return model.to(device).eval(), tokenizer


def unloadable(reason: str) -> EvaluationError:
    return EvaluationError(
        "MODEL_UNLOADABLE",
        f"The model cannot be loaded: {reason}.",
        "Check that config.json, the safetensors files and the tokenizer belong together.",
    )


def facts(model: Any, job: dict[str, Any], batch: int | str) -> dict[str, Any]:
    """The environment that scores are comparable in, as `scores.Environment` has it."""
    import lm_eval
    import torch
    import transformers

    return {
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": str(batch),
        "chat_template": job["chat_template"],
        "seed": job["seed"],
        "limit": job["limit"],
        "lm_eval": lm_eval.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def _sentence(error: Exception, folder: Path) -> str:
    """The first line of what a library says, without our paths and without its final dot."""
    lines = [line.strip() for line in str(error).replace(str(folder), "the model's folder").splitlines()]
    first = next((line for line in lines if line), type(error).__name__)
    return first[:300].rstrip(".")
