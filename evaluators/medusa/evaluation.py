"""The whole speed check of one checkpoint, inside one time budget: distil, train, calibrate, time, write.

out/decode_speed.json            the report
out/heads/                       the trained heads (formats.py)
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from evaluators.medusa import adapters, bench, calibrate, data, decode, formats, report, rows, suite, train
from evaluators.medusa.adapters import Base
from evaluators.medusa.drafters import HeadDrafter
from evaluators.medusa.heads import Heads, HeadSpec, vocabulary_cut

Progress = Callable[[str, int, int], None]

# Shares of the whole budget at which a stage must have ended; the timing gets what is left.
GENERATED_BY = 0.36
FITTED_BY = 0.54
FINISHED_BY = 0.96
HEADS = 4
DRAFT_VOCABULARY = 8192
ANSWER_TOKENS = 64
BATCH = 32
LEAST_TIMED_TOKENS = 16
LEAST_QUESTIONS = 4
LEAST_POSITIONS = 64


@dataclass(slots=True)
class _Run:
    """One measurement on its way."""

    folder: Path
    budget_s: float
    seed: int
    progress: Progress
    started: float = field(default_factory=time.monotonic)
    report: dict[str, Any] = field(default_factory=lambda: report.blank("quick"))

    def until(self, share: float) -> float:
        """The monotonic time at which `share` of the budget is gone."""
        return self.started + share * self.budget_s

    def stage(self, name: str, began: float) -> float:
        """Note the seconds since `began` as those of stage `name`; returns now."""
        now = time.monotonic()
        self.report["seconds"][name] = round(now - began, 2)
        return now


@dataclass(frozen=True, slots=True)
class _Texts:
    """The model's own answers by split; test answers only serve to simulate."""

    train: list[data.Dialogue]
    calibration: list[data.Dialogue]
    test: list[data.Dialogue]


