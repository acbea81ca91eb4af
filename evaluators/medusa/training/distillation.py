"""Training data: greedy answers of the base model and the hidden states that predicted them.

Heads learn the text of this model, not that of other authors (self-distillation, arXiv 2401.10774, section 2.3.2).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bot.errors import EvaluationError
from evaluators import repetition
from evaluators.medusa.model.cache import grow_in_place
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.model.rounding import rounding_gaps, step
from evaluators.medusa.training.store import Rows

LEAST_AGREEMENT = 0.995
NEAR_TIE = 1e-2
UNJUDGED_STEPS = 4
IGNORED = -100
PILOT_ROWS = 12
PILOT_TOKENS = 24
PREFILL_SHARE = 0.3
LEAST_ROWS = 4
ANSWER_TOKENS = 96
LEAST_TOKENS = 4  # fewer teach a head nothing, so no deadline cuts before


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A prompt and the model's greedy answer y_1..y_N (a stop id is kept); hidden[i-1] [H] predicted y_i."""

    prompt: tuple[int, ...]
    output: tuple[int, ...]
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class Features:
    """Rows of several answers one after another: hidden [T, H] float32, tokens [T], lengths of the answers.

    `hidden` may be on disk (`Rows`); slices of it are tensors either way.
    """

    hidden: Tensor | Rows
    tokens: Tensor
    lengths: tuple[int, ...]

    def labels(self, heads: int) -> Tensor:
        """Labels [K, T]: head k at row i predicts y_{i+k}; -100 beyond the end of the answer."""
        total = len(self.tokens)
        left = torch.cat([torch.arange(n - 1, -1, -1) for n in self.lengths]) if self.lengths else torch.zeros(0)
        left = left.to(self.tokens.device)
        labels = torch.full((heads, total), IGNORED, dtype=torch.long, device=self.tokens.device)
        for k in range(1, heads + 1):
            here = (left >= k).nonzero().squeeze(-1)
            labels[k - 1, here] = self.tokens[here + k]
        return labels


def stack_features(base: Base, dialogues: Sequence[Dialogue]) -> Features:
    """Stack the hidden states and tokens of answers."""
    hidden = [dialogue.hidden for dialogue in dialogues] or [torch.zeros(0, base.hidden)]
    tokens = [token for dialogue in dialogues for token in dialogue.output]
    return Features(
        torch.cat(hidden).float().to(base.device),
        torch.tensor(tokens, dtype=torch.long, device=base.device),
        tuple(len(dialogue.output) for dialogue in dialogues),
    )


def drop_looping(dialogues: Sequence[Dialogue]) -> list[Dialogue]:
    """Drop answers that repeat themselves, unless all do.

    Loops are easy to predict: heads learn little from them, and a tree chosen on them is too optimistic.
    """
    return [dialogue for dialogue in dialogues if not repetition.loops(dialogue.output)] or list(dialogues)


def on_disk(base: Base, dialogues: Sequence[Dialogue]) -> Features:
    """Features whose rows stay in the memory-mapped files of the answers; on a GPU they are copied there."""
    if base.device.type != "cpu":
        return stack_features(base, dialogues)
    tokens = [token for dialogue in dialogues for token in dialogue.output]
    lengths = tuple(len(dialogue.output) for dialogue in dialogues)
    rows = Rows([dialogue.hidden for dialogue in dialogues], base.hidden)
    return Features(rows, torch.tensor(tokens, dtype=torch.long), lengths)


def pack(dialogues: Sequence[Dialogue]) -> dict[str, Tensor]:
    """Dialogues as tensors for a file."""
    return {
        "prompts": torch.tensor([token for each in dialogues for token in each.prompt]),
        "prompt_lengths": torch.tensor([len(each.prompt) for each in dialogues]),
        "outputs": torch.tensor([token for each in dialogues for token in each.output]),
        "output_lengths": torch.tensor([len(each.output) for each in dialogues]),
        "hidden": torch.cat([each.hidden for each in dialogues]),
    }


def unpack(packed: Mapping[str, Tensor]) -> list[Dialogue]:
    """Inverse of `pack`; the rows stay views of one tensor."""
    lengths = packed["output_lengths"].tolist()
    prompts = torch.split(packed["prompts"], packed["prompt_lengths"].tolist())
    outputs, rows = torch.split(packed["outputs"], lengths), torch.split(packed["hidden"], lengths)
    texts = zip(prompts, outputs, rows, strict=True)
    return [Dialogue(tuple(prompt.tolist()), tuple(output.tolist()), states) for prompt, output, states in texts]


@torch.no_grad()
def self_distil(
    base: Base,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch: int = 48,
    deadline: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Dialogue]:
    """Greedy answers to `prompts` (token ids) in order, until all are done or `deadline` (time.monotonic) passes.

    Answers cut by the deadline are kept; prompts that were not started are absent. With a deadline, a small first batch
    of short answers measures the prefill time, and later batches are sized so that most of the time is left for
    generation. `progress` gets (prompts done, prompts). Hidden states are kept during generation, so that no second
    forward pass is needed.
    """
    done: list[Dialogue] = []
    rows, limit = (batch, max_new_tokens) if deadline is None else (PILOT_ROWS, min(PILOT_TOKENS, max_new_tokens))
    while len(done) < len(prompts) and rows >= LEAST_ROWS:
        some = prompts[len(done) : len(done) + min(rows, batch)]
        answers, prefill_s = answer(base, some, limit, deadline)
        done += answers
        if progress is not None:
            progress(len(done), len(prompts))
        if deadline is not None:
            left_s, limit = deadline - time.monotonic(), max_new_tokens
            rows = int(PREFILL_SHARE * left_s * len(some) / prefill_s)
    return done


