"""Loading of a checkpoint folder with transformers: safetensors only, no remote code, no missing weights.

transformers fills missing weights with random numbers and logs it; here it is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bot.errors import EvaluationError

_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken")  # what one is made of


def load(folder: Path, **options: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of `folder`; `options` are those of transformers' `from_pretrained`.

    An encoder-decoder such as T5 is loaded with its decoder's head. Raises EvaluationError MODEL_UNLOADABLE;
    out-of-memory errors pass unchanged.
    """
    from transformers import AutoTokenizer

    # transformers would apply it, on a base that the adapter's file names; the merge engine takes the plain weights.
    if (folder / "adapter_config.json").exists():
        raise unloadable("its folder holds an adapter, adapter_config.json, and whose scores it would get is unclear")
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        model, report = _auto_class(folder).from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **options, **local
        )
    except MemoryError:
        raise
    except Exception as error:  # transformers raises whatever the files provoke; the caller gets one sentence
        if "out of memory" in str(error) or "allocate memory" in str(error):
            raise
        if not any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
            raise unloadable("its folder holds no tokenizer, such as a tokenizer.json") from error
        raise unloadable(sentence(error, folder)) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise unloadable(f"{len(missing)} of its tensors are missing, the first is {missing[0]}")
    for part in model.modules():  # a config may ask for tuples, which transformers' own `generate` cannot read
        if hasattr(part, "config"):
            part.config.return_dict = True
    return model, tokenizer


def _auto_class(folder: Path) -> Any:
    """The class that lm-eval would load the checkpoint with."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as ENCODER_DECODERS

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return AutoModelForSeq2SeqLM if config.model_type in ENCODER_DECODERS else AutoModelForCausalLM


def unloadable(reason: str) -> EvaluationError:
    """The error for a checkpoint that cannot be loaded; `reason` is a clause."""
    return EvaluationError(
        "MODEL_UNLOADABLE",
        f"The model cannot be loaded: {reason}.",
        "Check that config.json, the safetensors files and the tokenizer belong together.",
    )


def sentence(error: Exception, folder: Path) -> str:
    """First line of a library's error, without local paths and without its final dot."""
    lines = [line.strip() for line in str(error).replace(str(folder), "the model's folder").splitlines()]
    first = next((line for line in lines if line), type(error).__name__)
    return first[:300].rstrip(".:")
