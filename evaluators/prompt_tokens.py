"""Token ids of a prompt, the same for everything that continues text."""

from __future__ import annotations

from typing import Any


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
