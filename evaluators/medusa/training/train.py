"""Training heads on a frozen base: features in, heads out, within a time budget.

AdamW without decay, 5 % warm-up, cosine to 2 %, the loss of head_loss, the best epoch by tokens per step on held-out
answers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from evaluators.medusa.drafting import drafters
from evaluators.medusa.drafting.heads import Heads, HeadSpec, vocabulary_cut
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.training.distillation import IGNORED, Features
from evaluators.medusa.training.head_loss import SoftTargets, draft_loss, frozen_unembedding
from evaluators.medusa.training.simulation import accuracy, simulate
from evaluators.medusa.training.store import Checkpoint
from evaluators.medusa.trees.tree import greedy_tree

BETAS = (0.9, 0.99)
WARM_UP = 0.05
FLOOR = 0.02
PROBE_STEPS = 3
SAMPLED_ROWS = 4096
COMMON_NODES = 8
SCORING = 0.15  # of the budget at most
HEADS = 3
DRAFT_VOCABULARY = 8192
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Recipe:
    """`batch` is in positions."""

    learning_rate: float
    batch: int
    epochs: int


# Three epochs suffice for a few thousand positions (measured on a 135 M Llama, 8,000 positions, 16 nodes: 1.65 tokens
# per step after three epochs and after six; 1.63 at a rate of 3e-3). Twice the text gains more than twice the epochs.
QUICK = Recipe(2e-3, 128, 3)
LONG = Recipe(2e-3, 256, 4)


@dataclass(frozen=True, slots=True)
class Training:
    """Result of a training.

    `held_out` holds tokens per step on the calibration answers per score, by default one per epoch; `best_epoch` is
    the index of the best; `curve` has (step, seconds, tokens per step) for each score.
    """

    positions: int
    steps: int
    planned_steps: int
    epochs: float
    seconds: float
    seed: int
    first_loss: float | None
    last_loss: float | None
    held_out: tuple[float, ...]
    best_epoch: int | None
    curve: tuple[tuple[int, float, float], ...] = ()
    resumed: int = 0


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """Recipe and length of a training: exactly `steps`, or the steps of the recipe that fit into `budget_s`.

    The training is scored `scores` times at equal intervals (None: after each epoch) and stops after `patience` scores
    without improvement. With a `checkpoint` an interrupted training is resumed. `vocab` is the size of the draft
    vocabulary of heads, None for the whole one.
    """

    recipe: Recipe
    budget_s: float
    seed: int = 0
    steps: int | None = None
    scores: int | None = None
    patience: int | None = None
    checkpoint: Checkpoint | None = None
    vocab: int | None = None


class Task(Protocol):
    """Trainable parameters and their loss.

    `rates` scales the learning rate by parameter name; `score` is None without held-out data.
    """

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]: ...

    @property
    def rates(self) -> Mapping[str, float]: ...

    def loss(self, chosen: Tensor, done: float) -> Tensor:
        """Loss on the examples `chosen` after the share `done` of the training."""
        ...

    def score(self) -> float | None: ...


def fit(
    spec: HeadSpec,
    base: Base,
    features: Features,
    options: TrainingOptions,
    *,
    held_out: Features | None = None,
    initial: Heads | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Heads, Training]:
    """Train heads of the shape `spec` on the frozen base.

    The same seed gives the same heads as long as the budget does not reduce the planned steps. The heads start
    untrained or from `initial`, which must have the same spec. After a few timed steps the number of steps is fixed
    (`planned_steps` if the budget allows), so the schedule depends on the clock only once. `progress` gets (steps done,
    steps).
    """
    began = time.monotonic()
    if spec.keep is None and options.vocab is not None and options.vocab < base.vocab:
        spec = replace(spec, keep=vocabulary_cut(features.tokens.tolist(), options.vocab, base))
    heads = Heads(spec, base)
    if initial is not None:
        heads.load_state_dict(initial.state_dict())
    heads.take_embeddings_at(embedding_scale(base, features))
    task = HeadTask(heads, features, held_out)
    prepared_s = time.monotonic() - began
    training = optimise(task, task.usable, replace(options, budget_s=options.budget_s - prepared_s), progress)
    heads.take_embeddings_at(1.0)
    return heads.eval().requires_grad_(False), training


@torch.no_grad()
def embedding_scale(base: Base, features: Features) -> float:
    """Return the power of two that best scales embeddings to the root mean square of hidden rows.

    Input embeddings are often far smaller than the rows after the final norm, and AdamW then learns less from them
    (measured on a 135 M Llama with embeddings a sixteenth as large: 0.04 tokens per step with 16 nodes).
    """
    sample = slice(0, SAMPLED_ROWS)
    sizes = [x.float().pow(2).mean() for x in (features.hidden[sample], base.embed(features.tokens[sample]))]
    ratio = float(sizes[0] / sizes[1]) if len(features.tokens) else 1.0
    return 2.0 ** round(math.log2(ratio) / 2) if 0 < ratio < math.inf else 1.0


class HeadTask:
    """Heads on a frozen base with soft targets, scored by tokens per step on held-out answers."""

    def __init__(self, heads: Heads, features: Features, held_out: Features | None) -> None:
        self.heads, self._features, self._held_out = heads, features, held_out
        self.parameters = dict(heads.named_parameters())
        self.rates = dict.fromkeys(self.parameters, 1.0)
        guessed = draft_targets(features.labels(heads.spec.heads), heads)
        self.usable = (guessed != IGNORED).any(0).nonzero().squeeze(-1)
        self._unembed = frozen_unembedding(heads)
        self._targets = SoftTargets(heads, features, draft_targets(features.tokens, heads), guessed)

    def loss(self, chosen: Tensor, done: float) -> Tensor:
        h, following = self._features.hidden[chosen], self._features.tokens[chosen]
        return draft_loss(self.heads, h, following, self._targets.at(chosen), self._unembed)

    def score(self) -> float | None:
        return held_out_rate(self.heads, self._held_out)


def optimise(
    task: Task, usable: Tensor, options: TrainingOptions, progress: Callable[[int, int], None] | None = None
) -> Training:
    """Train `task` on the examples with the indices `usable` and restore its best score."""
    if not len(usable) or options.recipe.epochs < 1:
        return Training(0, 0, 0, 0.0, 0.0, options.seed, None, None, (), None)
    loop = _Loop(task, usable, options)
    while not loop.over:
        loop.advance()
        if progress is not None:
            progress(loop.step, loop.total)
    return loop.end()


class _Loop:
    """An unfinished training; the complete state of the next step can be saved and resumed."""

    def __init__(self, task: Task, usable: Tensor, options: TrainingOptions) -> None:
        self._task, self._recipe, self._usable, self._options = task, options.recipe, usable, options
        self._per_epoch = math.ceil(len(usable) / self._recipe.batch)
        self.planned = self.total = options.steps or self._per_epoch * self._recipe.epochs
        self._optimizer = torch.optim.AdamW(self._groups(), betas=BETAS, weight_decay=0.0, fused=True)
        self.step, self._resumed, self._before_s = 0, 0, 0.0
        self._losses: list[float] = []
        self._curve: list[tuple[int, float, float]] = []
        self._best: dict[str, Tensor] = {}
        self._best_at: int | None = None
        self._scores = options.scores
        self._resume()
        self._started = time.monotonic()
        self._batches = self._shuffled(self.step)

    @property
    def over(self) -> bool:
        waited = len(self._curve) - 1 - (self._best_at or 0)
        return self.step >= self.total or (self._options.patience is not None and waited >= self._options.patience)

    @property
    def _seconds(self) -> float:
        return self._before_s + time.monotonic() - self._started

    def advance(self) -> None:
        """Run one step, then score and save if due."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._recipe.learning_rate * group["scale"] * _schedule(self.step, self.total)
        loss = self._task.loss(next(self._batches), self.step / self.total)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._losses = [*self._losses[:1], float(loss.detach())]
        self.step += 1
        if self.step == PROBE_STEPS and self._options.steps is None:
            self._fit_budget()
        if self.step == self.total or self.step % self._between_scores() == 0:
            self._score()
        kept = self._options.checkpoint
        if kept is not None and kept.due():
            kept.save(self._tensors(), self._facts())

    def _fit_budget(self) -> None:
        """Fix the numbers of steps and scores, so that scoring a large vocabulary does not use up the budget."""
        per_step = self._seconds / self.step
        left_s = self._options.budget_s
        if self._scores is not None:
            began = time.monotonic()
            self._task.score()
            each = max(time.monotonic() - began, 1e-9)
            self._scores = max(1, min(self._scores, int(SCORING * left_s / each)))
            left_s -= (self._scores + 1) * each
        self.total = max(self.step, min(self.planned, int(left_s / max(per_step, 1e-9))))

    def end(self) -> Training:
        with torch.no_grad():
            for name, tensor in self._best.items():
                self._task.parameters[name].copy_(tensor)
        return Training(
            len(self._usable),
            self.step,
            self.planned,
            self.step * self._recipe.batch / len(self._usable),
            self._seconds,
            self._options.seed,
            self._losses[0],
            self._losses[-1],
            tuple(score for _, _, score in self._curve),
            self._best_at,
            tuple(self._curve),
            self._resumed,
        )

    def _groups(self) -> list[dict[str, Any]]:
        scales = dict.fromkeys(self._task.rates.values())
        named = self._task.parameters.items()
        return [{"params": [p for name, p in named if self._task.rates[name] == s], "scale": s} for s in scales]

    def _shuffled(self, begin: int) -> Iterator[Tensor]:
        """Batches of all epochs from step `begin`; each epoch is a permutation drawn from one generator."""
        order = torch.Generator().manual_seed(self._options.seed)
        number = 0
        while True:
            permuted = self._usable[torch.randperm(len(self._usable), generator=order).to(self._usable.device)]
            for chosen in torch.split(permuted, self._recipe.batch):
                if number >= begin:
                    yield chosen
                number += 1

    def _between_scores(self) -> int:
        return self._per_epoch if self._scores is None else max(1, self.total // self._scores)

    def _score(self) -> None:
        """Score the task and keep its parameters if the score is the best so far."""
        score = self._task.score()
        if score is None:
            return
        self._curve.append((self.step, self._seconds, score))
        if self._best_at is None or score > self._curve[self._best_at][2]:
            self._best_at = len(self._curve) - 1
            self._best = {name: tensor.detach().clone() for name, tensor in self._task.parameters.items()}

    def _tensors(self) -> dict[str, Tensor]:
        saved: dict[str, Tensor] = {f"now:{name}": tensor for name, tensor in self._task.parameters.items()}
        saved |= {f"best:{name}": tensor for name, tensor in self._best.items()}
        for name, parameter in self._task.parameters.items():
            moments = self._optimizer.state[parameter]
            saved |= {f"{moment}:{name}": moments[moment] for moment in MOMENTS if moment in moments}
        return saved

    def _facts(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "total": self.total,
            "seconds": self._seconds,
            "losses": self._losses,
            "curve": self._curve,
            "best_at": self._best_at,
            "scores": self._scores,
            "resumed": self._resumed,
        }

    def _resume(self) -> None:
        """Continue from the checkpoint, if there is one."""
        found = None if self._options.checkpoint is None else self._options.checkpoint.load()
        if found is None:
            return
        tensors, facts = found
        self.step, self.total, self._before_s = facts["step"], facts["total"], facts["seconds"]
        self._losses, self._best_at = facts["losses"], facts["best_at"]
        self._curve = [(step, seconds, score) for step, seconds, score in facts["curve"]]
        self._resumed, self._scores = facts["resumed"] + 1, facts["scores"]
        for name, parameter in self._task.parameters.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"now:{name}"])
            moments = {moment: tensors.get(f"{moment}:{name}") for moment in MOMENTS}
            placed = {moment: tensor for moment, tensor in moments.items() if tensor is not None}
            if placed:
                on = {moment: t if moment == "step" else t.to(parameter.device) for moment, t in placed.items()}
                self._optimizer.state[parameter] = on
            if f"best:{name}" in tensors:
                self._best[name] = tensors[f"best:{name}"].to(parameter.device)


def draft_targets(labels: Tensor, heads: Heads) -> Tensor:
    """Token ids -> rows of the draft vocabulary; IGNORED for tokens outside it."""
    if heads.keep is None:
        return labels
    row = torch.full((heads.base.vocab,), IGNORED, dtype=torch.long, device=labels.device)
    row[heads.keep] = torch.arange(len(heads.keep), device=labels.device)
    return torch.where(labels == IGNORED, labels, row[labels.clamp_min(0)])


def _schedule(step: int, total: int) -> float:
    warm = max(1, round(WARM_UP * total))
    if step < warm:
        return (step + 1) / warm
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def held_out_rate(heads: Heads, held_out: Features | None) -> float | None:
    """Tokens per step on held-out answers with the best tree of COMMON_NODES nodes, drafted as in decoding.

    None without held-out answers.
    """
    if held_out is None or not held_out.lengths:
        return None
    drafts = drafters.drafting(heads)
    return simulate(drafts, held_out, greedy_tree(accuracy(drafts, held_out).shares, COMMON_NODES))
