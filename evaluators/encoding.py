"""Text to token ids for a model that continues it: without the end token that some tokenizers append.

A tokenizer with `add_eos_token`, or with a template such as `$A </s>` in tokenizer.json, ends every text. A decoder
would have to continue a text that has ended.
"""

from __future__ import annotations

from typing import Any

_PROBES = ("a", "1", ".", "\N{GREEK SMALL LETTER ALPHA}")


def added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after every text."""
    for text in _PROBES:
        plain = list(tokenizer.encode(text, add_special_tokens=False))
        whole = list(tokenizer.encode(text))
        for start in range(len(whole) - len(plain) + 1 if plain else 0):
            if whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
    return [], []


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of `text` as the tokenizer gives them, without what it appends."""
    _, after = added_tokens(tokenizer)
    found = [int(each) for each in tokenizer(text, verbose=False)["input_ids"]]
    return found[: len(found) - len(after)]
