"""Workload estimate: requests counted on a few questions of each task, time on a few tokens of the model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from evaluators.harness.prefix_tree import PrefixTree

QUESTIONS = 8  # of each task are looked at
PROBE_TOKENS = 64
NEW_TOKENS = 256  # what lm-eval lets a model write where a task names no limit


@dataclass(frozen=True, slots=True)
class Workload:
    """Work of one task: `requests` to the model, `tokens` it reads, `new_tokens` it writes at most, and the `longest`
    request in tokens."""

    requests: int = 0
    tokens: int = 0
    new_tokens: int = 0
    longest: int = 0


def amount(task: Any, limit: int | None, encode: Any, *, shared: bool = False) -> Workload:
    """Workload of one task without groups. `encode` is text -> list of token ids.

    shared: prefixes of several requests are read once, so that further questions add only their own tokens.
    """
    questions = len(task.eval_docs)
    if limit is not None:
        questions = min(questions, limit)
    looked_at = min(questions, QUESTIONS)
    task.build_all_requests(limit=looked_at, rank=0, world_size=1)
    found = _of_requests([(each.request_type, each.args) for each in task.instances], encode, shared)
    share = questions / max(1, looked_at)
    tokens = found.tokens * share
    if shared and looked_at > 1:
        first = [(each.request_type, each.args) for each in task.instances if each.doc_id == task.instances[0].doc_id]
        alone = _of_requests(first, encode, shared).tokens
        tokens = alone + (found.tokens - alone) / (looked_at - 1) * (questions - 1)
    return Workload(round(found.requests * share), round(tokens), round(found.new_tokens * share), found.longest)


def _of_requests(requests: Sequence[tuple[str, tuple[Any, ...]]], encode: Any, shared: bool) -> Workload:
    """Answers of one token to the same question are read off one pass, as lm-eval does."""
    passes: dict[tuple[int, ...], int] = {}
    longest = new = 0
    for number, (kind, arguments) in enumerate(requests):
        if kind == "loglikelihood":
            question, answer = encode(arguments[0]), encode(arguments[1])
            read = (*question, *answer[:-1])
        else:
            read = (*encode(arguments[0]), -1 - number)
        if kind == "generate_until":
            new += int(arguments[1].get("max_gen_toks", NEW_TOKENS))
        passes[read] = len(read)
        longest = max(longest, len(read))
    tree = PrefixTree(list(passes))
    tokens = tree.tokens_read(tree.plan(longest)) if shared else sum(passes.values())
    return Workload(len(requests), tokens, new, longest)


def together(amounts: Iterable[Workload]) -> Workload:
    found = list(amounts)
    return Workload(
        sum(each.requests for each in found),
        sum(each.tokens for each in found),
        sum(each.new_tokens for each in found),
        max((each.longest for each in found), default=0),
    )


def seconds(work: Workload, model: Any, batch: int) -> float:
    """Approximate seconds on `model`, from one short pass and one of a single token."""
    import torch

    token = torch.ones((1, PROBE_TOKENS), dtype=torch.long, device=model.device)
    took = {}
    written = {"decoder_input_ids": token[:, :1]} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        for length in (1, PROBE_TOKENS, 1):  # the first one pays for warming up
            began = time.perf_counter()
            model(input_ids=token[:, :length], **written).logits[0, -1, 0].item()
            took[length] = time.perf_counter() - began
    return work.tokens * took[PROBE_TOKENS] / PROBE_TOKENS + work.new_tokens * took[1] / max(1, batch)
