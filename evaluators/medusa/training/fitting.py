"""From answers to heads: what `mergebot medusa train` and the speed test do alike.

Which prompts (prompt_sets.apart), which answers teach (distillation.straight), which draft vocabulary, how heads learn,
and what is written down of it (training_file). How answers are got is each one's own: a training keeps batches that it
can find again, a speed test has seconds and thins all its splits alike.
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
    """Which heads are trained and how. `vocab` cuts what they may propose to the tokens said most, None does not.

    They start untrained, or where `initial`, which has the shape `spec`, has got to.
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
    """Heads on the frozen base, how their training went, and its facts as training.json holds them."""
    counted: list[int] = features.tokens.tolist()
    spec, limits = course.spec, course.limits
    if spec.keep is None and course.vocab is not None and course.vocab < base.vocab:
        spec = replace(spec, keep=vocabulary_cut(counted, course.vocab, base))
    heads, training = train.fit(
        spec, base, features, limits=limits, recipe=course.recipe, held_out=held_out,
        initial=course.initial, progress=progress,
    )  # fmt: skip
    said = held_out.tokens.tolist()
    kept = set(spec.keep or ())
    return heads, training, {
        "schema": SCHEMA, "seed": limits.seed, "tokens": len(counted), "positions": training.positions,
        "steps": training.steps, "planned_steps": training.planned_steps, "epochs": round(training.epochs, 2),
        "recipe": asdict(course.recipe), "features_s": 0.0, "fit_s": round(training.seconds, 2),
        "heads": {"kind": spec.kind, "count": spec.heads, "layers": spec.layers, "conditioned": spec.conditioned,
                  "kept_vocab": None if spec.keep is None else len(spec.keep),
                  "parameters": heads.trained_parameters(), "bytes": heads.size_bytes(),
                  "formats": formats.formats_of(heads)},
        "coverage": 1.0 if spec.keep is None else round(sum(token in kept for token in said) / max(1, len(said)), 4),
        "held_out": {"answers": len(held_out.lengths), "tokens": len(said), "nodes": train.COMMON_NODES,
                     "untrained": train.held_out_rate(identity_heads(spec, base), held_out),
                     "best": max(training.held_out, default=None)},
        "accuracy": simulation.accuracy(drafters.drafting(heads), held_out).shares,
        "curve": [
            {"step": step, "fit_minutes": round(seconds / 60, 3), "tokens_per_step": round(rate, 4)}
            for step, seconds, rate in training.curve
        ],
    }  # fmt: skip
