"""Joint training (Medusa-2): a LoRA adapter of the base and the heads learn together. IT CHANGES THE MODEL.

Loss: KL(original base || changed base) + a growing weight x the loss of the heads. The first term keeps the answers of
the base, the second makes its states easier to draft from (self-distillation, arXiv 2401.10774, sections 2.2.2 and
2.3.2). The adapter is LoRA (arXiv 2106.09685) by the `peft` library on every linear layer except the output embedding.
The merge engine applies it as `base+adapter`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bot.errors import EvaluationError
from evaluators.medusa import formats
from evaluators.medusa.drafting.heads import Heads
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.training import store, train
from evaluators.medusa.training.distillation import IGNORED, Dialogue, Features
from evaluators.medusa.training.head_loss import Targets, draft_loss

RANK = 8
ALPHA = 16
HEAD_WEIGHT = 0.2
WARM_UP = 0.4  # share of the training over which the weight of the heads' loss grows
BASE_RATE = 0.25  # learning rate of the adapter, relative to that of the heads
RECIPE = train.Recipe(1e-3, 8, 2)  # the batch is in answers


def adaptable_layers(base: Base) -> dict[str, nn.Linear]:
    """Linear layers that joint training changes, by name. Raises EvaluationError SPEED_UNSUPPORTED without any."""
    modules = base.model.named_modules()
    layers = {name: module for name, module in modules if type(module) is nn.Linear and module is not base.output}
    if not layers:
        raise EvaluationError(
            "SPEED_UNSUPPORTED",
            f"{type(base.model).__name__} has no plain linear layer that could be adapted.",
            "Train heads without --joint.",
        )
    return layers


class Adapter:
    """A LoRA adapter that is injected into a base; `layers` are peft's LoRA layers by the name of the linear layer."""

    def __init__(self, base: Base, seed: int) -> None:
        from peft import LoraConfig, inject_adapter_in_model  # the import takes two seconds

        linear = adaptable_layers(base)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(linear))
        with torch.random.fork_rng(devices=[]):  # peft draws A from the global generator; A is drawn again below
            inject_adapter_in_model(config, base.model)
        self.layers: dict[str, Any] = {name: base.model.get_submodule(name) for name in linear}
        generator = torch.Generator().manual_seed(seed)
        for a, _ in map(_matrices, self.layers.values()):
            uniform = torch.rand(a.shape, generator=generator) * 2 - 1
            a.data.copy_(uniform * (1 / math.sqrt(a.shape[1])))

    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{part}": matrix
            for name, layer in self.layers.items()
            for part, matrix in zip("ab", _matrices(layer), strict=True)
        }

    def enable(self, enabled: bool) -> None:
        """Turn the adapter on or off; without it the base is the original one."""
        for layer in self.layers.values():
            layer.enable_adapters(enabled)

    def save(self, folder: Path, *, base_model: str = "") -> None:
        """Write adapter_model.safetensors and adapter_config.json in PEFT's layout."""
        tensors: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            a, b = _matrices(layer)
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        store.save(tensors, folder / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": RANK,
            "lora_alpha": float(ALPHA),
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "target_modules": sorted({name.rpartition(".")[2] for name in self.layers}),
            "inference_mode": True,
        }
        formats.write_json(folder / "adapter_config.json", config)


