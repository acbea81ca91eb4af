"""Stop strings: texts that end a generation, found where their last token arrives.

The rule is that of transformers' `stop_strings`: the token that completes a string is the last one, whatever else that
token says, and a string may have begun in the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# A tail may begin inside a character (of at most four bytes) or with a token that loses a leading space there.
MARGIN = 4


class StopStrings:
    """The strings and the tokenizer that decodes what is held against them. Raises ValueError for an empty string."""

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        if isinstance(strings, str) or not all(strings):
            raise ValueError("stop strings are a list of strings that are not empty")
        self.strings = tuple(strings)
        self._tokenizer = tokenizer
        # A token brings at least a byte, so the longest string and what precedes it fit into so many tokens.
        self._tail = MARGIN + max((len(string.encode()) for string in strings), default=0)

    def completed_by(self, seen: Sequence[int]) -> bool:
        """Whether a string ends in the text of the last token of `seen` (prompt and answer).

        Only a tail is decoded, and as a whole: the bytes of a character may come in several tokens.
        """
        tail = list(seen[-self._tail - 1 :])
        before, after = self._decode(tail[:-1]), self._decode(tail)
        # An unfinished character at the end of `before` reads otherwise in `after`: what is new begins there.
        new = next((at for at, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
        return any(after.find(string, max(0, new - len(string) + 1)) >= 0 for string in self.strings)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text
