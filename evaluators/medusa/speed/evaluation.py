"""Speed test of one checkpoint within a time budget: distil, train, calibrate, time, write.

out/decode_speed.json            the report
out/heads/                       the heads made for the model (formats)
out/merged_tuned/                given merged heads after a short fine-tune, where there are any
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from bot.errors import EvaluationError
from bot.storage import sha256_file
from evaluators.medusa import formats
from evaluators.medusa.decoding import decode
from evaluators.medusa.decoding.capability import reason_against_trees
from evaluators.medusa.decoding.runners import Runner
from evaluators.medusa.decoding.static_runner import fastest
from evaluators.medusa.drafting.heads import Heads, HeadSpec, identity_heads
from evaluators.medusa.model import packed, support
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.model.threads import steadiest_threads
from evaluators.medusa.speed import bench, calibrate, conclusions, rows, timing, transfer
from evaluators.medusa.speed.report import Environment, Model, Row, Suite
from evaluators.medusa.speed.run import Progress, Run, SpeedOptions
from evaluators.medusa.speed.transfer import HeadSet
from evaluators.medusa.training import distillation, prompt_sets, train, training_file
from evaluators.medusa.training.distillation import stack_features
from evaluators.medusa.trees import tree_files
from evaluators.medusa.trees.tree import Tree

# Shares of the budget left after loading at which a stage must have ended; the timing gets what is left.
GENERATED_BY = 0.46
FITTED_BY = 0.58
CALIBRATED_BY = 0.62
REFUSED_BY = 0.5
LONG_BUDGET_S = 180
TUNING_SHARE = 0.3
BATCH = 48
HELD_OUT = 16
TUNING = train.Recipe(1e-3, 128, 1)


@dataclass(frozen=True, slots=True)
class _Texts:
    """Answers of the model by split, and the fingerprints of the training prompts."""

    train: list[distillation.Dialogue]
    calibration: list[distillation.Dialogue]
    prompts: str


def measure(
    model: Path, out: Path, options: SpeedOptions | None = None, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Obtain heads for the checkpoint in `model`, time decoding with them, write the report and heads under `out`.

    `progress` receives (stage, done, total). Returns the report. Raises EvaluationError for a checkpoint that cannot be
    loaded or whose logits are not finite, and for fresh heads or a tree that do not fit. A model that does not support
    trees gives a report with `refusal`; the report of an encoder-decoder also lacks rows.
    """
    options = options or SpeedOptions()
    options = replace(options, questions=max(1, options.questions))
    tree = None if options.tree is None else tree_files.read(options.tree)
    run = Run(model, out, options, progress or (lambda stage, done, total: None), tree)
    run.note(refusal=support.reason_against(model))
    if run.report.refusal is None:
        with steadiest_threads(options.device):
            _examine(run)
    return _written(run)


def _test_questions(run: Run) -> list[prompt_sets.Prompt]:
    """Return the test questions on which none of the given heads were trained, according to their training files."""
    prompts, seed = run.options.prompts, run.options.seed
    test = prompt_sets.builtin("test", seed) if prompts is None else prompt_sets.read(prompts)
    least = min(run.options.questions, conclusions.LEAST_FOR_A_VERDICT)
    left, known, given = transfer.kept_apart(test, run.options.given, least)
    run.options = replace(run.options, given=given)
    if not left:
        raise EvaluationError(
            "SPEED_CHECK_FAILED",
            "The given heads were trained on every one of these questions.",
            "Give questions that they were not trained on.",
        )
    if known:
        run.warn(f"{len(known)} questions are left out because the given heads were trained on them: {known[:20]}")
    return left


def _written(run: Run) -> dict[str, Any]:
    total_s, spent = time.monotonic() - run.started, run.report.seconds
    run.note(
        environment=replace(run.report.environment, load_after=_load_average()),
        seconds={**spent, "write": round(total_s - sum(spent.values()), 2), "total": round(total_s, 2)},
    )
    run.note(sentence=conclusions.sentence(run.report))
    run.out.mkdir(parents=True, exist_ok=True)
    written = run.report.as_dict()
    formats.write_json(run.out / "decode_speed.json", written)
    return written


