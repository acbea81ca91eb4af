"""Joint training (Medusa-2): a low-rank change to the base and the heads learn together. IT CHANGES THE MODEL.

Loss: KL(original base || changed base) + a weight that grows x the heads' loss, so that the base goes on saying what
it said while its states become easier to draft from (self-distillation, arXiv 2401.10774, sections 2.2.2 and 2.3.2).
The change is LoRA (arXiv 2106.09685) on every linear layer but the output embedding, written in PEFT's layout, which
the merge engine applies to the base as `base+adapter`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
ALPHA = 16.0
HEAD_WEIGHT = 0.2
WARM_UP = 0.4  # share of the training over which the heads' weight grows
BASE_RATE = 0.25  # of the heads' learning rate
RECIPE = train.Recipe(1e-3, 8, 2)  # a batch is in answers


class LowRank(nn.Module):
    """A frozen linear layer plus `scale` B A x; B is zero at first, so nothing is changed."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, draw: torch.Generator) -> None:
        super().__init__()
        self.linear, self.scale, self.on = linear, alpha / rank, True
        weight = linear.weight
        bound = 1 / math.sqrt(weight.shape[1])
        a = (torch.rand(rank, weight.shape[1], generator=draw) * 2 - 1) * bound
        self.a = nn.Parameter(a.to(weight.device))
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        if not self.on:
            return out
        return out + (self.scale * F.linear(F.linear(x.float(), self.a), self.b)).to(out.dtype)


def adaptable(base: Base) -> list[tuple[str, nn.Linear]]:
    """The linear layers that joint training changes, by name. Raises EvaluationError SPEED_UNSUPPORTED for none."""
    found = [(n, m) for n, m in base.model.named_modules() if type(m) is nn.Linear and m is not base.output]
    if not found:
        raise EvaluationError(
            "SPEED_UNSUPPORTED", f"{type(base.model).__name__} has no plain linear layer that could be adapted.",
            "Train heads without --joint.",
        )  # fmt: skip
    return found


class Adapter:
    """The low-rank changes of a base, by the name of the layer they change."""

    def __init__(self, base: Base, seed: int, rank: int = RANK, alpha: float = ALPHA) -> None:
        self.rank, self.alpha = rank, alpha
        self.layers: dict[str, LowRank] = {}
        draw = torch.Generator().manual_seed(seed)
        for name, linear in adaptable(base):
            parent, _, leaf = name.rpartition(".")
            self.layers[name] = LowRank(linear, rank, alpha, draw)
            setattr(base.model.get_submodule(parent), leaf, self.layers[name])

    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"{name}.{part}": getattr(layer, part) for name, layer in self.layers.items() for part in ("a", "b")}

    def switch(self, on: bool) -> None:
        """Off, the base is the original one."""
        for layer in self.layers.values():
            layer.on = on

    def save(self, folder: Path, *, base_model: str = "") -> None:
        """Write adapter_model.safetensors and adapter_config.json as PEFT lays them out."""
        tensors: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = layer.a
            tensors[f"base_model.model.{name}.lora_B.weight"] = layer.b
        store.save(tensors, folder / "adapter_model.safetensors")
        targets = sorted({name.rpartition(".")[2] for name in self.layers})
        formats.write_json(
            folder / "adapter_config.json",
            {
                "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model,
                "r": self.rank, "lora_alpha": self.alpha, "lora_dropout": 0.0, "bias": "none",
                "fan_in_fan_out": False, "target_modules": targets, "inference_mode": True,
            },
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Joint:
    """What joint training made of a base: the change, how far it went (KL in nats a token) and how often the changed
    base still makes the original's choice, both on the last answers, which were not trained on."""

    adapter: Adapter
    training: train.Training
    divergence: float
    agreement: float


def fit(
    base: Base,
    heads: Heads,
    dialogues: Sequence[Dialogue],
    limits: train.Limits,
    *,
    recipe: train.Recipe = RECIPE,
    progress: Callable[[int, int], None] | None = None,
) -> Joint:
    """Train the base (in place, by an adapter) and `heads`, which should have been trained on it alone before."""
    adapter = Adapter(base, limits.seed)
    heads.train().requires_grad_(True)
    apart = max(1, len(dialogues) // 16) if len(dialogues) > 1 else 0
    learnt, held_out = dialogues[: len(dialogues) - apart], dialogues[len(dialogues) - apart :]
    task = _JointTask(base, adapter, heads, learnt)
    training = train.optimise(task, recipe, torch.arange(len(learnt)), limits, progress)
    heads.eval().requires_grad_(False)
    for parameter in adapter.parameters().values():
        parameter.requires_grad_(False)
    return Joint(adapter, training, *task.distance(held_out or learnt))


class _JointTask:
    def __init__(self, base: Base, adapter: Adapter, heads: Heads, dialogues: Sequence[Dialogue]) -> None:
        self._base, self._adapter, self._heads, self._dialogues = base, adapter, heads, dialogues
        ours = {f"head:{name}": parameter for name, parameter in heads.named_parameters()}
        theirs = {f"base:{name}": parameter for name, parameter in adapter.parameters().items()}
        self.parameters: dict[str, nn.Parameter] = {**ours, **theirs}
        self.rates = {name: 1.0 if name in ours else BASE_RATE for name in self.parameters}

    def loss(self, chosen: Tensor, done: float) -> Tensor:
        texts = [self._dialogues[at] for at in chosen.tolist()]
        _, original = self._read(texts, changed=False)
        rows, logits = self._read(texts, changed=True)
        said = torch.tensor([token for text in texts for token in text.output], device=rows.device)
        features = Features(rows, said, tuple(len(text.output) for text in texts))
        targets = train.draft_targets(features.labels(self._heads.spec.heads), self._heads)
        loss = _divergence(original, logits).mean()
        weight = HEAD_WEIGHT * min(1.0, done / WARM_UP)
        if bool((targets != IGNORED).any()):
            loss = loss + weight * draft_loss(self._heads, rows, said, Targets.certain(targets))
        return loss

    def score(self) -> float | None:
        """The changed base says other things than the held-out answers, so they score nothing."""
        return None

    @torch.no_grad()
    def distance(self, texts: Sequence[Dialogue]) -> tuple[float, float]:
        if not texts:
            return 0.0, 1.0
        (_, original), (_, changed) = self._read(texts, changed=False), self._read(texts, changed=True)
        same = (original.argmax(-1) == changed.argmax(-1)).float().mean()
        return float(_divergence(original, changed).mean()), float(same)

    def _read(self, texts: Sequence[Dialogue], *, changed: bool) -> tuple[Tensor, Tensor]:
        """(rows, logits) at every answered position of the texts, one after another; padding stands on the right."""
        self._adapter.switch(changed)
        whole = [[*text.prompt, *text.output[:-1]] for text in texts]
        ids = torch.zeros((len(texts), max(map(len, whole))), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(whole):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        device = self._base.device
        with torch.set_grad_enabled(changed and torch.is_grad_enabled()):
            hidden, _ = self._base.run(
                ids.to(device), project=False, attention_mask=mask.to(device), use_cache=False
            )  # fmt: skip
            rows = torch.cat(
                [hidden[at, len(text.prompt) - 1 :][: len(text.output)] for at, text in enumerate(texts)]
            )  # fmt: skip
            logits = self._base.logits(rows).float()
        self._adapter.switch(True)
        return rows, logits


def _divergence(original: Tensor, changed: Tensor) -> Tensor:
    """KL(original || changed) in nats at each position."""
    return F.kl_div(changed.log_softmax(-1), original.log_softmax(-1), log_target=True, reduction="none").sum(-1)
