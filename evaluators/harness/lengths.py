"""Prompts longer than the model's context, of which lm-eval leaves out the start."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any


def cut_prompts(lm: Any, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, int] | None:
    """Number of a task's requests that were too long and lost their start; None if all fit.

    `samples` are lm-eval's, by task. `longest` and `limit` are tokens. Texts scored as a whole are read in windows and
    never cut.
    """
    found = [_lengths(lm, arguments) for arguments in _requests(samples)]
    cut = [(length, limit) for length, limit in found if length > limit]
    if not cut:
        return None
    longest, limit = max(cut)
    return {"requests": len(cut), "of": len(found), "longest": longest, "limit": limit}


def _requests(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Sequence[Any]]:
    """Arguments of every request once; each filter has its own sample."""
    for rows in samples.values():
        for sample in rows:
            if sample.get("filter") == rows[0].get("filter"):
                yield from sample["arguments"]


def _lengths(lm: Any, arguments: Sequence[Any]) -> tuple[int, int]:
    """(tokens, tokens that fit) of a request; a request that cannot be too long is not encoded."""
    if len(arguments) == 1:
        return 0, 0
    prompt, second = arguments[0], arguments[1]
    causal, limit = lm.backend == "causal", int(lm.max_length)
    if isinstance(second, Mapping):
        limit -= _new_tokens(lm, second) if causal else 0
        return (0 if _fits([prompt], limit) else len(lm.tok_encode(prompt))), limit
    limit += causal  # the last token is predicted, not read
    if not prompt or _fits([prompt, second], limit):
        return 0, limit
    question, answer = lm._encode_pair(prompt, second)
    return len(question) + (len(answer) if causal else 0), limit


def _fits(texts: Iterable[str], limit: int) -> bool:
    """Return whether the text fits by its bytes: every token but a few special ones covers at least one."""
    return sum(len(text.encode()) for text in texts) + 8 <= limit


def _new_tokens(lm: Any, settings: Mapping[str, Any]) -> int:
    from lm_eval.models.utils import normalize_gen_kwargs

    return int(normalize_gen_kwargs(dict(settings), lm.max_gen_toks)["max_gen_toks"])