@torch.no_grad()
def answer(
    base: Base, prompts: Sequence[Sequence[int]], limit: int, deadline: float | None
) -> tuple[list[Dialogue], float]:
    """Answers to one batch, and the seconds until all first tokens were generated."""
    began = time.monotonic()
    prefill_s = 0.0
    longest = max(len(prompt) for prompt in prompts)
    if base.max_positions is not None:
        limit = max(1, min(limit, base.depth_room(longest) + 1))
    cache, ids, mask, positions = _padded(base, prompts, limit)
    outputs: list[list[int]] = [[] for _ in prompts]
    states: list[list[Tensor]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    while True:
        hidden, logits = base.run(
            ids, last_only=True, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        following = logits[:, -1].max(-1).indices  # argmax takes five times as long in bfloat16
        prefill_s = prefill_s or time.monotonic() - began
        for row, token, state in zip(alive, following.tolist(), hidden[:, -1], strict=True):
            outputs[row].append(token)
            states[row].append(state)
        going = [at for at, row in enumerate(alive) if outputs[row][-1] not in base.stop_ids]
        written = len(outputs[alive[going[0]]]) if going else limit
        late = deadline is not None and written >= LEAST_TOKENS and time.monotonic() >= deadline
        if written >= limit or late:
            break
        if len(going) < len(alive):
            chosen = torch.tensor(going, device=base.device)
            cache.batch_select_indices(chosen)
            mask, positions, following = mask[chosen], positions[chosen], following[chosen]
            alive = [alive[at] for at in going]
        ids, positions = following[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=-1)
    answers = [
        Dialogue(tuple(prompt), tuple(output), torch.stack(rows))
        for prompt, output, rows in zip(prompts, outputs, states, strict=True)
    ]
    return answers, max(prefill_s, 1e-6)


def _padded(base: Base, prompts: Sequence[Sequence[int]], limit: int) -> tuple[Any, Tensor, Tensor, Tensor]:
    """(cache, ids, mask, positions) of a batch; the common prefix of all prompts is computed once and cached.

    Columns: the common prefix, padding, the rest of each prompt. Padding on the left makes every answer start in the
    last column; the mask and explicit positions hide it. No prefix is shared if answers of `limit` tokens exceed the
    attention window: a window counts columns, and padding would push the prefix out of it.
    """
    longest = max(len(prompt) for prompt in prompts)
    shared = 0 if base.window is not None and longest + limit > base.window.size else _common(prompts)
    cache = grow_in_place(base.new_cache())
    if shared:
        prefix = torch.tensor([list(prompts[0][:shared])], device=base.device)
        base.run(prefix, last_only=True, project=False, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(prompts))
    width = max(len(prompt) for prompt in prompts) - shared
    ids = torch.zeros((len(prompts), width), dtype=torch.long)
    mask = torch.cat([torch.ones(len(prompts), shared, dtype=torch.long), torch.zeros_like(ids)], dim=-1)
    for row, prompt in enumerate(prompts):
        rest = len(prompt) - shared
        ids[row, width - rest :] = torch.tensor(list(prompt[shared:]))
        mask[row, shared + width - rest :] = 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, shared:]
    return cache, ids.to(base.device), mask.to(base.device), positions.to(base.device)


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the common prefix of all prompts; at least one token of each prompt is left."""
    shortest = min(len(prompt) for prompt in prompts)
    columns = range(shortest - 1)
    return next((at for at in columns if any(p[at] != prompts[0][at] for p in prompts)), max(shortest - 1, 0))


@torch.no_grad()
def replay(base: Base, dialogue: Dialogue) -> tuple[Tensor, float, float]:
    """One unpadded teacher-forced pass over a dialogue.

    Returns its rows h_1..h_N [N, H], the share of y_i that are the argmax there or tie with it, and the largest
    difference to the kept rows, relative to their spread.
    """
    text = torch.tensor([[*dialogue.prompt, *dialogue.output[:-1]]], device=base.device)
    hidden, _ = base.run(text, project=False, use_cache=False)
    rows = hidden[0, len(dialogue.prompt) - 1 :]
    logits = base.logits(rows).float()
    best, said = logits.max(-1).values, torch.tensor(dialogue.output, device=base.device)
    behind, near = best - logits.gather(-1, said[:, None])[:, 0], torch.full_like(best, NEAR_TIE)
    if bool((behind > near).any()):  # rounding may have chosen; where nobody can tell, a few steps of the type pass
        judged = rounding_gaps(base, dialogue.prompt, dialogue.output)
        behind, near = (behind, UNJUDGED_STEPS * step(best, base.dtype)) if judged is None else judged
    kept = dialogue.hidden.to(rows)
    difference = float((rows - kept).abs().max() / kept.std().clamp_min(1e-6))
    return rows, float((behind <= near.clamp_min(NEAR_TIE)).float().mean()), difference


def check(base: Base, dialogues: Sequence[Dialogue], sample: int = 2) -> float:
    """Replay the first `sample` answers and return the share of agreeing tokens.

    Detects wrong padding or positions, which would train useless heads. Raises EvaluationError for a low share.
    """
    picked = [dialogue for dialogue in dialogues if dialogue.output][:sample]
    tokens = sum(len(dialogue.output) for dialogue in picked)
    agreed = sum(replay(base, dialogue)[1] * len(dialogue.output) for dialogue in picked)
    share = agreed / tokens if tokens else 1.0
    if share < LEAST_AGREEMENT:
        raise EvaluationError(
            "SPEED_CHECK_FAILED",
            f"Only {share:.1%} of the tokens this model generated in a batch are its own choice when replayed.",
            "The model does not take left padding; evaluate it without the speed check.",
        )
    return share
