"""lm-eval's HFLM under neutral settings: without the parts that measure something other than the model.

docs/evaluation.md lists each deviation from lm-eval's command line. A model with plain settings has none: its numbers
are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from lm_eval.models.huggingface import HFLM

from bot.errors import EvaluationError
from evaluators.generation_settings import steering
from evaluators.harness.eval_config import SOFTMAX_DTYPE
from evaluators.prompt_tokens import added_tokens, text_digest

# Chat templates that print a date read this one, so that a prompt does not depend on the day.
CHAT_DATE = date(2024, 7, 26)
# Keys of generation_config.json that belong to the model; all others are settings.
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_MOST = 16  # tokens that are named at most


class NeutralLM(HFLM):  # type: ignore[misc]
    """lm-eval's `HFLM` that keeps the loaded weights as they are and generates under neutral settings."""

    add_bos_token: bool | None

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """`model` and `tokenizer` as transformers loaded them. Raises EvaluationError MODEL_UNLOADABLE."""
        _require_bounds(tokenizer)
        ignored = _neutral_generation(model)
        # HFLM ties weights again, by the config alone, and so replaces a head that the files hold.
        model.tie_weights = _nothing
        if "attention_mask" not in tokenizer.model_input_names:  # HFLM always reads it
            tokenizer.model_input_names = [*tokenizer.model_input_names, "attention_mask"]
        tokenizer.chat_template = _dated(tokenizer.chat_template)
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1, softmax_dtype=SOFTMAX_DTYPE)
        before, after = added_tokens(tokenizer)
        self._appended = len(after) if self.backend == "causal" else 0
        self.facts = {
            "context": int(self.max_length),
            "kept_apart": _kept_apart(model),
            "ignored_settings": ignored,
            "ends": _as_list(getattr(model.generation_config, "eos_token_id", None))[:_MOST],
            "begins_with": _as_text(tokenizer, before),
            "ends_with": _as_text(tokenizer, after[self._appended :]),
            "dropped_end": _as_text(tokenizer, after[: self._appended]),
            "before_whole": _as_text(tokenizer, [self.prefix_token_id]),
            "splits": text_digest(tokenizer),
            "starts": _as_list(getattr(model.generation_config, "decoder_start_token_id", None))[:_MOST],
            "attention": str(getattr(model.config, "_attn_implementation", None)),
            "cleans_spaces": bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)),
        }

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **options: Any,
    ) -> list[int]:
        found: list[int] = super().tok_encode(string, add_special_tokens, **options)
        if self._appended and len(found) > len(self.tokenizer.encode(string, add_special_tokens=False)):
            found = found[: -self._appended]
        return found[-left_truncate_len:] if left_truncate_len else found

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Any, Any]:
        begun = self.tokenizer.bos_token and strings[0].startswith(self.tokenizer.bos_token)
        appended = 0 if begun else self._appended
        room = left_truncate_len + appended if left_truncate_len else None
        ids, mask = super().tok_batch_encode(strings, padding_side, room, truncation)
        wide = ids.shape[1] - appended
        return ids[:, :wide], mask[:, :wide]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A template without a system role gets the task's description in the first question; lm-eval drops it."""
        text: str = super().apply_chat_template(chat_history, add_generation_prompt)
        if all(each["content"].strip() in text for each in chat_history if each["role"] == "system"):
            return text
        folded: str = super().apply_chat_template(_folded(chat_history), add_generation_prompt)
        return folded

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Score the tokens of the text alone; BOS precedes them and is not scored."""
        as_before, self.add_bos_token = self.add_bos_token, False
        try:
            found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token = as_before
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self._require_end()
        found: list[str] = super().generate_until(requests, disable_tqdm)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Any], **options: Any) -> list[tuple[float, bool]]:
        self._require_answers(requests)
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, **options)
        return found

    def _require_end(self) -> None:
        """Raises ValueError without an end token."""
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token (eos_token), at which lm-eval ends an answer")

    def _require_answers(self, requests: Sequence[Any]) -> None:
        """Raises ValueError for an answer without tokens, or with more than the model reads."""
        for _, _, answer in requests:
            if not answer:
                raise ValueError("an answer adds no token to its question")
            if len(answer) > self.max_length:
                raise ValueError(
                    f"an answer of {len(answer)} tokens is longer than the {self.max_length} tokens that the model "
                    "reads at once"
                )


def _nothing(*_arguments: Any, **_options: Any) -> None:
    """Leave the weights as `from_pretrained` tied them."""


def _require_bounds(tokenizer: Any) -> None:
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise EvaluationError(
            "MODEL_UNLOADABLE",
            "The tokenizer has neither a begin token (bos_token) nor an end token (eos_token), and lm-eval needs one.",
            "Name one of its tokens as eos_token in tokenizer_config.json.",
        )


def _neutral_generation(model: Any) -> list[str]:
    """Put transformers' defaults in place of the model's generation settings, with its own token ids.

    Returns the settings that would have changed greedy answers, as `name=value`.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    if own is None:  # a model that cannot generate
        return []
    model.generation_config = GenerationConfig(**{name: getattr(own, name, None) for name in _TOKEN_IDS})
    return [f"{name}={str(value)[:60]}" for name, value in steering(own, limits=True).items()]


def _kept_apart(model: Any) -> list[str]:
    """Parameters that the config ties and the files store with other values: the stored values are in use."""
    if not hasattr(model, "get_expanded_tied_weights_keys"):
        return []
    by_config = model.get_expanded_tied_weights_keys(all_submodels=True)
    return sorted(set(by_config) - set(model.all_tied_weights_keys))


def _as_text(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The first tokens, each shortened: they come from an untrusted file."""
    return [str(each)[:40] for each in tokenizer.convert_ids_to_tokens(list(ids[:_MOST]))]


def _as_list(ids: Any) -> list[int]:
    return sorted(ids) if isinstance(ids, (list, tuple)) else [] if ids is None else [int(ids)]


def _dated(template: Any) -> Any:
    """A chat template, or several by name, with `strftime_now` as a macro that always prints CHAT_DATE.

    transformers passes only plain data to a template, so the function cannot be replaced from outside.
    """
    if isinstance(template, dict):
        return {name: _dated(each) for name, each in template.items()}
    if not template or "strftime_now" not in template:
        return template
    directives = "".join(f"|replace('%{each}', '{CHAT_DATE.strftime('%' + each)}')" for each in "aAbBdmyYjHMS")
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{directives} }}}}{{%- endmacro +%}}{template}"


def _folded(chat: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The chat with its system messages at the beginning of the first message of the user."""
    system_text = "\n\n".join(each["content"] for each in chat if each["role"] == "system")
    found = [dict(each) for each in chat if each["role"] != "system"]
    first = next((each for each in found if each["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": system_text}, *found]
    first["content"] = f"{system_text}\n\n{first['content']}"
    return found
