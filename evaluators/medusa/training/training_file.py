"""training.json beside heads: record of their training. The file is untrusted when it is read.

schema, seed, prompts, tokens, positions, steps, generate_s, features_s, fit_s    cost of the training (COSTS), numbers
accuracy                   shares of right guesses by head and rank, on held-out answers
prompt_fingerprints        of the training prompts (prompt_sets.fingerprint), separated by spaces
heads, recipe, curve, ..   for people
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evaluators.medusa import formats
from evaluators.medusa.drafting import drafters
from evaluators.medusa.drafting.heads import Heads, identity_heads
from evaluators.medusa.training import simulation, train
from evaluators.medusa.training.distillation import Features

SCHEMA = "mergebot.head_training/1"
NAME = "training.json"
COSTS = ("prompts", "tokens", "positions", "generate_s", "features_s", "fit_s", "steps", "seed")
LIMIT_BYTES = 16 << 20  # the fingerprints of a million prompts
MOST_HEADS, MOST_RANKS, MOST_COUNTED = 64, 256, 1e15


def record(
    options: train.TrainingOptions, features: Features, held_out: Features, heads: Heads, training: train.Training
) -> dict[str, Any]:
    """Contents of training.json after `heads` were trained on `features`."""
    return {
        "schema": SCHEMA,
        "seed": options.seed,
        "tokens": len(features.tokens),
        "positions": training.positions,
        "steps": training.steps,
        "planned_steps": training.planned_steps,
        "epochs": round(training.epochs, 2),
        "recipe": asdict(options.recipe),
        "features_s": 0.0,
        "fit_s": round(training.seconds, 2),
        **_quality(heads, held_out, training),
        "curve": [
            {"step": step, "fit_minutes": round(seconds / 60, 3), "tokens_per_step": round(rate, 4)}
            for step, seconds, rate in training.curve
        ],
    }


def _quality(heads: Heads, held_out: Features, training: train.Training) -> dict[str, Any]:
    """Shape of the heads and their figures on held-out answers."""
    spec, tokens = heads.spec, held_out.tokens.tolist()
    kept = set(spec.keep or ())
    covered = sum(token in kept for token in tokens) / max(1, len(tokens))
    return {
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
        "coverage": 1.0 if spec.keep is None else round(covered, 4),
        "held_out": {
            "answers": len(held_out.lengths),
            "tokens": len(tokens),
            "nodes": train.COMMON_NODES,
            "untrained": train.held_out_rate(identity_heads(spec, heads.base), held_out),
            "best": max(training.held_out, default=None),
        },
        "accuracy": simulation.accuracy(drafters.drafting(heads), held_out).shares,
    }


def write(heads: Heads, facts: dict[str, Any], folder: Path, *, base_model: str) -> None:
    """Write training.json, then the heads: if the heads are there, the folder is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    formats.write_json(folder / NAME, facts)
    formats.save(heads, folder, base_model=base_model)


def read(folder: Path) -> dict[str, Any] | None:
    """Valid entries of the training.json in `folder`, or None without such a file.

    Valid are COSTS that are finite numbers from 0, and `accuracy` as shares by head and rank.
    """
    value = _parsed(folder)
    if value is None:
        return None
    known: dict[str, Any] = {key: value[key] for key in COSTS if _counts(value.get(key))}
    shares = value.get("accuracy")
    if isinstance(shares, list) and 0 < len(shares) <= MOST_HEADS and all(_are_shares(row) for row in shares):
        known["accuracy"] = shares
    return known


def learnt_prompts(folder: Path) -> frozenset[str]:
    """Fingerprints of the prompts that the heads in `folder` were trained on; empty if unknown."""
    stored = (_parsed(folder) or {}).get("prompt_fingerprints")
    return frozenset(stored.split()) if isinstance(stored, str) else frozenset()


def _parsed(folder: Path) -> dict[str, Any] | None:
    try:
        with (folder / NAME).open("rb") as file:
            text = file.read(LIMIT_BYTES + 1)
        value = json.loads(text) if len(text) <= LIMIT_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _counts(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < MOST_COUNTED


def _are_shares(row: object) -> bool:
    return isinstance(row, list) and 0 < len(row) <= MOST_RANKS and all(_counts(share) and share <= 1 for share in row)
