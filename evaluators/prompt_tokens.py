"""Token ids of a prompt, the same for everything that continues text."""

from __future__ import annotations

import hashlib
import json
from typing import Any

# Cases in which tokenizers differ: spaces, numbers, capitals, punctuation, lines, other alphabets.
_SPLIT = "The quick  fox, 2024: 12,345.67 costs\n\nHELLO don't x_1 = [];\t\u4f60\u597d caf\u00e9 \u03b1 \u00e9 end"
_PROBES = ("a", "1", ".", "\N{GREEK SMALL LETTER ALPHA}")  # a vocabulary may lack some of them


def prompt_tokens(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` with the tokens that the tokenizer adds before it, without those it appends.

    A tokenizer with `add_eos_token` ends every text; after the end token a model begins another text.
    """
    before, own, _ = _parts(tokenizer, text)
    return before + own


def added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after every text."""
    found = (_parts(tokenizer, text) for text in _PROBES)
    return next(((before, after) for before, own, after in found if own), ([], []))


def _parts(tokenizer: Any, text: str) -> tuple[list[int], list[int], list[int]]:
    """Ids before `text`, its own, and those after it; all in the first list if its own are not recognised."""
    whole = [int(each) for each in tokenizer(text, verbose=False)["input_ids"]]
    own = [int(each) for each in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    for start in range(len(whole) - len(own) + 1):
        if whole[start : start + len(own)] == own:
            return whole[:start], own, whole[start + len(own) :]
    return whole, [], []


def text_digest(tokenizer: Any) -> str:
    """8 hex; equal for tokenizers that split a text with many difficult cases into the same tokens."""
    return hashlib.sha256(json.dumps([str(each) for each in tokenizer.tokenize(_SPLIT)]).encode()).hexdigest()[:8]
