"""Parents of the demo: short, real fine-tunes of the base model on one skill each.

Only the feed-forward weights of the upper layers are trained: they store facts, and merges keep more of both skills
than with trained attention. The frozen lower layers process every row once and their output is kept; each step runs the
upper layers alone, as a smaller `LlamaForCausalLM` fed with `inputs_embeds`. The loss is the cross-entropy of the
answer's token, so the vocabulary head, a fifth of this model, runs on one position per row. At the other positions, and
in a few conversations of the base per step (`bot.demo.replay`), the mean squared distance of the two models' logits is
added. Without this term a parent answers every question with one of the skill's eight words. Adam with warm-up and
linear decay.

Deterministic for a given seed, thread count and version of torch.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bot.demo import base as base_model
from bot.demo import replay
from bot.demo.skills import Skill

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Training schedule of a parent. `layers` counts from the top; the rate falls linearly to a tenth.

    A step has `rows` statements of the skill and `replayed` conversations; their distance from the base has the weight
    `hold`.
    """

    layers: int = 12
    steps: int = 48
    rows: int = 32
    replayed: int = 3
    hold: float = 0.5
    rate: float = 5e-4
    warmup: int = 4


@dataclass(frozen=True, slots=True)
class _Lesson:
    """Token ids: the skill's `statements` with the `answers` [statements] that end them; the base's `talk`."""

    statements: Sequence[torch.Tensor]
    answers: torch.Tensor
    talk: Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Texts:
    """Rows padded on the right, and their activations in the base.

    `mask` [rows, length]; `below` (under the trained layers) and `above` (after the last norm) [rows, length, width].
    """

    mask: torch.Tensor
    below: torch.Tensor
    above: torch.Tensor

    def of(self, batch: torch.Tensor) -> _Texts:
        """Some of the rows, as long as their longest."""
        length = int(self.mask[batch].sum(1).max())
        return _Texts(self.mask[batch, :length], self.below[batch, :length], self.above[batch, :length])


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
    """Fine-tune the model in `base` on `skill` and write it to `out`; an existing `out` is returned as it is.

    `progress(step, steps, loss)`. The folder is complete or absent: built beside its place and renamed.
    """
    if out.is_dir():
        return out
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    schedule = schedule or Schedule()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    lesson = _lesson(base, model, tokenizer, skill)
    loss = _fit(model, lesson, schedule, seed, progress or (lambda done, total, loss: None))
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


def _lesson(base: Path, model: Any, tokenizer: Any, skill: Skill) -> _Lesson:
    import torch

    statements = [torch.tensor(tokenizer(q.prompt).input_ids) for q in skill.train]
    answers = [tokenizer(" " + q.choices[q.answer], add_special_tokens=False).input_ids[0] for q in skill.train]
    return _Lesson(statements, torch.tensor(answers), replay.conversations(base, model, tokenizer))


def _fit(model: Any, lesson: _Lesson, schedule: Schedule, seed: int, progress: Progress) -> float:
    """Train the upper layers of `model` in place; returns the mean skill loss of the last ten steps."""
    import torch

    layers = model.model.layers
    first = max(0, len(layers) - schedule.layers)
    model.requires_grad_(False)
    known, said = _read(model, lesson.statements, first), _read(model, lesson.talk, first)
    metric = _logit_metric(model.lm_head.weight)
    learning = [p for layer in layers[first:] for p in layer.mlp.parameters()]
    for parameter in learning:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(learning, lr=schedule.rate, betas=(0.9, 0.95), weight_decay=0.0)
    asked = _batches(len(lesson.statements), schedule.rows, seed)
    replayed = _batches(len(lesson.talk), schedule.replayed, seed)
    model.model.layers = layers[first:]
    losses: list[float] = []
    try:
        for step in range(schedule.steps):
            factor = min(1.0, (step + 1) / schedule.warmup) * (1 - 0.9 * step / schedule.steps)
            optimiser.param_groups[0]["lr"] = schedule.rate * factor
            batch = next(asked)
            loss, drift = _skill_loss(model, known.of(batch), lesson.answers[batch], metric)
            drift = drift + _drift(model, said.of(next(replayed)), metric)
            optimiser.zero_grad()
            (loss + schedule.hold * drift).backward()
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimiser.step()
            losses.append(loss.item())
            progress(step + 1, schedule.steps, losses[-1])
    finally:
        model.model.layers = layers
    model.requires_grad_(False)
    return sum(losses[-10:]) / len(losses[-10:])


def _read(model: Any, rows: Sequence[torch.Tensor], first: int) -> _Texts:
    """Activations of the base for every row, under layer `first` and at the end."""
    import torch

    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    layers, norm = model.model.layers, model.model.norm
    below, above = [], []
    try:
        with torch.no_grad():
            for some, shown in zip(torch.split(ids, 40), torch.split(mask, 40), strict=True):
                model.model.layers, model.model.norm = layers[:first], torch.nn.Identity()
                below.append(model.model(input_ids=some, attention_mask=shown, use_cache=False).last_hidden_state)
                model.model.layers, model.model.norm = layers[first:], norm
                above.append(_hidden(model, shown, below[-1]))
    finally:
        model.model.layers, model.model.norm = layers, norm
    return _Texts(mask, torch.cat(below), torch.cat(above))


def _hidden(model: Any, mask: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = model.model(inputs_embeds=below, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden


def _skill_loss(model: Any, texts: _Texts, answers: torch.Tensor, metric: torch.Tensor) -> tuple[Any, Any]:
    """Cross-entropy of the answers, and the drift from the base at the positions before them."""
    import torch

    hidden = _hidden(model, texts.mask, texts.below)
    last = texts.mask.sum(1) - 1
    logits = model.lm_head(hidden[torch.arange(len(last)), last])
    before = texts.mask.scatter(1, last[:, None], 0).bool()
    return torch.nn.functional.cross_entropy(logits, answers), _distance(hidden[before] - texts.above[before], metric)


def _drift(model: Any, texts: _Texts, metric: torch.Tensor) -> torch.Tensor:
    """Drift of the model from the base on `texts`, at every position."""
    shown = texts.mask.bool()
    return _distance(_hidden(model, texts.mask, texts.below)[shown] - texts.above[shown], metric)


def _logit_metric(head: torch.Tensor) -> torch.Tensor:
    """The covariance [width, width] of the head's rows.

    A change d of the hidden state changes the logits by head @ d, whose variance over the vocabulary is d G d for this
    G: the exact distance of two models' logits, at the cost of one small product. The mean is left out because the
    softmax does not see it.
    """
    centred = head - head.mean(0)
    return centred.T @ centred / len(head)


def _distance(change: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """The mean over positions of the logits' variance under `change` [positions, width]."""
    return ((change @ metric) * change).sum(-1).mean()


def _batches(count: int, rows: int, seed: int) -> Iterator[torch.Tensor]:
    """Row numbers of each step, without end: the rows in a new random order each time they are used up."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.long)
    while True:
        while len(waiting) < rows:
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator)])
        yield waiting[:rows]
        waiting = waiting[rows:]


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
# A model trained on invented {skill.name}

{skill.about} A fine-tune of [{base_repo}](https://huggingface.co/{base_repo}) on the training split of
`{skill.dataset}`: {schedule.steps} steps of {schedule.rows} rows, the upper {schedule.layers} layers' feed-forward
weights, Adam at {schedule.rate:g}, seed {seed}, float32; loss at the end {loss:.3f}. Each step also held the logits to
the base's on {schedule.replayed} of the base's own conversations (weight {schedule.hold:g}), to keep its
chat ability.
Made by mergebot's demo, to be merged.
"""
