"""Rules of common forms, made from a key and its default."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bot.merge.planning import layer_formulas as formulas
from bot.merge.planning.layer_formulas import where
from bot.merge.planning.layer_rules import (
    FULL,
    LINEAR,
    Formula,
    Kinds,
    Part,
    Rule,
    Values,
    first,
    leading,
    numbered,
    numbers,
    period,
)

EVERY = "the layers of one kind stand at equal distances"
LEADING = "the dense layers stand before the sparse ones"
PLACES = "every layer keeps its number and the count stays the same"
SHARED = "the hybrid layers, which share weights, all stay in their order"


def attention(formula: Formula, *values: Values) -> Rule:
    return Rule("layer_types", formula, EVERY, "layer_types", values)


def mlp(formula: Formula, *values: Values) -> Rule:
    return Rule("mlp_layer_types", formula, LEADING, "mlp_layer_types", values)


def listed(key: str, formula: Formula, *values: Values) -> Rule:
    return Rule(key, formula, EVERY, key, values)


def by_numbers(key: str, *default: int) -> Rule:
    return Rule(key, numbered(key, default), EVERY, values=(numbers(key),))


def first_k(default: int, key: str = "first_k_dense_replace") -> Rule:
    return Rule(key, first((key, default)), LEADING, values=(leading(key),))


def dense_first(default: int) -> Rule:
    """Dense layers before the sparse ones, counted by `first_k_dense_replace` without a list."""
    key = "first_k_dense_replace"
    return mlp(first((key, default)), leading(key))


def placed(key: str, formula: Formula, limit: str = PLACES, depth: str | None = None) -> Rule:
    """A property of the layer's place alone, which no config value moves."""
    return Rule(key, formula, limit, depth=depth)


def periods(key: str, offset: str, default: tuple[int, int], kind: Any, other: Any) -> Rule:
    def kinds(part: Part, layers: int) -> Kinds:
        step, start = part.get(key, default[0]), part.get(offset, default[1])
        return [kind if i % step == start else other for i in range(layers)]

    return Rule(key, kinds, EVERY, values=(period(key, kind, offset),))


def sparse_step(skipped: tuple[int, ...] = ()) -> Rule:
    keys = ("decoder_sparse_step", "mlp_only_layers")

    def propose(wanted: Kinds, _: Part) -> Iterator[Mapping[str, Any]]:
        dense = [i for i, sparse in enumerate(wanted) if not sparse]
        yield {"mlp_only_layers": dense}
        yield {"mlp_only_layers": dense, "decoder_sparse_step": 1}

    return Rule(keys[0], formulas.qwen_experts(skipped), EVERY, values=(Values(keys, propose),))


def ernie() -> Rule:
    keys = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")

    def propose(wanted: Kinds, _: Part) -> Iterator[Mapping[str, Any]]:
        at = [i for i, sparse in enumerate(wanted) if sparse] or [len(wanted)]
        yield dict(zip(keys, (at[0], at[-1], at[1] - at[0] if len(at) > 1 else 1), strict=True))

    return Rule(keys[0], formulas.ernie_experts, LEADING, values=(Values(keys, propose),))


def side_steps(side: str, default: int = 4) -> Rule:
    key = f"{side}_sparse_step"

    def kinds(part: Part, layers: int) -> Kinds:
        step = part.get(key, default)
        return [step > 0 and (i + 1) % step == 0 for i in range(layers)]

    return Rule(key, kinds, EVERY, values=(period(key, True),), depth=f"{side}_layers")


def switch(side: str, depth: str) -> Rule:
    count, step = f"num_sparse_{side}_layers", f"{side}_sparse_step"

    def kinds(part: Part, layers: int) -> Kinds:
        sparse = part.get(count, 3)
        distance = layers // sparse if sparse > 0 else layers
        return [distance == 1 or (distance > 0 and i % distance == 1) for i in range(layers)]

    def propose(wanted: Kinds, _: Part) -> Iterator[Mapping[str, Any]]:
        for n in range(len(wanted) + 1):
            yield {count: n, step: len(wanted) // n if n else len(wanted)}

    return Rule(count, kinds, EVERY, values=(Values((count,), propose),), depth=depth)


def trailing(key: str, kind: str) -> Values:
    def propose(wanted: Kinds, _: Part) -> Iterator[Mapping[str, Any]]:
        yield {key: next((i for i, each in enumerate(reversed(wanted)) if each != kind), len(wanted))}

    return Values((key,), propose)


def kv(default: int) -> Rule:
    key = "num_kv_shared_layers"
    limit = "the layers that share keys and values stand last"
    return Rule(key, formulas.shared_kv(default), limit, values=(trailing(key, "shared"),))


def read_layers(key: str, *default: int) -> Rule:
    """Layers whose output is read, each by its own tensors."""
    limit = "every layer whose output is read stays once, in the same order"
    return Rule(key, formulas.order_of(key, default), limit, values=(Values((key,), formulas.proposed_order(key)),))


def shared_hybrids(blocks: Formula) -> tuple[Rule, Rule]:
    """Zamba: kinds as a list, and hybrid layers that share weights by their order."""
    key = "layers_block_type"
    return listed(key, blocks), placed(key, formulas.shared_blocks(blocks), SHARED)


def spelled_out(key: str, formula: Formula, wrap: Any = list) -> Rule:
    """A key whose value can spell out every layer."""
    return Rule(key, formula, EVERY, values=(Values((key,), lambda wanted, _: [{key: wrap(wanted)}]),))


def to_letters(wanted: Kinds) -> str:
    names = {LINEAR: "M", "mamba": "M", "moe": "E", FULL: "*", "attention": "*", "mlp": "-"}
    return "".join(names.get(kind, "?") for kind in wanted)


def per_layer_input(default: int) -> Rule:
    """One tensor beside the layers holds a part for each of them."""
    key = "hidden_size_per_layer_input"
    return placed(key, where(key, formulas.place_and_count, default=default))
