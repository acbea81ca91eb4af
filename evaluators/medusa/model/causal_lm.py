"""Base model: hidden states, logits, stop ids, cache and position limits.

`Base` wraps any decoder-only causal LM of transformers v5 without patching it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import logging

from bot.errors import EvaluationError
from evaluators import loading
from evaluators.medusa.model import support
from evaluators.medusa.model.cache import empty_cache, window_of
from evaluators.medusa.model.support import rope_of

SELF_CHECK_TOKENS = 16
# `generate` of these models recomputes the whole text when rope `longrope` changes its factors; others keep the cache.
RECOMPUTING_MODELS = frozenset({"phi3", "phimoe", "phi4_multimodal"})


class Base:
    """A frozen causal LM. `h` is the hidden state that enters the output embedding (after the final norm)."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.config: Any = model.config.get_text_config(decoder=True)
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.output: Any = model.get_output_embeddings()
        if self.output is None or model.config.is_encoder_decoder:
            raise support.unsupported(
                f"{type(model).__name__} is not a decoder-only language model with an output embedding."
            )
        self.vocab: int = self.output.weight.shape[0]
        self.hidden: int = self.output.weight.shape[1]
        # A tokenizer may have more tokens than the model, and some configs write -1 for none.
        self.stop_ids = frozenset(each for each in _stop_ids(model, tokenizer) if 0 <= each < self.vocab)
        self.max_positions: int | None = getattr(self.config, "max_position_embeddings", None)
        self.rope = rope_of(self.config)
        self.cache_name = support.cache_name(model)
        self.execution = "eager"
        # None if the window is not supported; the model then uses the cache of transformers.
        self.window = window_of(model.config)
        self._hooked = False
        self._captured: Tensor | None = None
        self.post: Callable[[Tensor], Tensor] = lambda z: z
        self._find_hidden_state()

    # -- running the model ---------------------------------------------------------------------------------------

    def run(
        self, ids: Tensor, *, last_only: bool = False, project: bool = True, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """ids [B, T] -> (h [B, T, H], logits [B, T, V]); with `last_only` both hold the last position only.

        Without `project` the logits are empty, which saves time if only hidden states are needed. The cache is passed
        as `past_key_values`, whatever its name in the model.
        """
        if self.cache_name != "past_key_values" and "past_key_values" in kwargs:
            cache = kwargs.pop("past_key_values")
            kwargs |= {} if self.cache_name is None else {self.cache_name: cache}
        if self._hooked:
            logits = self.model(input_ids=ids, **kwargs).logits
            hidden = self._captured
            assert hidden is not None  # the pre-hook of the output embedding ran inside the call above
            return (hidden[:, -1:], logits[:, -1:]) if last_only else (hidden, logits)
        hidden = self.model.base_model(input_ids=ids, **kwargs).last_hidden_state
        if last_only:
            hidden = hidden[:, -1:]
        return hidden, self.logits(hidden) if project else hidden.new_empty(0)

    def logits(self, hidden: Tensor) -> Tensor:
        """[.., H] -> [.., V], the logits of the model."""
        return self.post(self.output(hidden))

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [..] -> input embeddings [.., H], scaled as the model scales them."""
        embedded: Tensor = self.model.get_input_embeddings()(ids)
        return embedded

    def new_cache(self) -> Any:
        """Make an empty cache. Its sliding layers keep all rows, so that rejected tokens can be removed."""
        if self.rope[0] == "dynamic":
            self._reset_dynamic_rope()
        return empty_cache(self.model.config, self.window)

    def depth_room(self, length: int) -> int:
        """Largest depth of a tree after `length` cached tokens.

        A tree must stay inside the position table. rope `longrope` switches its factors and `dynamic` rescales all
        angles once a position passes the original length, so a tree must not cross that length either.
        """
        room = 1 << 30 if self.max_positions is None else self.max_positions - 1 - length
        kind, original = self.rope
        if original is None or kind not in ("longrope", "dynamic"):
            return room
        if length + 1 <= original:
            return min(room, original - 1 - length)
        return 0 if kind == "dynamic" or length == self.recompute_length else room

    def recomputes_at(self, length: int) -> bool:
        """Return True if the step after `length` tokens recomputes the whole text."""
        return self.cache_name is None or length == self.recompute_length

    @property
    def recompute_length(self) -> int | None:
        """Length after which the next token makes the model recompute the whole text with other angles."""
        kind, original = self.rope
        return original if kind == "longrope" and self.config.model_type in RECOMPUTING_MODELS else None

    def last_position(self) -> int | None:
        """Largest position of a token; None without a limit."""
        if self.max_positions is None or self.rope[0] == "dynamic":
            return None
        return self.max_positions - 1

    def _reset_dynamic_rope(self) -> None:
        """Reset the angles of rope `dynamic`, which depend on the longest text so far, before a new text.

        The model resets them only when it reads fewer tokens than the original length.
        """
        for module in self.model.modules():
            for name, angles in list(module.named_buffers(recurse=False)):
                if name.endswith("original_inv_freq"):
                    setattr(module, name.replace("original_", ""), angles)
            for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
                setattr(module, name, module.original_max_seq_len)

    # -- hidden state --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _find_hidden_state(self) -> None:
        """Make `run` agree with the logits of the model, by the backbone if that works, else by a hook."""
        generator = torch.Generator().manual_seed(0)
        size = min(SELF_CHECK_TOKENS, (self.max_positions or SELF_CHECK_TOKENS))
        ids = torch.randint(0, self.vocab, (1, size), generator=generator).to(self.device)
        own = self.model(input_ids=ids, use_cache=False).logits.float()
        if not bool(torch.isfinite(own.max())):
            raise not_finite("on its first tokens")
        backbone = self.model.base_model
        if backbone is not self.model:
            hidden = getattr(backbone(input_ids=ids, use_cache=False), "last_hidden_state", None)
            if hidden is not None and hidden.shape[-1] == self.hidden:
                raw = self.output(hidden)
                for candidate in _postprocessors(self.config):
                    if close(candidate(raw).float(), own):
                        self.post = candidate
                        return
        self._hooked = True
        self.output.register_forward_pre_hook(self._capture)
        hidden, logits = self.run(ids, use_cache=False)
        if hidden.shape[-1] != self.hidden or not close(logits.float(), own):
            raise EvaluationError(
                "SPEED_UNSUPPORTED",
                f"The hidden state that enters the output embedding of {type(self.model).__name__} was not found.",
                "Evaluate this model without the speed check.",
            )

    def _capture(self, _module: Any, inputs: tuple[Tensor, ...]) -> None:
        self._captured = inputs[0]


def fastest_dtype(folder: Path, device: str = "cpu") -> torch.dtype:
    """Fastest type for a checkpoint on this machine, by its stored type and the hardware.

    The stored 16 bit type on a GPU, bfloat16 on a CPU with hardware support, float32 otherwise. Nothing is timed, so
    the result is the same for every run.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return torch.float32
    stored = config.get("dtype", config.get("torch_dtype")) if isinstance(config, dict) else None
    if torch.device(device).type == "cuda":
        if stored == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.float16
        return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(stored), torch.float32)
    return torch.bfloat16 if stored == "bfloat16" and cpu_multiplies_bfloat16() else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """Return True if this CPU has instructions for bfloat16; without them it is slower than float32."""
    return any(
        getattr(torch.cpu, f"_is_{unit}_supported", lambda: False)() for unit in ("avx512_bf16", "amx_tile", "arm_bf16")
    )


