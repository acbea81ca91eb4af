"""The recipes that are measured, one per method, in the settings people use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# the order of importance: what a budget cuts off is at the end
METHODS = (
    "linear",
    "passthrough",
    "slerp",
    "ties",
    "dare_ties",
    "model_stock",
    "karcher",
    "della",
    "sce",
    "dare_linear",
    "task_arithmetic",
    "nuslerp",
    "multislerp",
    "breadcrumbs",
    "breadcrumbs_ties",
    "della_linear",
    "nearswap",
    "arcee_fusion",
    "ram",
    "ramplus_tl",
)
LISTED = ("dare_ties", "dare_linear", "ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties")
WEIGHTED = ("linear", "nuslerp", "multislerp", "task_arithmetic", *LISTED)
NO_BASE = ("linear", "karcher", "multislerp", "nuslerp", "passthrough")
ONE_PARENT = ("slerp", "nearswap", "arcee_fusion")


def recipe(method: str, folders: Sequence[Path], layers: int) -> dict[str, Any]:
    """The recipe of `method` on the base and parents in `folders`; a stack is deeper by a quarter."""
    base, *parents = (str(folder) for folder in folders)
    top: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
    if method == "passthrough":
        return {**top, "slices": _stack(parents, layers)}
    if method == "nuslerp":
        parents = parents[:2]
    if method in ONE_PARENT:
        parents = parents[:1]
    own: dict[str, Any] = {"weight": 0.5} if method in WEIGHTED else {}
    if method in LISTED:
        own["density"] = 0.5
    if method.startswith("della"):
        own["epsilon"] = 0.1
    shared = {"slerp": {"t": 0.4}, "nearswap": {"t": 0.001}, "sce": {"select_topk": 0.5}}.get(method)
    return {
        **top,
        **({} if method in NO_BASE else {"base_model": base}),
        "models": [{"model": parent, **({"parameters": dict(own)} if own else {})} for parent in parents],
        **({"parameters": shared} if shared else {}),
    }


def _stack(parents: Sequence[str], layers: int) -> list[dict[str, Any]]:
    """The first 5/8 of one model's layers, then the last 5/8 of another's."""
    part = max(1, layers * 5 // 8)
    halves = ((parents[0], 0, part), (parents[-1], layers - part, layers))
    return [{"sources": [{"model": model, "layer_range": [start, stop]}]} for model, start, stop in halves]