def _loaded(run: Run) -> Base:
    base, reason = packed.load(run.folder, run.options.device, run.options.dtype)
    if reason is not None and run.options.device == "cpu":
        run.warn(f"baseline and speculative decoding both ran with unpacked weights: {reason}")
    return base


def _examine(run: Run) -> None:
    run.progress("load", 0, 1)
    prompts = prompt_sets.in_turns(_test_questions(run), run.options.questions)
    base = _loaded(run)
    reason = reason_against_trees(base)
    run.note(model=_model(base, run.folder), environment=_environment(base, run.options.seed))
    test = [bench.question(base, prompt, run.options.max_new_tokens) for prompt in prompts]
    _describe_suite(run, base, test)
    if (unapplied := bench.unapplied_settings(base)) is not None:
        run.warn(unapplied)
    now = run.stage("load", run.started)
    run.progress("load", 1, 1)
    if reason is None:
        _speculate(run, base, test, now)
    else:
        _baseline_only(run, base, test, reason)
    _warn_of_budget(run, len(test))


def _baseline_only(run: Run, base: Base, test: Sequence[bench.Question], reason: str) -> None:
    """Report a model without tree support: its baseline speed, transformers' own loop, the reason."""
    limits = decode.Limits(run.options.max_new_tokens, base.stop_ids)
    base.window = None  # our cache of sliding windows is proven only for models that support trees
    runner = _runner(run, base)
    blocks = bench.run_blocks(runner, [], test, limits, bench.Schedule(deadline=run.until(REFUSED_BY)))
    versus = timing.time_native(run, base, blocks, limits, runner)
    m = rows.Measured(base, blocks, versus, limits.max_new_tokens, run.options.seed)
    run.report = rows.described(run.report, m)
    lookup = Row("prompt_lookup", "prompt_lookup", absent_because=reason)
    run.note(candidates=(rows.none_row(m), rows.native_row(m), lookup), refusal=reason)


def _speculate(run: Run, base: Base, test: Sequence[bench.Question], now: float) -> None:
    given, warnings = transfer.load(run.options.given, base)
    given, shape = transfer.filling(given, run.tree), run.tree
    run.warn(*warnings)
    texts = _generate(run, base, test, learning=all(each.origin != "fresh" for each in given))
    now = run.stage("generate", now)
    distillation.check(base, texts.train or texts.calibration)
    features = {"train": stack_features(base, texts.train), "calibration": stack_features(base, texts.calibration)}
    now = run.stage("features", now)
    sets = transfer.filling(_sets(run, base, features, given, texts), shape)
    now = run.stage("fit", now)
    run.progress("calibrate", 0, 1)
    reference = next(each for each in sets if each.origin == "fresh")
    assert reference.heads is not None  # given heads that do not fit were refused
    context = sum(len(q.ids) for q in test) // len(test) + run.options.max_new_tokens // 2
    runner = _runner(run, base)
    widths = calibrate.WIDTHS if shape is None else (1, shape.nodes)
    cost = calibrate.cost_curve(runner, reference.heads, context, widths=widths, deadline=run.until(CALIBRATED_BY))
    sets = [_with_tree(each, reference, features["calibration"], cost, shape) for each in sets]
    now = run.stage("calibrate", now)
    run.progress("calibrate", 1, 1)
    limits, blocks = timing.time_candidates(run, base, test, sets, runner)
    versus = timing.time_native(run, base, blocks, limits, runner)
    run.stage("bench", now)
    answers = bench.baseline_answers(base, blocks)
    latest = run.deadline + timing.CHECKED_WITHIN * run.options.budget_s
    measured = rows.Measured(base, blocks, versus, limits.max_new_tokens, run.options.seed, latest)
    compared = rows.Compared(
        sets,
        untrained=identity_heads(reference.heads.spec, base),
        common=transfer.common_tree(reference.heads, features["calibration"]),
        timed=stack_features(base, answers),
        held_out=stack_features(base, [*texts.calibration, *answers]),
        cost=cost,
    )
    run.report = rows.completed(run.report, measured, compared)