def load(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Base:
    """Load a checkpoint directory (safetensors only, no remote code).

    Raises EvaluationError MODEL_UNLOADABLE, and SPEED_UNSUPPORTED for an encoder-decoder before its weights are read.
    """
    if not (folder / "config.json").is_file():
        raise EvaluationError(
            "MODEL_UNLOADABLE", f"{folder} holds no config.json.", "Give the folder of a transformers checkpoint."
        )
    support.require_decoder_only(folder)
    logging.disable_progress_bar()  # callers show progress themselves
    try:
        try:
            model, tokenizer = loading.load(folder, dtype=dtype, attn_implementation="sdpa")
        except EvaluationError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            model, tokenizer = loading.load(folder, dtype=dtype, attn_implementation="eager")
        model = model.to(device)
    except (MemoryError, RuntimeError, OSError) as error:  # out of memory on the host or the device
        raise loading.unloadable(loading.sentence(error, folder)) from error
    return Base(model, tokenizer)


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Union of the `eos_token_id` of generation_config, config and tokenizer; each may be a list."""
    found: set[int] = set()
    for owner in (model.generation_config, model.config, model.config.get_text_config(decoder=True), tokenizer):
        value = getattr(owner, "eos_token_id", None)
        found.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return frozenset(found)


def _postprocessors(config: Any) -> list[Callable[[Tensor], Tensor]]:
    """Monotone logit post-processing functions of transformers, from which the one of this model is chosen."""
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None)
    scaling = getattr(config, "logits_scaling", None)
    multiplier = getattr(config, "lm_head_multiplier", None)
    found: list[Callable[[Tensor], Tensor]] = [lambda z: z]
    if cap:
        found.append(lambda z: cap * torch.tanh(z / cap))
    if scale:
        found.append(lambda z: z * scale)
    if scaling:
        found += [lambda z: z / scaling, lambda z: z * scaling]
    if multiplier:
        found.append(lambda z: z * multiplier)
    return found


def not_finite(where: str) -> EvaluationError:
    """The error for logits that hold NaN or infinity."""
    return EvaluationError(
        "SPEED_CHECK_FAILED",
        f"The model's logits hold NaN or infinity {where}.",
        "Check the merged weights: a source or the merge itself is not finite.",
    )


def close(left: Tensor, right: Tensor, tolerance: float = 1e-3) -> bool:
    """Return True for logits that are equal up to a share `tolerance` of their standard deviation."""
    if left.shape != right.shape:
        return False
    spread = float(right.std()) or 1.0
    return bool((left - right).abs().max() <= tolerance * max(spread, 1e-6))
