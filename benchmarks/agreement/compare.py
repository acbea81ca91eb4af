"""Hold one merged folder against another, tensor by tensor and token by token (merging.md 6)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

TOLERANCE = 1e-5  # of a tensor's largest magnitude, float32 and wider
SELECTING_SHARE = 1e-4  # of a model's elements, for methods that select by magnitude
LOW_TOLERANCE = 2e-2  # worst element where mergekit computes in 16 bits
LOW_MEAN = 2e-3
SELECTING = frozenset({"ties", "breadcrumbs", "breadcrumbs_ties", "sce", "arcee_fusion"})
ROUNDED_ONCE = frozenset({"linear", "slerp", "passthrough"})  # mergekit computes these in float32 whatever the dtype
BY_TOKEN = ("embed_tokens.weight", "lm_head.weight")
CONFIG_KEYS = ("num_hidden_layers", "vocab_size", "tie_word_embeddings", "dtype")


@dataclass(frozen=True, slots=True)
class Verdict:
    """How far ours is from theirs: what differs beyond the tolerances, and the worst distance found."""

    differences: tuple[str, ...]
    worst: float  # largest |ours - theirs| / max|theirs| of any tensor
    elements: int  # compared
    outside: int  # elements beyond the tolerance of their dtype


def compare(ours: Path, theirs: Path, recipe: Mapping[str, Any]) -> Verdict:
    """What differs between two merges of one recipe."""
    found, expected = load(ours), load(theirs)
    said = [*_vocabularies(ours, theirs, found), *_configs(ours, theirs)]
    for missing in sorted(set(expected) - set(found))[:3]:
        said.append(f"{missing} is missing")
    for extra in sorted(set(found) - set(expected))[:3]:
        said.append(f"{extra} is extra")
    method = str(recipe["merge_method"])
    # mergekit computes in `dtype`, whatever `out_dtype` says
    low = recipe.get("dtype") in ("bfloat16", "float16")
    worst, outside, total = 0.0, 0, 0
    for name in sorted(set(expected) & set(found)):
        got, want = found[name], expected[name]
        if got.shape != want.shape:
            said.append(f"{name}: shape {tuple(got.shape)}, not {tuple(want.shape)}")
            continue
        if got.dtype != want.dtype:
            said.append(f"{name}: {got.dtype}, not {want.dtype}")
        bad, distance, sentence = _distance(name, got, want, method, low)
        worst, outside, total = max(worst, distance), outside + bad, total + got.numel()
        if sentence:
            said.append(sentence)
    if outside > total * SELECTING_SHARE and method in SELECTING and not low:
        said.append(f"{outside} of {total} elements differ")
    return Verdict(tuple(said), worst, total, outside)


def load(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, read by the safetensors library."""
    out: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            out.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return out


def words(folder: Path) -> dict[str, int] | None:
    """Token -> id of a folder's tokenizer.json, None without one."""
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    stored = json.loads(file.read_text())
    return {**stored["model"]["vocab"], **{token["content"]: token["id"] for token in stored.get("added_tokens", [])}}


def _vocabularies(ours: Path, theirs: Path, found: dict[str, Tensor]) -> list[str]:
    """Compare the token strings, then put the rows of `found` into their order: the order of new tokens is free."""
    got, want = words(ours), words(theirs)
    if want is None:
        return []
    if got is None:
        return ["no tokenizer.json"]
    if set(got) != set(want):
        return [f"tokens differ: {sorted(set(got) ^ set(want))[:4]}"]
    if got == want:
        return []
    order = [i for _, i in sorted((want[word], got[word]) for word in got)]
    said = []
    for name in found:
        if name.endswith(BY_TOKEN):
            rows = len(found[name])
            if max(order) >= rows:
                said.append(f"{name}: {rows} rows, token id {max(order)}")
                continue
            rest = [i for i in range(rows) if i not in set(order)]
            found[name] = found[name][[*order, *rest]]
    return said


def _configs(ours: Path, theirs: Path) -> list[str]:
    if not (ours / "config.json").exists():
        return ["no config.json"]
    got, want = (json.loads((folder / "config.json").read_text()) for folder in (ours, theirs))
    for config in (got, want):
        config.setdefault("dtype", config.get("torch_dtype"))
    return [
        f"config {key}: {got.get(key)}, not {want.get(key)}" for key in CONFIG_KEYS if got.get(key) != want.get(key)
    ]


def _distance(name: str, got: Tensor, want: Tensor, method: str, low: bool) -> tuple[int, float, str]:
    """Elements beyond the tolerance, the worst relative distance, and a sentence if that is too much."""
    half = want.dtype in (torch.bfloat16, torch.float16)
    got, want = got.double(), want.double()
    if not torch.equal(got.isfinite(), want.isfinite()):
        return 0, float("inf"), f"{name}: NaN or Inf in other places"
    got, want = got.nan_to_num(), want.nan_to_num()
    scale = float(want.abs().max()) if want.numel() else 1.0
    scale = scale or 1.0
    diff = (got - want).abs()
    worst, mean = (float(diff.max()) / scale, float(diff.mean()) / scale) if diff.numel() else (0.0, 0.0)
    if half and (not low or method in ROUNDED_ONCE):  # one rounding: at most one unit in the last place
        bad = int((diff > 2.0**-7 * torch.maximum(got.abs(), want.abs()) + 1e-6 * scale).sum())
        return bad, worst, f"{name}: {bad} elements more than one ulp off" if bad and method not in SELECTING else ""
    if low:
        bad = int((diff > LOW_TOLERANCE * scale).sum())
        allowed = max(1, 0.005 * got.numel()) if method in SELECTING else 0
        return bad, worst, f"{name}: {bad} beyond 2 %, mean {mean:.2g}" if bad > allowed or mean > LOW_MEAN else ""
    bad = int((diff > TOLERANCE * scale).sum())
    return bad, worst, f"{name}: {bad} beyond 1e-5, worst {worst:.3g}" if bad and method not in SELECTING else ""
