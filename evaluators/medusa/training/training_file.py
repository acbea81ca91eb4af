"""training.json beside heads: record of their training. The file is untrusted when it is read.

schema, seed, prompts, tokens, positions, steps, generate_s, features_s, fit_s    cost of the training (COSTS), numbers
accuracy                   shares of right guesses by head and rank, on held-out answers
prompt_fingerprints        of the training prompts (prompt_sets.fingerprint), separated by spaces
heads, recipe, curve, ..   for people
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evaluators.medusa import formats
from evaluators.medusa.drafting.heads import Heads

SCHEMA = "mergebot.head_training/1"
NAME = "training.json"
COSTS = ("prompts", "tokens", "positions", "generate_s", "features_s", "fit_s", "steps", "seed")
LIMIT_BYTES = 16 << 20  # the fingerprints of a million prompts
MOST_HEADS, MOST_RANKS, MOST_COUNTED = 64, 256, 1e15


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
    said = (_parsed(folder) or {}).get("prompt_fingerprints")
    return frozenset(said.split()) if isinstance(said, str) else frozenset()


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