def measure(
    model: Path,
    out: Path,
    *,
    prompts: Path | None = None,
    budget_s: float = 60,
    questions: int = 8,
    max_new_tokens: int = 48,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train heads for the checkpoint in `model`, time decoding with them, write the report and heads under `out`.

    `prompts` (MT-bench layout) replaces the built-in test questions; training prompts that leak from it are
    dropped. `budget_s` bounds everything from loading to writing; fewer questions or tokens are timed if it is short,
    never less than one question. `progress` gets (stage, done, total). Returns the report. Raises EvaluationError
    for a checkpoint that cannot be loaded or whose logits are not finite; a model that cannot take trees gives a
    report with `refusal`.
    """
    run = _Run(model, budget_s, seed, progress or (lambda stage, done, total: None))
    torch.manual_seed(seed)
    run.progress("load", 0, 1)
    asked = suite.in_turns(suite.builtin("test", seed) if prompts is None else suite.read(prompts), questions)
    base = adapters.load(model, device)
    able = adapters.capability(base)
    run.report["model"] = report.describe_model(base, model)
    run.report["environment"] = report.describe_environment(base, able.kernel, seed)
    test = [bench.Question(prompt, tuple(suite.encode(base, prompt.turns[0]))) for prompt in asked]
    _describe_suite(run, base, test, prompts)
    now = run.stage("load", run.started)
    run.progress("load", 1, 1)
    if able.reason is not None:
        run.report["refusal"] = able.reason
        run.report["candidates"] = [
            report.blank_row("none", "none"),
            report.blank_row("fresh", "fresh", able.reason),
        ]
    else:
        _speculate(run, base, test, max_new_tokens, out, now)
    run.report["environment"]["load_after"] = report.load()
    run.report["seconds"]["total"] = round(time.monotonic() - run.started, 2)
    out.mkdir(parents=True, exist_ok=True)
    formats.write_json(out / "decode_speed.json", run.report)
    return run.report


def _speculate(
    run: _Run, base: Base, test: Sequence[bench.Question], max_new_tokens: int, out: Path, now: float
) -> None:
    texts = _generate(run, base, test)
    after_generate = run.stage("generate", now)
    data.check(base, texts.train or texts.test)
    features = {name: data.gather(base, getattr(texts, name)) for name in ("train", "calibration", "test")}
    now = run.stage("features", after_generate)
    heads, training = _fit(run, base, features)
    now = run.stage("fit", now)
    formats.save(heads, out / "heads", base_model=run.folder.name)
    run.progress("calibrate", 0, 1)
    context = sum(len(q.ids) for q in test) // len(test) + max_new_tokens // 2
    cost = calibrate.cost_curve(adapters.EagerRunner(base), heads, context)
    choice = calibrate.choose_tree(heads, features["calibration"], cost)
    now = run.stage("calibrate", now)
    run.progress("calibrate", 1, 1)
    limits = _limits(run, base, test, max_new_tokens, cost, choice)
    candidate = bench.Candidate("fresh", HeadDrafter(heads), choice.tree)
    blocks = bench.run_blocks(
        base, [candidate], test, limits, deadline=run.until(FINISHED_BY), progress=_named(run, "bench")
    )
    run.stage("bench", now)
    spent = run.report["seconds"]
    rows.write(
        run.report,
        rows.Measured(
            base, heads, training, features, cost, choice, blocks, limits.max_new_tokens, len(texts.train),
            spent["generate"], spent["features"], run.seed,
        ),
    )  # fmt: skip


def _generate(run: _Run, base: Base, test: Sequence[bench.Question]) -> _Texts:
    """Answer calibration and test prompts first, then as many training prompts as the time allows."""
    asked = [question.prompt for question in test]
    sources, dropped = suite.without_leaks(suite.builtin("train", run.seed), asked)
    if dropped:
        run.report["warnings"].append(f"{len(dropped)} training prompts were too close to a test prompt: {dropped}")
    held_out = suite.without_leaks(suite.builtin("calibration", run.seed), asked)[0][:8]
    fixed = [list(q.ids) for q in test] + [suite.encode(base, p.turns[0]) for p in held_out]
    rest = [suite.encode(base, prompt.turns[0]) for prompt in sources]
    dialogues = data.self_distil(
        base,
        fixed + rest,
        max_new_tokens=ANSWER_TOKENS,
        batch=max(BATCH, len(fixed)),
        deadline=run.until(GENERATED_BY),
        progress=_named(run, "generate"),
    )
    cut = len(test), len(fixed)
    return _Texts(dialogues[cut[1] :], dialogues[cut[0] : cut[1]], dialogues[: cut[0]])


def _fit(run: _Run, base: Base, features: dict[str, data.Features]) -> tuple[Heads, train.Training]:
    counted: list[int] = features["train"].tokens.tolist()
    keep = None if base.vocab <= DRAFT_VOCABULARY else vocabulary_cut(counted, DRAFT_VOCABULARY, base)
    spec = HeadSpec("shared", HEADS, 1, conditioned=True, keep=keep)
    usable = features["train"]
    if len(usable.tokens) < LEAST_POSITIONS:
        run.report["warnings"].append(
            f"the model wrote only {len(usable.tokens)} tokens to learn from, so its heads are hardly trained"
        )
    return train.fit(
        spec,
        base,
        usable,
        budget_s=max(1.0, run.until(FITTED_BY) - time.monotonic()),
        seed=run.seed,
        held_out=features["calibration"],
        progress=_named(run, "fit"),
    )


def _limits(
    run: _Run,
    base: Base,
    test: Sequence[bench.Question],
    max_new_tokens: int,
    cost: calibrate.CostCurve,
    choice: calibrate.Choice,
) -> decode.Limits:
    """As many tokens a question as let a handful of questions fit into what is left of the budget."""
    plain_s = cost.points[0][1] / 1000
    per_token_s = 2 * plain_s + 2 * plain_s * choice.overhead / max(choice.expected, 1.0)
    prefill_s = 4 * 3 * plain_s
    left_s = run.until(FINISHED_BY) - time.monotonic()
    affordable = int((left_s / min(LEAST_QUESTIONS, len(test)) - prefill_s) / per_token_s)
    tokens = max(min(LEAST_TIMED_TOKENS, max_new_tokens), min(max_new_tokens, affordable))
    return decode.Limits(tokens, base.stop_ids)


def _describe_suite(run: _Run, base: Base, test: Sequence[bench.Question], given: Path | None) -> None:
    text = "\n".join("\x1f".join(question.prompt.turns) for question in test)
    run.report["suite"] |= {
        "name": "built-in" if given is None else given.stem,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "chat_template": bool(getattr(base.tokenizer, "chat_template", None)),
        "turns": 1,
        "repeats": 2,
        "order": "ABBA",
    }


def _named(run: _Run, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: run.progress(stage, done, total)
