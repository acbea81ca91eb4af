"""Head training on given answers, shared by `mergebot medusa train` and the speed test.

The two differ in how they generate the answers: a training stores batches for reuse, a speed test has seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from evaluators.medusa import formats
from evaluators.medusa.drafting import drafters
from evaluators.medusa.drafting.heads import Heads, HeadSpec, identity_heads, vocabulary_cut
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.training import simulation, train
from evaluators.medusa.training.distillation import Features
from evaluators.medusa.training.training_file import SCHEMA

HEADS = 3
DRAFT_VOCABULARY = 8192
ANSWER_TOKENS = 96


@dataclass(frozen=True, slots=True)
class Course:
    """Heads to train, with recipe and limits. `vocab` is the size of the draft vocabulary, None for the whole one.

    The heads start untrained or from `initial`, which must have the shape `spec`.
    """

    spec: HeadSpec
    recipe: train.Recipe
    limits: train.Limits
    vocab: int | None = DRAFT_VOCABULARY
    initial: Heads | None = None


def learn(
    course: Course,
    base: Base,
    features: Features,
    held_out: Features,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Heads, train.Training, dict[str, Any]]:
    """Train heads on the frozen base. Returns heads, training result and the contents of training.json."""
    counted: list[int] = features.tokens.tolist()
    spec, limits = course.spec, course.limits
    if spec.keep is None and course.vocab is not None and course.vocab < base.vocab:
        spec = replace(spec, keep=vocabulary_cut(counted, course.vocab, base))
    heads, training = train.fit(
        spec,
        base,
        features,
        limits=limits,
        recipe=course.recipe,
        held_out=held_out,
        initial=course.initial,
        progress=progress,
    )
    return heads, training, _record(course, features, held_out, heads, training)


def _record(
    course: Course, features: Features, held_out: Features, heads: Heads, training: train.Training
) -> dict[str, Any]:
    """Contents of training.json."""
    spec, tokens = heads.spec, held_out.tokens.tolist()
    kept = set(spec.keep or ())
    covered = 1.0 if spec.keep is None else round(sum(token in kept for token in tokens) / max(1, len(tokens)), 4)
    return {
        "schema": SCHEMA,
        "seed": course.limits.seed,
        "tokens": len(features.tokens),
        "positions": training.positions,
        "steps": training.steps,
        "planned_steps": training.planned_steps,
        "epochs": round(training.epochs, 2),
        "recipe": asdict(course.recipe),
        "features_s": 0.0,
        "fit_s": round(training.seconds, 2),
        "heads": {
            "kind": spec.kind,
            "count": spec.heads,
            "layers": spec.layers,
            "conditioned": spec.conditioned,
            "kept_vocab": None if spec.keep is None else len(spec.keep),
            "parameters": heads.trained_parameters(),
            "bytes": heads.size_bytes(),
            "formats": formats.formats_of(heads),
        },
        "coverage": covered,
        "held_out": {
            "answers": len(held_out.lengths),
            "tokens": len(tokens),
            "nodes": train.COMMON_NODES,
            "untrained": train.held_out_rate(identity_heads(spec, heads.base), held_out),
            "best": max(training.held_out, default=None),
        },
        "accuracy": simulation.accuracy(drafters.drafting(heads), held_out).shares,
        "curve": [
            {"step": step, "fit_minutes": round(seconds / 60, 3), "tokens_per_step": round(rate, 4)}
            for step, seconds, rate in training.curve
        ],
    }
