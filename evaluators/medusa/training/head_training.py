"""Head training for a checkpoint, from prompts to files, within a time budget; an interrupted run can be resumed.

OUT/medusa_lm_head.safetensors, config.json   heads (formats)
OUT/training.json                             record of the training (training_file)
OUT/adapter/                                  joint training only: the change to the base as a PEFT adapter
OUT/unfinished/                               state of a run, removed when the heads are complete
CACHE/                                        answers and hidden states by content (store), shared by all runs
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from bot.errors import EvaluationError
from evaluators import repetition
from evaluators.content import content_digest
from evaluators.medusa import formats
from evaluators.medusa.drafting import drafters
from evaluators.medusa.drafting.heads import Heads, HeadSpec, require_own_projection
from evaluators.medusa.model import causal_lm, packed, support
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.training import distillation, joint, prompt_sets, simulation, train, training_file
from evaluators.medusa.training.store import Checkpoint, Store, key_of

GENERATED_BY = {False: 0.78, True: 0.4}  # share of the budget, by `joint`
HEADS_BY = {False: 0.97, True: 0.6}
HELD_OUT = 32
HELD_OUT_SHARE = 0.2  # of the time for answers, at most
LEAST_SHARE = 8  # one of this many given prompts is held out
SCORES = 16
PATIENCE = 8  # the learning rate falls to the end, and most of the gain comes there
RECIPE = train.LONG
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class HeadTrainingConfig:
    """Shape of the heads, data and length of their training. `vocab` None is the whole vocabulary.

    With `steps` and `answers` (number of training prompts) the work is fixed and the result is reproducible; otherwise
    `budget_s` seconds are used. `prompts` replaces the built-in training prompts; prompts in `test` are excluded from
    training. `fit_s` replaces the time that is left for training the heads.
    """

    budget_s: float = 600.0
    kind: Literal["shared", "own"] = "shared"
    heads: int = train.HEADS
    layers: int = 1
    conditioned: bool = True
    vocab: int | None = train.DRAFT_VOCABULARY
    prompts: Path | None = None
    test: Path | None = None
    seed: int = 0
    joint: bool = False
    steps: int | None = None
    answers: int | None = None
    answer_tokens: int = distillation.ANSWER_TOKENS
    batch: int = 96
    checkpoint_s: float = 30.0
    dtype: str = "auto"
    fit_s: float | None = None
    recipe: train.Recipe = RECIPE


@dataclass(slots=True)
class Work:
    """State of a run. `spent_s` is the time of earlier, interrupted runs of the same work."""

    folder: Path
    out: Path
    config: HeadTrainingConfig
    store: Store
    identity: str
    progress: Progress
    began: float = field(default_factory=time.monotonic)
    spent_s: float = 0.0
    batches: list[str] = field(default_factory=list)
    answered: bool = False
    resumed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def unfinished(self) -> Path:
        return self.out / "unfinished"

    def used_s(self) -> float:
        return self.spent_s + time.monotonic() - self.began

    def left_s(self, share: float) -> float:
        return share * self.config.budget_s - self.used_s()

    def save(self) -> None:
        """Write the state atomically."""
        self.unfinished.mkdir(parents=True, exist_ok=True)
        state = {
            "identity": self.identity,
            "spent_s": self.used_s(),
            "batches": self.batches,
            "answered": self.answered,
            "resumed": self.resumed,
            "seconds": self.seconds,
        }
        formats.write_json(self.unfinished / "state.json", state)

    def resume(self) -> None:
        """Read the state of an interrupted run of the same work, if there is one."""
        try:
            facts = json.loads((self.unfinished / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if not isinstance(facts, dict) or facts.get("identity") != self.identity:
            return
        self.spent_s, self.batches, self.answered = facts["spent_s"], facts["batches"], facts["answered"]
        self.resumed, self.seconds = facts["resumed"] + 1, facts["seconds"]

    def end_stage(self, stage: str, began: float) -> None:
        """Add the time of a stage and save."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - began
        self.save()

    def checkpoint(self, name: str) -> Checkpoint:
        file = self.unfinished / f"{name}.safetensors"
        return Checkpoint(file, self.identity, self.config.checkpoint_s, lambda _: self.save())


