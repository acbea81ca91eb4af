"""The whole speed check of one checkpoint, inside one time budget: distil, train, calibrate, time, write.

out/decode_speed.json            the report
out/heads/                       the trained heads (formats.py)
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from evaluators.medusa import adapters, bench, calibrate, data, decode, formats, report, rows, suite, train
from evaluators.medusa.adapters import Base
from evaluators.medusa.drafters import HeadDrafter, PromptLookup
from evaluators.medusa.heads import Heads, HeadSpec, vocabulary_cut
from evaluators.medusa.tree import chain

Progress = Callable[[str, int, int], None]

# Shares of the budget left after loading at which a stage must have ended; the timing gets what is left.
GENERATED_BY = 0.44
FITTED_BY = 0.55
CALIBRATED_BY = 0.6
FINISHED_BY = 0.97
HEADS = 3
LONG_BUDGET_S = 180
DRAFT_VOCABULARY = {"quick": 4096, "long": 8192}
ANSWER_TOKENS = 96
BATCH = 48
HELD_OUT = 8
TEST_SLACK_TOKENS = 24
LEAST_TIMED_TOKENS = 12
LEAST_QUESTIONS = 4
LEAST_POSITIONS = 64
LOOKUP_TOKENS = 4


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
        """The monotonic time at which `share` of what loading left of the budget is gone."""
        loaded = self.started + self.report["seconds"].get("load", 0.0)
        return float(loaded + share * (self.started + self.budget_s - loaded))

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
    run.progress("load", 0, 1)
    asked = suite.in_turns(suite.builtin("test", seed) if prompts is None else suite.read(prompts), max(1, questions))
    with _steadiest_threads(device):
        base = adapters.load(model, device)
        _examine(run, base, asked, prompts, max_new_tokens, out)
    run.report["environment"]["load_after"] = report.load()
    run.report["seconds"]["total"] = round(time.monotonic() - run.started, 2)
    out.mkdir(parents=True, exist_ok=True)
    formats.write_json(out / "decode_speed.json", run.report)
    return run.report


def _examine(
    run: _Run, base: Base, asked: Sequence[suite.Prompt], given: Path | None, max_new_tokens: int, out: Path
) -> None:
    able = adapters.capability(base)
    run.report["model"] = report.describe_model(base, run.folder)
    run.report["environment"] = report.describe_environment(base, able.kernel, run.seed)
    test = [bench.Question(prompt, tuple(suite.encode(base, prompt.turns[0]))) for prompt in asked]
    _describe_suite(run, base, test, given)
    now = run.stage("load", run.started)
    run.progress("load", 1, 1)
    if able.reason is None:
        _speculate(run, base, test, max_new_tokens, out, now)
        return
    run.report["refusal"] = able.reason
    run.report["candidates"] = [report.blank_row("none", "none"), report.blank_row("fresh", "fresh", able.reason)]


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
    cost = calibrate.cost_curve(adapters.EagerRunner(base), heads, context, deadline=run.until(CALIBRATED_BY))
    choice = calibrate.choose_tree(heads, features["calibration"], cost)
    now = run.stage("calibrate", now)
    run.progress("calibrate", 1, 1)
    limits = _limits(run, base, test, max_new_tokens, cost, choice)
    candidates = [bench.Candidate("fresh", HeadDrafter(heads), choice.tree)]
    # Six runs a question instead of four, each token priced as a wide step: only if all of it surely fits.
    if run.until(FINISHED_BY) - time.monotonic() > len(test) * 6 * cost.plain_wall_s * (3 + 2 * limits.max_new_tokens):
        candidates.append(bench.Candidate("prompt_lookup", PromptLookup(base.device), chain(LOOKUP_TOKENS)))
    blocks = bench.run_blocks(
        base, candidates, test, limits, deadline=run.until(FINISHED_BY), progress=_named(run, "bench")
    )
    native = _native(run, base, blocks[0], limits)
    run.stage("bench", now)
    spent = run.report["seconds"]
    rows.write(
        run.report,
        rows.Measured(
            base, heads, training, features, cost, choice, blocks, limits.max_new_tokens, len(texts.train),
            spent["generate"], spent["features"], run.seed, native,
        ),
    )  # fmt: skip


def _generate(run: _Run, base: Base, test: Sequence[bench.Question]) -> _Texts:
    """Answers for all three splits in the same batches, so that a short budget thins all of them alike."""
    asked = [question.prompt for question in test]
    sources, dropped = suite.without_leaks(suite.builtin("train", run.seed), asked)
    if dropped:
        run.report["warnings"].append(f"{len(dropped)} training prompts were too close to a test prompt: {dropped}")
    held_out = suite.without_leaks(suite.builtin("calibration", run.seed), asked)[0][:HELD_OUT]
    learnt = [("train", suite.encode(base, prompt.turns[0])) for prompt in sources]
    queues = [iter(learnt)] * 3
    queues.append(iter([("calibration", suite.encode(base, prompt.turns[0])) for prompt in held_out]))
    # A long test question would pad its whole batch; it is timed later, but not simulated.
    longest = max(len(ids) for _, ids in learnt) + TEST_SLACK_TOKENS
    queues.append(iter([("test", list(question.ids)) for question in test if len(question.ids) <= longest]))
    mixed = _taking_turns(queues)
    dialogues = data.self_distil(
        base,
        [ids for _, ids in mixed],
        max_new_tokens=ANSWER_TOKENS,
        batch=BATCH,
        deadline=run.until(GENERATED_BY),
        progress=_named(run, "generate"),
    )
    texts = _Texts([], [], [])
    for (split, _), dialogue in zip(mixed, dialogues, strict=False):
        getattr(texts, split).append(dialogue)
    return texts


def _taking_turns(queues: Sequence[Iterator[tuple[str, list[int]]]]) -> list[tuple[str, list[int]]]:
    """One item of each queue after another until all are empty; a queue given thrice gives three."""
    ended = object()
    rounds = iter(lambda: [item for queue in queues if (item := next(queue, ended)) is not ended], [])
    return [item for turn in rounds for item in turn]  # type: ignore[misc]


@contextlib.contextmanager
def _steadiest_threads(device: str) -> Iterator[None]:
    """Use one thread where more are slower: on a shared machine threads that wait for each other cost tenfold."""
    threads = torch.get_num_threads()
    try:
        if device == "cpu" and threads > 1:
            together = _products_s()
            torch.set_num_threads(1)
            if together < _products_s():
                torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _products_s(products: int = 40, repeats: int = 5) -> float:
    """The median seconds of matrix products like those of a few tokens in a small model."""
    weight, rows = torch.ones(1536, 576), torch.ones(8, 576)
    spent = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(products):
            torch.nn.functional.linear(rows, weight)
        spent.append(time.perf_counter() - began)
    return sorted(spent)[repeats // 2]


def _fit(run: _Run, base: Base, features: dict[str, data.Features]) -> tuple[Heads, train.Training]:
    counted: list[int] = features["train"].tokens.tolist()
    pace = "quick" if run.budget_s < LONG_BUDGET_S else "long"
    size = DRAFT_VOCABULARY[pace]
    keep = None if base.vocab <= size else vocabulary_cut(counted, size, base)
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
        recipe=train.QUICK if pace == "quick" else train.LONG,
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
    plain_s = cost.plain_wall_s
    per_token_s = 2 * plain_s + 2 * plain_s * choice.overhead / max(choice.expected, 1.0)
    prefill_s = 4 * 3 * plain_s
    left_s = run.until(FINISHED_BY) - time.monotonic()
    affordable = int((left_s / min(LEAST_QUESTIONS, len(test)) - prefill_s) / per_token_s)
    tokens = max(min(LEAST_TIMED_TOKENS, max_new_tokens), min(max_new_tokens, affordable))
    return decode.Limits(tokens, base.stop_ids)


def _native(run: _Run, base: Base, block: bench.Block, limits: decode.Limits) -> rows.Native | None:
    """transformers' own loop on the first question, if that still fits into the budget."""
    likely_s = max(trace.prefill.wall_s + trace.decode.wall_s for trace in block.plain)
    if time.monotonic() + 1.5 * likely_s > run.started + run.budget_s:
        return None
    return rows.Native(*bench.native(base, block.question, limits))


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