def _matrices(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """A [rank, in] and B [out, rank] of a LoRA layer."""
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


@dataclass(frozen=True, slots=True)
class JointTraining:
    """Result of joint training.

    `divergence` is the KL divergence in nats per token and `agreement` the share of tokens at which the changed base
    still makes the original's choice. Both are measured on the last answers, which were not trained on.
    """

    adapter: Adapter
    training: train.Training
    divergence: float
    agreement: float


def fit(
    base: Base,
    heads: Heads,
    dialogues: Sequence[Dialogue],
    options: train.TrainingOptions,
    progress: Callable[[int, int], None] | None = None,
) -> JointTraining:
    """Train the base (in place, by an adapter) and `heads`, which were trained on the frozen base before."""
    adapter = Adapter(base, options.seed)
    heads.train().requires_grad_(True)
    held_out_count = max(1, len(dialogues) // 16) if len(dialogues) > 1 else 0
    split = len(dialogues) - held_out_count
    task = _JointTask(base, adapter, heads, dialogues[:split])
    training = train.optimise(task, torch.arange(split), options, progress)
    heads.eval().requires_grad_(False)
    divergence, agreement = task.distance(dialogues[split:] or dialogues[:split])
    for parameter in adapter.parameters().values():
        parameter.requires_grad_(False)
    return JointTraining(adapter, training, divergence, agreement)


class _JointTask:
    def __init__(self, base: Base, adapter: Adapter, heads: Heads, dialogues: Sequence[Dialogue]) -> None:
        self._base, self._adapter, self._heads, self._dialogues = base, adapter, heads, dialogues
        of_heads = {f"head:{name}": parameter for name, parameter in heads.named_parameters()}
        of_base = {f"base:{name}": parameter for name, parameter in adapter.parameters().items()}
        self.parameters: dict[str, nn.Parameter] = {**of_heads, **of_base}
        self.rates = {name: 1.0 if name in of_heads else BASE_RATE for name in self.parameters}

    def loss(self, chosen: Tensor, done: float) -> Tensor:
        dialogues = [self._dialogues[index] for index in chosen.tolist()]
        _, original = self._answer_rows(dialogues, adapted=False)
        hidden, logits = self._answer_rows(dialogues, adapted=True)
        tokens = torch.tensor([token for each in dialogues for token in each.output], device=hidden.device)
        features = Features(hidden, tokens, tuple(len(each.output) for each in dialogues))
        targets = train.draft_targets(features.labels(self._heads.spec.heads), self._heads)
        loss = _divergence(original, logits).mean()
        weight = HEAD_WEIGHT * min(1.0, done / WARM_UP)
        if bool((targets != IGNORED).any()):
            loss = loss + weight * draft_loss(self._heads, hidden, tokens, Targets.certain(targets))
        return loss

    def score(self) -> float | None:
        """None: the changed base gives other answers, so the held-out answers of the original cannot score it."""
        return None

    @torch.no_grad()
    def distance(self, dialogues: Sequence[Dialogue]) -> tuple[float, float]:
        """KL divergence in nats per token and share of equal choices on `dialogues`."""
        if not dialogues:
            return 0.0, 1.0
        _, original = self._answer_rows(dialogues, adapted=False)
        _, adapted = self._answer_rows(dialogues, adapted=True)
        agreement = (original.argmax(-1) == adapted.argmax(-1)).float().mean()
        return float(_divergence(original, adapted).mean()), float(agreement)

    def _answer_rows(self, dialogues: Sequence[Dialogue], *, adapted: bool) -> tuple[Tensor, Tensor]:
        """Rows [T, H] and logits [T, V] that predict the answers, one answer after another, from right-padded input."""
        texts = [[*each.prompt, *each.output[:-1]] for each in dialogues]
        ids = torch.zeros((len(texts), max(map(len, texts))), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        ids, mask = ids.to(self._base.device), mask.to(self._base.device)
        self._adapter.enable(adapted)
        with torch.set_grad_enabled(adapted and torch.is_grad_enabled()):
            hidden, _ = self._base.run(ids, project=False, attention_mask=mask, use_cache=False)
            starts = [len(each.prompt) - 1 for each in dialogues]
            rows = [hidden[i, starts[i] : starts[i] + len(each.output)] for i, each in enumerate(dialogues)]
            joined = torch.cat(rows)
            logits = self._base.logits(joined).float()
        self._adapter.enable(True)
        return joined, logits


def _divergence(original: Tensor, changed: Tensor) -> Tensor:
    """KL(original || changed) in nats at each position."""
    return F.kl_div(changed.log_softmax(-1), original.log_softmax(-1), log_target=True, reduction="none").sum(-1)
