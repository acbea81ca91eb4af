"""Random recipes for the comparison with mergekit: method, models, layout, level and kind of every setting, dtype."""

from __future__ import annotations

import random
from typing import Any

from benchmarks.agreement.notation import Case, Document, flat, part_of, sliced, where

OPTIONAL_BASE = ("nuslerp", "multislerp")
WITHOUT_BASE = ("linear", "karcher", "passthrough", *OPTIONAL_BASE)
PER_INPUT = {
    **dict.fromkeys(("linear", "nuslerp", "multislerp", "task_arithmetic"), ("weight",)),
    "ties": ("weight", "density"),
    "breadcrumbs": ("weight", "density", "gamma"),
    "breadcrumbs_ties": ("weight", "density", "gamma"),
    "passthrough": ("scale",),
}
SHARED = {
    "linear": ("normalize",),
    "slerp": ("t",),
    "nuslerp": ("nuslerp_flatten", "nuslerp_row_wise"),
    "multislerp": ("normalize_weights",),
    "karcher": ("max_iter",),
    "nearswap": ("t",),
    "sce": ("select_topk",),
    "task_arithmetic": ("normalize", "lambda"),
    "ties": ("normalize", "lambda", "rescale"),
    "breadcrumbs": ("normalize", "lambda", "rescale"),
    "breadcrumbs_ties": ("normalize", "lambda", "rescale"),
    "model_stock": ("filter_wise",),
    "ram": ("epsilon",),
    "ramplus_tl": ("epsilon", "r", "alpha"),
    "arcee_fusion": (),
    "passthrough": (),
}
PAIRS = ("slerp", "nearswap", "arcee_fusion", "nuslerp")
NAMES = ("mlp", "self_attn", "q_proj", "norm", "layers.2.", "embed_tokens", "lm_head", "down_proj", "proj", "model")


def at_random(seed: int) -> Case:
    """The random recipe of a seed."""
    draw = random.Random(seed)
    method = draw.choice(sorted(SHARED))
    low = draw.random() < 0.2
    pool = [f"{name}_bf16" if low else name for name in ("a", "b", "c")]
    draw.shuffle(pool)
    needs_base = method not in WITHOUT_BASE
    base = f"base{'_bf16' if low else ''}" if needs_base or (method in OPTIONAL_BASE and draw.random() < 0.5) else None
    count = 1 if method in ("passthrough", *PAIRS[:3]) else 2 if method in PAIRS else draw.randint(2, 3)
    names = pool[:count]
    listed = [*names, base] if base and draw.random() < 0.4 else names
    top: Document = {name: _value(draw, name) for name in SHARED[method] if name == "t" or draw.random() < 0.6}
    own: dict[str, Document] = {name: {} for name in names}
    for parameter in PER_INPUT.get(method, ()):
        if draw.random() < 0.3:
            top[parameter] = _setting(draw, parameter, complete=True)
        for name in names:
            if parameter not in top or draw.random() < 0.4:
                own[name][parameter] = _setting(draw, parameter, complete=parameter not in top)
    options: Document = {"out_dtype": draw.choice(["bfloat16", "float16", "float32"])} if draw.random() < 0.15 else {}
    dtype = "bfloat16" if low and draw.random() < 0.6 else "float32"
    if draw.random() < 0.35 or method == "passthrough":
        slices = _slices(draw, [*names, *([base] if base else [])], own)
        return f"random_{seed}_{method}", sliced(method, *slices, base=base, parameters=top, dtype=dtype, **options)
    models = [(name, own[name]) if own.get(name) else name for name in listed]
    return f"random_{seed}_{method}", flat(method, *models, base=base, parameters=top, dtype=dtype, **options)


def _slices(draw: random.Random, names: list[str], own: dict[str, Document]) -> list[Document]:
    made = []
    for _ in range(draw.randint(1, 3)):
        length = draw.randint(1, 4)
        sources = []
        for name in draw.sample(names, len(names)):
            start = draw.randint(0, 4 - length)
            sources.append((name, start, start + length, *([own[name]] if own.get(name) else [])))
        made.append(part_of(*sources))
    return made


def _setting(draw: random.Random, name: str, *, complete: bool) -> Any:
    """A scalar, gradient or list of conditions; `complete`: it has a value for every tensor."""
    if draw.random() < 0.4:
        conditions = [(draw.choice(NAMES), _value(draw, name)) for _ in range(draw.randint(1, 3))]
        return where(*conditions, *([(None, _value(draw, name))] if complete or draw.random() < 0.5 else []))
    return _value(draw, name)


def _value(draw: random.Random, name: str) -> Any:
    if name in ("normalize", "normalize_weights", "rescale", "filter_wise", "nuslerp_flatten", "nuslerp_row_wise"):
        return draw.random() < 0.5
    if name == "max_iter":
        return draw.randint(1, 12)
    low, high = {
        "weight": (0.1, 1.2),
        "lambda": (0.4, 1.5),
        "gamma": (0, 0.2),
        "epsilon": (0.001, 0.05),
        "scale": (-1, 2),
        "alpha": (0, 1),
        "r": (0, 1),
    }.get(name, (0, 1))
    if draw.random() < 0.4:
        return [round(draw.uniform(low, high), 3) for _ in range(draw.choice((1, 2, 3, 4, 5, 7)))]
    return round(draw.uniform(low, high), 3)
