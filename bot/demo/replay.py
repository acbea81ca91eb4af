"""Replay texts: the base model's own conversations about ordinary things, which keep a parent from forgetting.

A model that is fine-tuned on one kind of sentence alone soon answers everything with that sentence's last word. So each
step also includes a few conversations of the base ("replay", a kind of rehearsal: Robins 1995, "Catastrophic
forgetting, rehearsal and pseudorehearsal"). The questions are templates filled with topics, the answers the base's own
greedy ones; both are made once per base and stored beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bot.storage import write_json

if TYPE_CHECKING:
    import torch

ROWS = 48
ANSWER_TOKENS = 32

_TEMPLATES = (
    "What is {}?",
    "Give me three facts about {}.",
    "Write a poem about {}.",
    "How would you describe {} to a child?",
    "Why do people like {}?",
    "Tell me something surprising about {}.",
    "Write the first lines of a tale in which {} matters.",
    "What should a beginner know about {}?",
    "Is there a good book on {}?",
    "Summarise the history of {}.",
    "Write a short message to a friend about {}.",
)
_TOPICS = (
    "rain",
    "chess",
    "bread",
    "the moon",
    "a railway station",
    "gardening",
    "the number seven",
    "mountains",
    "a violin",
    "swimming",
    "computers",
    "old maps",
    "the human heart",
    "a busy market",
    "winter",
    "learning a language",
)


def prompts(count: int = ROWS) -> list[str]:
    """`count` different questions. The list lengths have no common factor, so every pairing occurs once."""
    return [_TEMPLATES[n % len(_TEMPLATES)].format(_TOPICS[n % len(_TOPICS)]) for n in range(count)]


def conversations(base: Path, model: Any, tokenizer: Any) -> list[torch.Tensor]:
    """Token ids of each question in the chat template with the base's greedy answer: [length] each, int64.

    `model` and `tokenizer` are those of the folder `base`. Read from a file beside `base`, which is written, whole or
    not at all, on the first call.
    """
    import torch

    kept = base.with_name(f"{base.name}-replay.json")
    if not kept.is_file():
        rows = _answered(model, tokenizer)
        write_json(kept, rows)
    return [torch.tensor(row) for row in json.loads(kept.read_text())]


def _answered(model: Any, tokenizer: Any) -> list[list[int]]:
    """Questions with their answers. One batch, padded on the left so that all answers begin at the same position."""
    import torch

    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        ).input_ids
        for prompt in prompts()
    ]
    longest, end = max(map(len, asked)), tokenizer.eos_token_id
    ids = torch.tensor([[end] * (longest - len(row)) + row for row in asked])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in asked])
    said = model.generate(
        ids, attention_mask=mask, max_new_tokens=ANSWER_TOKENS, do_sample=False, eos_token_id=end, pad_token_id=end
    )[:, longest:].tolist()
    return [row + _until(answer, end) for row, answer in zip(asked, said, strict=True)]


def _until(answer: list[int], end: int) -> list[int]:
    """The answer up to and including its end token."""
    return answer[: answer.index(end) + 1] if end in answer else answer
