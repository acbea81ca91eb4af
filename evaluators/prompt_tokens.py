"""Token ids of a prompt, the same for everything that continues text."""

from __future__ import annotations

from typing import Any

_PROBES = ("a", "1", ".", "\N{GREEK SMALL LETTER ALPHA}")  # a vocabulary may lack some of them


def prompt_tokens(tokenizer: Any, text: str) -> list[int]:
    """The token ids of `text` with the tokens that the tokenizer puts before it, without those it appends.

    A tokenizer with `add_eos_token` ends every text; a model that reads the end token begins another text instead of
    continuing this one.
    """
    whole = [int(each) for each in tokenizer(text, verbose=False)["input_ids"]]
    bare = [int(each) for each in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    starts = range(len(whole) - len(bare) + 1)
    start = next((at for at in starts if whole[at : at + len(bare)] == bare), None)
    return whole if start is None else whole[: start + len(bare)]


def added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after every text."""
    for text in _PROBES:
        plain = list(tokenizer.encode(text, add_special_tokens=False))
        whole = list(tokenizer.encode(text))
        for start in range(len(whole) - len(plain) + 1 if plain else 0):
            if whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
    return [], []