def _warn_of_budget(run: Run, questions: int) -> None:
    """Warn if the budget allowed shorter answers or fewer than the requested `questions`."""
    wanted, timed = min(run.options.questions, questions), run.report.suite.questions or 0
    new_tokens = run.report.suite.max_new_tokens or 0
    less = []
    if new_tokens < run.options.max_new_tokens:
        less.append(f"answers of at most {new_tokens} tokens instead of {run.options.max_new_tokens}")
    if timed < wanted:
        less.append(f"{timed} of {wanted} questions")
    if less:
        run.warn(f"the budget of {run.options.budget_s:g} s allowed {' and '.join(less)}")


def _runner(run: Run, base: Base) -> Runner:
    """Create the runner of every timed loop and record its execution mode in the report."""
    runner = (run.options.runner or fastest)(base)
    attention = base.model.config._attn_implementation
    run.note(environment=replace(run.report.environment, execution=runner.execution, attention=attention))
    return runner


def _generate(run: Run, base: Base, test: Sequence[bench.Question], *, learning: bool) -> _Texts:
    """Generate answers for both splits in the same batches, so that a short budget reduces both alike."""
    tested = [question.prompt for question in test]
    sources, held_out = (prompt_sets.builtin(split, run.options.seed) for split in ("train", "calibration"))
    sources, held_out, dropped = prompt_sets.apart(sources, held_out, tested, HELD_OUT)
    if dropped:
        run.warn(f"{len(dropped)} of our prompts were too close to a test prompt: {dropped}")
    queues = [iter(_labelled(base, "train", sources if learning else ()))] * 4
    queues.append(iter(_labelled(base, "calibration", held_out)))
    mixed = _interleaved(queues)
    dialogues = distillation.self_distil(
        base,
        [ids for _, ids in mixed],
        max_new_tokens=distillation.ANSWER_TOKENS,
        batch=BATCH,
        deadline=run.until(GENERATED_BY),
        progress=run.named("generate"),
    )
    texts: dict[str, list[distillation.Dialogue]] = {"train": [], "calibration": []}
    for (split, _), dialogue in zip(mixed, dialogues, strict=False):
        texts[split].append(dialogue)
    prints = " ".join(prompt_sets.fingerprint(prompt.turns[0]) for prompt in sources[: len(texts["train"])])
    return _Texts(distillation.drop_looping(texts["train"]), distillation.drop_looping(texts["calibration"]), prints)


def _labelled(base: Base, split: str, prompts: Sequence[prompt_sets.Prompt]) -> list[tuple[str, list[int]]]:
    """Return (split, token ids) of each prompt, with room for an answer."""
    whole = [prompt_sets.encode(base, prompt.turns[0]) for prompt in prompts]
    return [(split, prompt_sets.shortened(base, ids, distillation.ANSWER_TOKENS)) for ids in whole]


def _interleaved(queues: Sequence[Iterator[tuple[str, list[int]]]]) -> list[tuple[str, list[int]]]:
    """Interleave the queues until all are empty; a queue listed three times gives three items per round."""
    ended = object()
    rounds = iter(lambda: [item for queue in queues if (item := next(queue, ended)) is not ended], [])
    return [item for turn in rounds for item in turn]  # type: ignore[misc]


