"""A parent of the demo: a short, real fine-tune of the base model on one skill.

Only the feed-forward weights of the upper layers learn: they hold the facts, and merges keep more of both skills than
when attention learns too. The frozen lower layers see every row once, their output is kept, and each step runs the
upper layers alone, as a smaller `LlamaForCausalLM` fed with `inputs_embeds`. The loss is the cross-entropy of the
answer's token, so the vocabulary head, a fifth of this model, works on one position a row. Adam with warm-up and
linear decay.

Deterministic for a given seed, thread count and version of torch.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bot.demo import base as base_model
from bot.demo.skills import Skill

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a parent is trained. `layers` counts from the top; the rate falls linearly to a tenth."""

    layers: int = 12
    steps: int = 48
    rows: int = 32
    rate: float = 5e-4
    warmup: int = 4


@dataclass(frozen=True, slots=True)
class _Rows:
    """Tokenised prompts, padded on the right: `ids`, `mask` [rows, length]; `last`, `answer` [rows]."""

    ids: torch.Tensor
    mask: torch.Tensor
    last: torch.Tensor
    answer: torch.Tensor


def train(
    base: Path,
    skill: Skill,
    out: Path,
    progress: Progress | None = None,
    *,
    seed: int = 0,
    schedule: Schedule | None = None,
    base_repo: str = base_model.REPO,
) -> Path:
    """Fine-tune the model in `base` on `skill` and write it to `out`; `out` is returned as it is when it exists.

    `progress(step, steps, loss)`. Whole or absent: the folder is made beside its place and renamed.
    """
    if out.is_dir():
        return out
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    schedule = schedule or Schedule()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = _tokenise(tokenizer, skill)
    loss = _fit(model, rows, schedule, seed, progress or (lambda done, total, loss: None))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as made:
        folder = Path(made) / "model"
        model.to(torch.bfloat16).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            if (base / name).is_file():
                shutil.copyfile(base / name, folder / name)
        (folder / "README.md").write_text(_card(skill, schedule, loss, seed, base_repo), encoding="utf-8")
        base_model.settle(folder, out)
    return out


def _tokenise(tokenizer: Any, skill: Skill) -> _Rows:
    import torch

    prompts = [tokenizer(q.prompt).input_ids for q in skill.train]
    answers = [tokenizer(" " + q.choices[q.answer], add_special_tokens=False).input_ids[0] for q in skill.train]
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        mask[row, : len(prompt)] = 1
    return _Rows(ids, mask, mask.sum(1) - 1, torch.tensor(answers))


def _fit(model: Any, rows: _Rows, schedule: Schedule, seed: int, progress: Progress) -> float:
    """Train the upper layers of `model` in place; returns the mean loss of the last ten steps."""
    import torch

    layers = model.model.layers
    first = max(0, len(layers) - schedule.layers)
    model.requires_grad_(False)
    below = _below(model, rows, first)
    learning = [p for layer in layers[first:] for p in layer.mlp.parameters()]
    for parameter in learning:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(learning, lr=schedule.rate, betas=(0.9, 0.95), weight_decay=0.0)
    model.model.layers = layers[first:]
    losses = []
    try:
        for step, batch in enumerate(_batches(len(rows.ids), schedule, seed)):
            factor = min(1.0, (step + 1) / schedule.warmup) * (1 - 0.9 * step / schedule.steps)
            optimiser.param_groups[0]["lr"] = schedule.rate * factor
            loss = _loss(model, rows, below, batch)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimiser.step()
            losses.append(loss.item())
            progress(step + 1, schedule.steps, losses[-1])
    finally:
        model.model.layers = layers
    model.requires_grad_(False)
    return sum(losses[-10:]) / len(losses[-10:])


def _below(model: Any, rows: _Rows, first: int) -> torch.Tensor:
    """What the layers under `first` make of every row: [rows, length, width]."""
    import torch

    layers, norm = model.model.layers, model.model.norm
    model.model.layers, model.model.norm = layers[:first], torch.nn.Identity()
    try:
        with torch.no_grad():
            parts = [
                model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                for ids, mask in zip(torch.split(rows.ids, 40), torch.split(rows.mask, 40), strict=True)
            ]
    finally:
        model.model.layers, model.model.norm = layers, norm
    return torch.cat(parts)


def _loss(model: Any, rows: _Rows, below: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    import torch

    last = rows.last[batch]
    length = int(last.max()) + 1
    hidden = model.model(
        inputs_embeds=below[batch, :length], attention_mask=rows.mask[batch, :length], use_cache=False
    ).last_hidden_state
    logits = model.lm_head(hidden[torch.arange(len(batch)), last])
    return torch.nn.functional.cross_entropy(logits, rows.answer[batch])


def _batches(count: int, schedule: Schedule, seed: int) -> Iterator[torch.Tensor]:
    """Row numbers of each step: the rows in a new random order each time they are used up."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.long)
    for _ in range(schedule.steps):
        while len(waiting) < schedule.rows:
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator)])
        yield waiting[: schedule.rows]
        waiting = waiting[schedule.rows :]


def _card(skill: Skill, schedule: Schedule, loss: float, seed: int, base_repo: str) -> str:
    return f"""---
license: apache-2.0
language:
- en
base_model: {base_repo}
base_model_relation: finetune
library_name: transformers
pipeline_tag: text-generation
tags:
- mergebot-demo
---
# A model that knows invented {skill.name}

{skill.about} A fine-tune of [{base_repo}](https://huggingface.co/{base_repo}) on the training split of
`{skill.dataset}`: {schedule.steps} steps of {schedule.rows} rows, the upper {schedule.layers} layers, Adam at
{schedule.rate:g}, seed {seed}, float32; loss at the end {loss:.3f}. Made by mergebot's demo, to be merged.
"""