def train_heads(
    model: Path,
    out: Path,
    cache: Path,
    config: HeadTrainingConfig,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train heads for the checkpoint in `model` and write them under `out`. Returns the contents of training.json.

    A call with the same arguments resumes an interrupted run. `progress` gets (stage, done, total). Raises
    EvaluationError for a checkpoint that cannot be loaded, cannot verify a tree (before its weights are read) or does
    not support left padding.
    """
    work, (train_texts, held_out_texts), dropped, content = _work(model, out, cache, config, device, progress)
    work.progress("load", 0, 1)
    base = _load_base(model, device, config)
    prompts, shortened = _encoded(base, train_texts, config.answer_tokens)
    held_out_prompts, _ = _encoded(base, held_out_texts, config.answer_tokens)
    work.progress("load", 1, 1)
    work.end_stage("load", work.began)
    held_out, dialogues = _answers(work, base, prompts, held_out_prompts, content)
    distillation.check(base, dialogues or held_out)
    heads, record = _train_heads(work, base, dialogues, held_out)
    record |= {
        "prompts": len(dialogues),
        "dropped_prompts": dropped,
        "shortened_prompts": sum(shortened[: len(dialogues)]),
        "prompt_fingerprints": " ".join(map(prompt_sets.fingerprint, train_texts[: len(dialogues)])),
        "looping_answers": sum(repetition.loops(each.output) for each in dialogues),
    }
    if config.joint:
        record |= _train_jointly(work, base, heads, dialogues, held_out_prompts)
    record["seconds"] = {name: round(value, 2) for name, value in work.seconds.items()}
    record["seconds"]["total"] = round(work.used_s(), 2)
    record |= {"resumed": work.resumed, "chat_template": prompt_sets.takes_turns(base)}
    training_file.write(heads, record, out, base_model=model.name)
    shutil.rmtree(work.unfinished, ignore_errors=True)
    return record


def _work(
    model: Path, out: Path, cache: Path, config: HeadTrainingConfig, device: str, progress: Progress | None
) -> tuple[Work, list[list[str]], list[str], str]:
    """(work, texts of training and held-out prompts, ids of dropped prompts, digest of the checkpoint)."""
    began = time.monotonic()
    support.require_trees(model)
    content = content_digest(model)
    fields = {name: value for name, value in asdict(config).items() if name not in ("checkpoint_s", "prompts", "test")}
    *splits, dropped = _prompts(config)
    texts = [[prompt.turns[0] for prompt in split] for split in splits]
    identity = key_of([content, fields, texts, device, torch.__version__, transformers.__version__])
    work = Work(model, out, config, Store(cache), identity, progress or (lambda *_: None), began)
    work.resume()
    return work, texts, dropped, content


def _load_base(folder: Path, device: str, config: HeadTrainingConfig) -> Base:
    """Load the model. Raises EvaluationError SPEED_UNSUPPORTED if it does not support the configured training."""
    # Joint training needs gradients through the layers, and full precision.
    base = causal_lm.load(folder, device) if config.joint else packed.load(folder, device, config.dtype)[0]
    if config.joint:
        joint.adaptable_layers(base)
    if config.kind == "own":
        require_own_projection(base)
    return base


def _prompts(config: HeadTrainingConfig) -> tuple[list[prompt_sets.Prompt], list[prompt_sets.Prompt], list[str]]:
    """(training, calibration, ids of dropped prompts), without near duplicates among them and the test prompts."""
    test = prompt_sets.builtin("test", config.seed) if config.test is None else prompt_sets.read(config.test)
    if config.prompts is None:
        chosen, held_out = (prompt_sets.builtin(split, config.seed) for split in ("train", "calibration"))
    else:
        given = prompt_sets.read(config.prompts)
        first = min(HELD_OUT, max(1, len(given) // LEAST_SHARE))
        held_out, chosen = given[:first], given[first:] or given
    chosen, held_out, dropped = prompt_sets.apart(chosen, held_out, test, HELD_OUT)
    if not chosen:
        raise EvaluationError(
            "SPEED_CHECK_FAILED",
            "No training prompt is left that is not also a test or calibration prompt.",
            "Give more prompts, one per line.",
        )
    return chosen[: config.answers], held_out, dropped


def _encoded(base: Base, texts: Sequence[str], answer_tokens: int) -> tuple[list[list[int]], list[bool]]:
    """Token ids of prompts, and for each prompt True if only its end fits into the context."""
    whole = [prompt_sets.encode(base, text) for text in texts]
    prompts = [prompt_sets.shortened(base, ids, answer_tokens) for ids in whole]
    return prompts, [len(prompt) < len(ids) for prompt, ids in zip(prompts, whole, strict=True)]


# -- stages ------------------------------------------------------------------------------------------------------------


def _answers(
    work: Work, base: Base, prompts: Sequence[list[int]], held_out_prompts: Sequence[list[int]], content: str
) -> tuple[list[distillation.Dialogue], list[distillation.Dialogue]]:
    """(held-out, training) answers. Each batch is generated once and stored.

    Within a budget the held-out answers take at most HELD_OUT_SHARE of the time, and batches are sized so that most of
    the remaining time is left for generation after the prefill.
    """
    config = work.config
    time_s = GENERATED_BY[config.joint] * config.budget_s
    deadline = None if config.answers is not None else work.began - work.spent_s + time_s
    held_out: list[distillation.Dialogue] = []
    dialogues: list[distillation.Dialogue] = []
    rows, batch_s, number = config.batch, 0.0, 0
    while len(dialogues) < len(prompts):
        began = time.monotonic()
        first = number == 0 and bool(held_out_prompts)  # the first batch holds the held-out prompts
        group = held_out_prompts if first else prompts[len(dialogues) : len(dialogues) + rows]
        resumed = number < len(work.batches)
        # A batch that the deadline would cut holds only beginnings of answers, so it is not started.
        late = deadline is not None and bool(dialogues) and began + batch_s > deadline
        if not resumed and (work.answered or late):
            break
        key = work.batches[number] if resumed else key_of([content, group, config.answer_tokens, *_settings(base)])
        until = began + HELD_OUT_SHARE * time_s if first and deadline is not None else deadline
        answers, key, prefill_s = _batch(work, base, group, key, until)
        (held_out if first else dialogues).extend(answers)
        if not resumed:
            work.batches.append(key)
        number, batch_s = number + 1, time.monotonic() - began
        if first and deadline is not None and prefill_s:
            fits = distillation.PREFILL_SHARE * (deadline - time.monotonic()) * len(group) / prefill_s
            rows = max(distillation.LEAST_ROWS, min(rows, int(fits)))
        work.end_stage("generate", began)
        work.progress("generate", len(held_out) + len(dialogues), len(prompts) + len(held_out_prompts))
    work.answered = True
    work.save()
    return held_out, dialogues


def _settings(base: Base) -> list[str | int]:
    """Settings that can change hidden states in the last bit."""
    versions = [torch.__version__, transformers.__version__]
    return [str(base.dtype), base.execution, base.device.type, torch.get_num_threads(), *versions]


def _batch(
    work: Work, base: Base, group: Sequence[Sequence[int]], key: str, deadline: float | None
) -> tuple[list[distillation.Dialogue], str, float]:
    """(answers to one batch, their key, seconds of the prefill). Stored answers take 0 seconds.

    Answers that the deadline cut short are stored under another key.
    """
    stored = work.store.get(key)
    if stored is not None:
        return distillation.unpack(stored), key, 0.0
    limit = work.config.answer_tokens
    dialogues, prefill_s = distillation.answer(base, group, limit, deadline)
    if any(len(each.output) < limit and each.output[-1] not in base.stop_ids for each in dialogues):
        key = key_of([key, [each.output for each in dialogues]])
    work.store.put(key, distillation.pack(dialogues))
    return distillation.unpack(work.store.get(key) or distillation.pack(dialogues)), key, prefill_s


def _train_heads(
    work: Work, base: Base, dialogues: list[distillation.Dialogue], held_out: list[distillation.Dialogue]
) -> tuple[Heads, dict[str, Any]]:
    """Train heads on the frozen base. Returns heads and contents of training.json."""
    config = work.config
    features, held_out_features = (
        distillation.on_disk(base, distillation.drop_looping(answers)) for answers in (dialogues, held_out)
    )
    began, before_s = time.monotonic(), work.used_s()
    options = train.TrainingOptions(
        config.recipe,
        max(1.0, config.fit_s or work.left_s(HEADS_BY[config.joint])),
        config.seed,
        config.steps,
        SCORES,
        None if config.steps else PATIENCE,
        work.checkpoint("heads"),
        config.vocab,
    )
    spec = HeadSpec(config.kind, config.heads, config.layers, config.conditioned)
    progress = partial(work.progress, "fit")
    heads, training = train.fit(spec, base, features, options, held_out=held_out_features, progress=progress)
    record = training_file.record(options, features, held_out_features, heads, training)
    work.end_stage("fit", began)
    start_s = max(0.0, before_s if not training.resumed else work.used_s() - training.seconds)
    curve = [{**point, "minutes": round(start_s / 60 + point["fit_minutes"], 3)} for point in record["curve"]]
    return heads, record | {"generate_s": round(work.seconds["generate"], 2), "curve": curve}


def _train_jointly(
    work: Work, base: Base, heads: Heads, dialogues: Sequence[distillation.Dialogue], held_out: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Train base and heads together and write the adapter; the heads then fit only the changed base.

    Returns the record of the joint training and the new accuracy of the heads.
    """
    began, config = time.monotonic(), work.config
    checkpoint, budget_s = work.checkpoint("joint"), max(1.0, work.left_s(0.95))
    options = train.TrainingOptions(joint.RECIPE, budget_s, config.seed, config.steps, checkpoint=checkpoint)
    result = joint.fit(base, heads, dialogues, options, partial(work.progress, "joint"))
    result.adapter.save(work.out / "adapter", base_model=work.folder.name)
    work.end_stage("joint", began)
    answers = distillation.self_distil(base, held_out, max_new_tokens=config.answer_tokens) if held_out else []
    features = distillation.stack_features(base, distillation.drop_looping(answers))
    record: dict[str, Any] = {
        "joint": {
            "changes_the_model": True,
            "rank": joint.RANK,
            "steps": result.training.steps,
            "kl": result.divergence,
            "same_choice": result.agreement,
            "tokens_per_step": train.held_out_rate(heads, features),
        }
    }
    if features.lengths:  # the heads are used with the changed base, so their accuracy is measured on its answers
        record["accuracy"] = simulation.accuracy(drafters.drafting(heads), features).shares
    return record
