"""Loading of the evaluated model: safetensors only, no remote code, no randomly filled weights."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bot.errors import EvaluationError
from evaluators import loading, memory
from evaluators.harness import workload
from evaluators.harness.eval_config import GENERATION, LIBRARIES, SOFTMAX_DTYPE
from evaluators.harness.scores import WHOLE
from evaluators.harness.workload import Workload


def require_backend(backend: str) -> None:
    """Raises EvaluationError BACKEND_UNAVAILABLE."""
    if backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise EvaluationError(
            "BACKEND_UNAVAILABLE", "vLLM is not installed.", "Install mergebot[vllm], or leave the backend at hf."
        )


def language_model(job: Mapping[str, Any], resuming: Callable[[type[Any]], type[Any]]) -> Any:
    """lm-eval's model over the folder of the job, by transformers or vLLM. Raises EvaluationError."""
    if job["backend"] == "vllm":
        return _with_vllm(job, resuming)
    from evaluators.harness.prefix_lm import PrefixLM

    model, tokenizer = load(Path(job["model"]), job["device"], job["dtype"])
    return resuming(PrefixLM)(model, tokenizer)


def _with_vllm(job: Mapping[str, Any], resuming: Callable[[type[Any]], type[Any]]) -> Any:
    """Model under vLLM, which batches by itself and uses all GPUs (tensor parallel)."""
    import torch
    from lm_eval.models.vllm_causallms import VLLM

    try:
        made = resuming(VLLM)(
            pretrained=job["model"],
            dtype=job["dtype"],
            batch_size="auto",
            trust_remote_code=False,
            tensor_parallel_size=max(1, torch.cuda.device_count()),
            seed=job["seed"],
        )
    except Exception as error:
        raise loading.unloadable(loading.sentence(error, Path(job["model"]))) from error
    return made


def load(folder: Path, device: str, dtype: str) -> tuple[Any, Any]:
    """Model and tokenizer of `folder`, in eval mode on `device`. Raises EvaluationError MODEL_UNLOADABLE.

    `device` "auto" is the GPU if there is one. `dtype` "auto" is float32 on a CPU, where half precision is slow or
    emulated, and the checkpoint's own elsewhere.
    """
    import torch

    device = _device(device)
    chosen: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    if dtype == "auto" and device == "cpu":
        chosen = torch.float32
    placed = {"device_map": "auto"} if _spreads(folder, device, dtype) else {}
    model, tokenizer = loading.load(folder, dtype=chosen, **placed)
    return (model if placed else model.to(device)).eval(), tokenizer


def _device(requested: str) -> str:
    """Raises EvaluationError DEVICE_UNAVAILABLE."""
    import torch

    requested = memory.computed_on(requested)
    number = int(requested.partition(":")[2] or 0)
    if requested.startswith("cuda") and number >= torch.cuda.device_count():
        raise EvaluationError(
            "DEVICE_UNAVAILABLE", f"There is no device {requested} here.", "Choose auto or cpu, or look at the driver."
        )
    return requested


def _spreads(folder: Path, device: str, dtype: str) -> bool:
    """Return whether the model is spread over all GPUs, as by lm-eval's `parallelize`; never for a named GPU."""
    import torch

    if device != "cuda":
        return False
    free = [torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())]
    return memory.spreads(memory.loaded_bytes(folder, dtype, device), free)


def request_bytes(lm: Any, longest: int) -> int:
    """Memory one request of a batch takes at most (`memory.bytes_a_request`)."""
    model: Any = getattr(lm, "model", None)
    if not hasattr(model, "dtype"):
        return 0
    return memory.bytes_a_request(model.config, longest, model.dtype.itemsize)


def first_batch(lm: Any, requested: str, request_bytes: int) -> Any:
    """Initial batch size; None for vLLM, which chooses it itself."""
    if not hasattr(lm, "batch_size_per_gpu"):
        return None
    device = str(lm.device)
    return memory.batch(requested, device, memory.free_bytes(device), request_bytes)


def batch_of(lm: Any) -> int | None:
    """Batch size in use; None if the backend chooses it."""
    return lm.batch_size_per_gpu if isinstance(getattr(lm, "batch_size_per_gpu", None), int) else None


def estimate(lm: Any, work: Workload, request_bytes: int) -> Mapping[str, float]:
    """Expected cost, from a short probe of the model; vLLM is not probed and gets no time estimate."""
    model: Any = getattr(lm, "model", None)
    batch = batch_of(lm)
    if batch is None or not hasattr(model, "parameters"):
        return {"requests": work.requests, "tokens": work.tokens, "new_tokens": work.new_tokens}
    weights = sum(each.numel() * each.element_size() for each in model.parameters())
    return {
        "requests": work.requests,
        "tokens": work.tokens,
        "new_tokens": work.new_tokens,
        "seconds": workload.seconds(work, model, batch),
        "memory_bytes": weights + batch * request_bytes,
    }


def free_memory() -> None:
    """Release the memory of a failed batch."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def facts(lm: Any, job: Mapping[str, Any]) -> dict[str, Any]:
    """The environment that scores are comparable in, as `scores.Environment` has it."""
    model = getattr(lm, "model", None)
    return {
        "device": str(getattr(lm, "device", "cuda")),
        "dtype": str(getattr(model, "dtype", job["dtype"])).removeprefix("torch."),
        "batch_size": job["batch_size"],
        "chat_template": job["chat_template"],
        "seed": job["seed"],
        "limit": job["limit"],
        "backend": job["backend"],
        "softmax_dtype": SOFTMAX_DTYPE,
        "generation": GENERATION,
        "reading": getattr(lm, "reading", WHOLE),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }
