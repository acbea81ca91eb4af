"""Heads for the checkpoint in a folder, from prompts to files, inside a time budget; a killed run goes on.

OUT/medusa_lm_head.safetensors, config.json   the heads (formats)
OUT/training.json                             what it took and what came of it
OUT/adapter/                                  joint training only: the change to the base, as a PEFT adapter
OUT/unfinished/                               where a run is; gone once the heads are there
CACHE/                                        answers and hidden rows by content (store), shared by all runs
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
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
from evaluators.medusa.training import distillation, head_trainer, joint, prompt_sets, simulation, train, training_file
from evaluators.medusa.training.store import Checkpoint, Store, key_of

GENERATED_BY = {False: 0.78, True: 0.4}  # share of the budget, by whether the base is trained, too
HEADS_BY = {False: 0.97, True: 0.6}
HELD_OUT = 32
HELD_OUT_SHARE = 0.2  # of the time for answers, at most
LEAST_SHARE = 8  # of given prompts one in so many is held out
SCORES = 16
PATIENCE = 8  # the rate falls to the end, and that is where most is won
RECIPE = train.LONG
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which heads, and how much work for them. `vocab` None is the whole vocabulary.

    With `steps` and `answers` (training prompts answered) the work is fixed and the seed decides every byte; without,
    `budget_s` seconds are used up. `prompts` replaces the built-in training prompts, `test` names questions nothing
    may be trained on.
    """

    budget_s: float = 600.0
    kind: Literal["shared", "own"] = "shared"
    heads: int = head_trainer.HEADS
    layers: int = 1
    conditioned: bool = True
    vocab: int | None = head_trainer.DRAFT_VOCABULARY
    prompts: Path | None = None
    test: Path | None = None
    seed: int = 0
    joint: bool = False
    steps: int | None = None
    answers: int | None = None
    answer_tokens: int = head_trainer.ANSWER_TOKENS
    batch: int = 96
    checkpoint_s: float = 30.0
    dtype: str = "auto"
    fit_s: float | None = None  # this long for the heads' training, whatever is left of the budget
    recipe: train.Recipe = RECIPE