def _sets(
    run: Run, base: Base, features: dict[str, distillation.Features], given: Sequence[HeadSet], texts: _Texts
) -> list[HeadSet]:
    """Return the given sets, merged ones also after a short fine-tune, and fresh ones unless such are given."""
    if any(each.origin == "fresh" for each in given):
        return list(given)
    merged = next((each.heads for each in given if each.id == "merged" and each.heads is not None), None)
    left_s = max(1.0, run.until(FITTED_BY) - time.monotonic())
    sets = list(given)
    if merged is not None:  # one pass over the merged model's own text
        options = train.TrainingOptions(TUNING, TUNING_SHARE * left_s, run.options.seed)
        tuned, facts = _trained(run, base, "merged_tuned", merged, options, features, texts)
        sets.append(HeadSet("merged_tuned", "merged", tuned, "the merged heads, trained a little further", None, facts))
        left_s *= 1.0 - TUNING_SHARE
    count = train.HEADS if run.tree is None else max(train.HEADS, run.tree.max_depth)
    recipe = train.QUICK if run.options.budget_s < LONG_BUDGET_S else train.LONG
    options = train.TrainingOptions(recipe, left_s, run.options.seed, vocab=train.DRAFT_VOCABULARY)
    spec = HeadSpec("shared", count, 1, conditioned=True)
    heads, facts = _trained(run, base, "heads", spec, options, features, texts)
    return [*sets, HeadSet("fresh", "fresh", heads, training=facts)]


def _trained(
    run: Run,
    base: Base,
    name: str,
    start: HeadSpec | Heads,
    options: train.TrainingOptions,
    features: dict[str, distillation.Features],
    texts: _Texts,
) -> tuple[Heads, dict[str, Any]]:
    """Train heads; write them and the facts of their training under `out`."""
    spec, initial = (start, None) if isinstance(start, HeadSpec) else (start.spec, start)
    seen, held_out = features["train"], features["calibration"]
    heads, training = train.fit(
        spec, base, seen, options, held_out=held_out, initial=initial, progress=run.named("fit")
    )
    spent = run.report.seconds
    facts = training_file.record(options, seen, held_out, heads, training) | {
        "prompts": len(texts.train),
        "prompt_fingerprints": texts.prompts,
        "generate_s": spent["generate"],
        "features_s": spent["features"],
    }
    training_file.write(heads, facts, run.out / name, base_model=run.folder.name)
    return heads, facts


def _with_tree(
    each: HeadSet, reference: HeadSet, held_out: distillation.Features, cost: calibrate.CostCurve, shape: Tree | None
) -> HeadSet:
    if each.heads is None:
        return each
    own = cost if each is reference else calibrate.with_draft_of(cost, each.heads)
    return replace(each, choice=calibrate.choose_tree(each.heads, held_out, own, shape))


def _describe_suite(run: Run, base: Base, test: Sequence[bench.Question]) -> None:
    prompts = run.options.prompts
    text = "\n".join("\x1f".join(question.prompt.turns) for question in test)
    run.note(
        suite=Suite(
            name="built-in" if prompts is None else prompts.stem,
            sha256=hashlib.sha256(text.encode()).hexdigest(),
            chat_template=prompt_sets.takes_turns(base),
            turns=run.options.turns,
            repeats=2 * run.options.repeats,
            order="ABBA",
        )
    )


def _model(base: Base, folder: Path) -> Model:
    """Describe the checkpoint in `folder` as loaded."""
    return Model(
        weights_sha256=_weights_sha256(folder),
        architecture=type(base.model).__name__,
        parameters=sum(parameter.numel() for parameter in base.model.parameters()),
        layers=getattr(base.config, "num_hidden_layers", None),
        hidden_size=base.hidden,
        vocab_size=base.vocab,
        dtype=str(base.dtype).removeprefix("torch."),
    )


def _environment(base: Base, seed: int) -> Environment:
    """Describe the machine and the execution of the base on it."""
    return Environment(
        device=torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else str(base.device),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        attention=getattr(base.model.config, "_attn_implementation", None),
        execution=base.execution,
        load_before=_load_average(),
        seed=seed,
    )


def _load_average() -> float | None:
    """One-minute load average, this process included; None if the system has none."""
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):
        return None


def _weights_sha256(folder: Path) -> str | None:
    """SHA-256 of the weights: of the single safetensors file, or of the lines `sha256  name` of several."""
    digests = [(path.name, sha256_file(path)) for path in sorted(folder.glob("*.safetensors"))]
    if len(digests) <= 1:
        return digests[0][1] if digests else None
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in digests).encode()).hexdigest()