@dataclass(slots=True)
class Work:
    """One run on its way. `spent_s` is what earlier runs of the same work took before they were killed."""

    folder: Path
    out: Path
    wanted: Wanted
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
        return share * self.wanted.budget_s - self.used_s()

    def note(self) -> None:
        """Write down how far this has come, whole."""
        self.unfinished.mkdir(parents=True, exist_ok=True)
        facts = {"identity": self.identity, "spent_s": self.used_s(), "batches": self.batches,
                 "answered": self.answered, "resumed": self.resumed, "seconds": self.seconds}  # fmt: skip
        formats.write_json(self.unfinished / "state.json", facts)

    def take_up(self) -> None:
        """Go on from what a killed run of the same work noted."""
        try:
            facts = json.loads((self.unfinished / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if not isinstance(facts, dict) or facts.get("identity") != self.identity:
            return
        self.spent_s, self.batches, self.answered = facts["spent_s"], facts["batches"], facts["answered"]
        self.resumed, self.seconds = facts["resumed"] + 1, facts["seconds"]

    def checkpoint(self, name: str) -> Checkpoint:
        file = self.unfinished / f"{name}.safetensors"
        return Checkpoint(file, self.identity, self.wanted.checkpoint_s, lambda _: self.note())


@dataclass(frozen=True, slots=True)
class Prompts:
    """Token ids by split, and the ids of training prompts that were too close to a test or calibration prompt.

    `shortened` says of each training prompt whether the context holds only its end.
    """

    train: list[list[int]]
    held_out: list[list[int]]
    dropped: list[str]
    shortened: list[bool]


def train_heads(
    model: Path, out: Path, cache: Path, wanted: Wanted, *, device: str = "cpu", progress: Progress | None = None
) -> dict[str, Any]:
    """Train heads for the checkpoint in `model` and write them under `out`. Returns what training.json holds.

    A run that was killed goes on where it was when the same is asked again. `progress` gets (stage, done, total).
    Raises EvaluationError for a checkpoint that cannot be loaded, cannot verify a tree of guesses (before its weights
    are read) or does not take left padding.
    """
    began = time.monotonic()
    support.require_trees(model)
    content = content_digest(model)
    asked = {name: value for name, value in asdict(wanted).items() if name not in ("checkpoint_s", "prompts", "test")}
    prompts = _prompts(wanted)
    texts = [[prompt.turns[0] for prompt in split] for split in prompts[:2]]
    identity = key_of([content, asked, texts, device, torch.__version__, transformers.__version__])
    work = Work(model, out, wanted, Store(cache), identity, progress or (lambda *_: None), began)
    work.take_up()
    work.progress("load", 0, 1)
    base = _loaded(model, device, wanted)
    encoded = _encoded(base, texts, prompts[2], wanted.answer_tokens)
    work.progress("load", 1, 1)
    _noted(work, "load", began)
    held_out, learnt = _answers(work, base, encoded, content)
    distillation.check(base, learnt or held_out)
    learn, apart = (distillation.on_disk(base, distillation.drop_looping(answers)) for answers in (learnt, held_out))
    heads, facts = _fitted(work, base, learn, apart)
    facts |= {"prompts": len(learnt), "dropped_prompts": encoded.dropped,
              "shortened_prompts": sum(encoded.shortened[: len(learnt)]),
              "prompt_fingerprints": " ".join(map(prompt_sets.fingerprint, texts[0][: len(learnt)])),
              "looping_answers": sum(repetition.loops(each.output) for each in learnt)}  # fmt: skip
    if wanted.joint:
        facts |= _jointly(work, base, heads, learnt, encoded.held_out)
    facts["seconds"] = {name: round(value, 2) for name, value in work.seconds.items()}
    facts["seconds"]["total"] = round(work.used_s(), 2)
    facts |= {"resumed": work.resumed, "chat_template": prompt_sets.takes_turns(base)}
    training_file.write(heads, facts, out, base_model=model.name)
    shutil.rmtree(work.unfinished, ignore_errors=True)
    return facts


def _loaded(folder: Path, device: str, wanted: Wanted) -> Base:
    """The model as it runs in this training. Raises EvaluationError SPEED_UNSUPPORTED where it is not one for the
    wanted heads, before it answers anything."""
    # A change to the base is trained through its layers, and in full precision.
    base = causal_lm.load(folder, device) if wanted.joint else packed.load(folder, device, wanted.dtype)[0]
    if wanted.joint:
        joint.adaptable_layers(base)
    if wanted.kind == "own":
        require_own_projection(base)
    return base


def _prompts(wanted: Wanted) -> tuple[list[prompt_sets.Prompt], list[prompt_sets.Prompt], list[str]]:
    """(training, calibration, dropped): no two of training, calibration and test prompts alike."""
    test = prompt_sets.builtin("test", wanted.seed) if wanted.test is None else prompt_sets.read(wanted.test)
    if wanted.prompts is None:
        learnt, held_out = (prompt_sets.builtin(split, wanted.seed) for split in ("train", "calibration"))
    else:
        given = prompt_sets.read(wanted.prompts)
        first = min(HELD_OUT, max(1, len(given) // LEAST_SHARE))
        held_out, learnt = given[:first], given[first:] or given
    learnt, held_out, dropped = prompt_sets.apart(learnt, held_out, test, HELD_OUT)
    if not learnt:
        raise EvaluationError(
            "SPEED_CHECK_FAILED", "No training prompt is left that is not also a test or calibration prompt.",
            "Give more prompts, one a line.",
        )  # fmt: skip
    return learnt[: wanted.answers], held_out, dropped


def _encoded(base: Base, texts: Sequence[Sequence[str]], dropped: list[str], answer_tokens: int) -> Prompts:
    """`texts` are those of the training and of the held-out prompts."""
    whole = [[prompt_sets.encode(base, text) for text in split] for split in texts]
    known, unseen = ([prompt_sets.shortened(base, ids, answer_tokens) for ids in split] for split in whole)
    return Prompts(known, unseen, dropped, [len(a) < len(b) for a, b in zip(known, whole[0], strict=True)])


# -- stages ------------------------------------------------------------------------------------------------------------


def _noted(work: Work, stage: str, began: float) -> None:
    work.seconds[stage] = work.seconds.get(stage, 0.0) + time.monotonic() - began
    work.note()


def _answers(
    work: Work, base: Base, prompts: Prompts, content: str
) -> tuple[list[distillation.Dialogue], list[distillation.Dialogue]]:
    """(held-out, training) answers, batch by batch; each batch is computed once and kept.

    Within a budget the held-out answers take a fifth of the time at most, as in the speed test, and batches are as
    large as leaves most of what is left for writing.
    """
    wanted = work.wanted
    started = work.began - work.spent_s
    time_s = GENERATED_BY[wanted.joint] * wanted.budget_s
    deadline = None if wanted.answers is not None else started + time_s
    held_out: list[distillation.Dialogue] = []
    learnt: list[distillation.Dialogue] = []
    rows, took_s, number = wanted.batch, 0.0, 0
    while len(learnt) < len(prompts.train):
        began = time.monotonic()
        apart = number == 0 and bool(prompts.held_out)
        group = prompts.held_out if apart else prompts.train[len(learnt) : len(learnt) + rows]
        begun = number < len(work.batches)
        # Half answers are all beginnings, so none is begun that would be cut.
        late = deadline is not None and bool(learnt) and began + took_s > deadline
        if not begun and (work.answered or late):
            break
        key = work.batches[number] if begun else key_of([content, group, wanted.answer_tokens, *_settings(base)])
        until = began + HELD_OUT_SHARE * time_s if apart and deadline is not None else deadline
        dialogues, key, reading_s = _batch(work, base, group, key, until)
        (held_out if apart else learnt).extend(dialogues)
        if not begun:
            work.batches.append(key)
        number, took_s = number + 1, time.monotonic() - began
        if apart and deadline is not None and reading_s:
            fits = distillation.READING_SHARE * (deadline - time.monotonic()) * len(group) / reading_s
            rows = max(distillation.LEAST_ROWS, min(rows, int(fits)))
        _noted(work, "generate", began)
        work.progress("generate", len(held_out) + len(learnt), len(prompts.train) + len(prompts.held_out))
    work.answered = True
    work.note()
    return held_out, learnt


def _settings(base: Base) -> list[str | int]:
    """What else the last bit of an answer's rows depends on."""
    versions = [torch.__version__, transformers.__version__]
    return [str(base.dtype), base.execution, base.device.type, torch.get_num_threads(), *versions]


def _batch(
    work: Work, base: Base, group: Sequence[Sequence[int]], key: str, deadline: float | None
) -> tuple[list[distillation.Dialogue], str, float]:
    """The answers to one batch, their key, and the seconds that reading the prompts took, 0 for answers that were kept.

    Those that the deadline cut short are kept under a key of their own.
    """
    known = work.store.get(key)
    if known is not None:
        return distillation.unpack(known), key, 0.0
    limit = work.wanted.answer_tokens
    dialogues, reading_s = distillation.answer(base, group, limit, deadline)
    if any(len(each.output) < limit and each.output[-1] not in base.stop_ids for each in dialogues):
        key = key_of([key, [each.output for each in dialogues]])
    work.store.put(key, distillation.pack(dialogues))
    return distillation.unpack(work.store.get(key) or distillation.pack(dialogues)), key, reading_s


def _fitted(
    work: Work, base: Base, learn: distillation.Features, apart: distillation.Features
) -> tuple[Heads, dict[str, Any]]:
    """Heads on the frozen base, and the facts of their training."""
    wanted, began, before_s = work.wanted, time.monotonic(), work.used_s()
    limits = train.Limits(
        max(1.0, wanted.fit_s or work.left_s(HEADS_BY[wanted.joint])), wanted.seed, wanted.steps, SCORES,
        None if wanted.steps else PATIENCE, work.checkpoint("heads"),
    )  # fmt: skip
    spec = HeadSpec(wanted.kind, wanted.heads, wanted.layers, wanted.conditioned)
    heads, training, facts = head_trainer.learn(
        head_trainer.Course(spec, wanted.recipe, limits, wanted.vocab), base, learn, apart,
        lambda done, total: work.progress("fit", done, total),
    )  # fmt: skip
    _noted(work, "fit", began)
    start_s = max(0.0, before_s if not training.resumed else work.used_s() - training.seconds)
    curve = [{**point, "minutes": round(start_s / 60 + point["fit_minutes"], 3)} for point in facts["curve"]]
    return heads, facts | {"generate_s": round(work.seconds["generate"], 2), "curve": curve}


def _jointly(
    work: Work, base: Base, heads: Heads, learnt: Sequence[distillation.Dialogue], held_out: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Train base and heads together and write the change to the base; the heads then fit only the changed base.

    Returns the facts of that, and the heads' accuracy anew.
    """
    began, wanted = time.monotonic(), work.wanted
    limits = train.Limits(max(1.0, work.left_s(0.95)), wanted.seed, wanted.steps, checkpoint=work.checkpoint("joint"))
    made = joint.fit(
        base, heads, learnt, limits, progress=lambda done, total: work.progress("joint", done, total)
    )  # fmt: skip
    made.adapter.save(work.out / "adapter", base_model=work.folder.name)
    _noted(work, "joint", began)
    answers = distillation.self_distil(base, held_out, max_new_tokens=wanted.answer_tokens) if held_out else []
    said = distillation.stack_features(base, distillation.drop_looping(answers))
    told = {
        "changes_the_model": True, "rank": joint.RANK, "steps": made.training.steps,
        "kl": made.divergence, "same_choice": made.agreement, "tokens_per_step": train.held_out_rate(heads, said),
    }  # fmt: skip
    if not said.lengths:
        return {"joint": told}
    # Who decodes with them has the changed base, so what they guess there is what counts.
    return {"joint": told, "accuracy": simulation.accuracy(drafters.drafting(heads), said).shares}
