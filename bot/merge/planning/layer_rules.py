"""Layer kinds that a config gives by a rule, followed when the layers of a model are cut, stacked or mixed.

A config gives the attention and the MLP of each layer by a list or, more often, by a rule: the first k layers are
dense, every n-th layer is global, the layers with these numbers have experts. A `Rule` computes the kinds as
transformers does. The kinds wanted in the output are those each layer had in its own model; `Rule.edits` gives them as
a list where the config class takes one, else as values of the rule that give the same kinds, else None: a refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
DENSE, SPARSE = "dense", "sparse"
WHOLE = ""  # the key under which a formula finds the whole config

Part = Mapping[str, Any]  # the part of a config that describes one stack of layers
Kinds = list[Any]  # one entry per layer
Formula = Callable[[Part, int], Kinds]


@dataclass(frozen=True, slots=True)
class Values:
    """Config keys of a rule, and values of them that may give the wanted kinds (each is checked)."""

    keys: tuple[str, ...]
    propose: Callable[[Kinds, Part], Iterable[Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One property of every layer. `formula(part, layers)` gives it if the config has no list under `listed`."""

    name: str  # the config key that a refusal names
    formula: Formula
    limit: str  # the orders of layers that the rule can express, for the refusal
    listed: str | None = None  # the key under which the config class takes an explicit list
    values: tuple[Values, ...] = ()
    depth: str | None = None  # the layer count the rule belongs to, where a config has several

    def kinds(self, part: Part, layers: int) -> Kinds:
        """The property of each layer: the explicit list if there is one, else by the formula."""
        given = part.get(self.listed) if self.listed is not None else None
        if isinstance(given, list | tuple) and given and len(given) >= layers:
            return list(given[:layers])
        return self._computed(part, layers)

    def _computed(self, part: Part, layers: int) -> Kinds:
        """Kinds by the formula; None outside of its domain, as for config values of a wrong type."""
        try:
            kinds = self.formula(part, layers)
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
            kinds = []
        return [*kinds, *[None] * layers][:layers]

    def ignores_list(self, part: Part, kinds: Kinds) -> bool:
        """True if a program that does not read the list gets the same kinds from `part`."""
        return self._computed({key: value for key, value in part.items() if key != self.listed}, len(kinds)) == kinds

    def edits(self, part: Part, wanted: Kinds) -> Mapping[str, Any] | None:
        """Changes of `part` that make `kinds` equal to `wanted`; None if there are none."""
        if self.kinds(part, len(wanted)) == wanted:
            return {}
        if self.listed is not None:
            return {self.listed: wanted} if None not in wanted else None
        return self._solved(part, wanted)

    def old_edits(self, part: Part, wanted: Kinds) -> Mapping[str, Any] | None:
        """Changes of the keys that older programs read instead of the list; None if these keys cannot express it."""
        bare = {key: value for key, value in part.items() if key != self.listed}
        return {} if self.ignores_list(part, wanted) else self._solved(bare, wanted)

    def _solved(self, part: Part, wanted: Kinds) -> Mapping[str, Any] | None:
        tries = (edits for values in self.values for edits in values.propose(wanted, part))
        return next((one for one in tries if self._computed({**part, **one}, len(wanted)) == wanted), None)


def setting(part: Part, key: str, default: Any) -> Any:
    """Value of a key; the default of the config class if it is missing or null."""
    value = part.get(key)
    return default if value is None else value


def every(period: int | tuple[str, int], on: Any = FULL, off: Any = SLIDING, *, shift: int = 1) -> Formula:
    """`on` in the layers i with (i + shift) % period == 0, else `off`; period is a number or (key, default)."""

    def kinds(part: Part, layers: int) -> Kinds:
        step = period if isinstance(period, int) else setting(part, *period)
        step = len(step) if isinstance(step, str) else step
        return [on if step < 1 or (i + shift) % step == 0 else off for i in range(layers)]

    return kinds


def first(count: int | tuple[str, int], on: Any = DENSE, off: Any = SPARSE) -> Formula:
    """`on` in the first layers, `off` in the others; count is a number or (key, default)."""

    def kinds(part: Part, layers: int) -> Kinds:
        head = count if isinstance(count, int) else setting(part, *count)
        return [on if i < head else off for i in range(layers)]

    return kinds


def numbered(key: str, default: Sequence[int] = (), on: Any = True, off: Any = False) -> Formula:
    """`on` in the layers whose numbers are listed under `key`."""
    return lambda part, layers: [on if i in setting(part, key, default) else off for i in range(layers)]


def all_of(kind: Any) -> Formula:
    """The same kind in every layer."""
    return lambda _, layers: [kind] * layers


def leading(key: str, kind: Any = DENSE) -> Values:
    """`key` counts the leading layers of a kind."""

    def propose(wanted: Kinds, _: Part) -> Iterator[Mapping[str, Any]]:
        yield {key: next((i for i, each in enumerate(wanted) if each != kind), len(wanted))}

    return Values((key,), propose)


def period(key: str, kind: Any = FULL, offset: str | None = None) -> Values:
    """`key` is the distance between two layers of a kind, `offset` the number of the first one."""

    def propose(wanted: Kinds, _: Part) -> Iterator[Mapping[str, Any]]:
        at = [i for i, each in enumerate(wanted) if each == kind]
        steps = [at[1] - at[0]] if len(at) > 1 else [at[0] + 1, len(wanted)] if at else [len(wanted) + 1]
        for step in steps:
            yield {key: step} if offset is None else {key: step, offset: at[0] if at else len(wanted)}

    return Values((key,) if offset is None else (key, offset), propose)


def numbers(key: str, kind: Any = True) -> Values:
    """`key` lists the numbers of the layers of a kind."""
    return Values((key,), lambda wanted, _: [{key: [i for i, each in enumerate(wanted) if each == kind]}])


def rules_of(config: Mapping[str, Any], path: Sequence[str], table: Mapping[str, tuple[Rule, ...]]) -> list[Rule]:
    """Rules for the part of `config` that has its layer count at `path`."""
    part = part_at(config, path)
    outer = config.get("model_type", "")
    suffix = {"text_config": "_text", "vision_config": "_vision"}.get(path[0] if len(path) > 1 else "", "")
    own = str(part.get("model_type") or f"{outer}{suffix}")
    found = next((table[name] for name in (own, f"{own}_text") if name in table), None)
    if found is None:  # a family without an entry: the keys that mean the same everywhere
        found = tuple(rule for rule in table["*"] if any(key in part for one in rule.values for key in one.keys))
    return [rule for rule in found if rule.depth in (None, path[-1])]


def at(config: Mapping[str, Any], path: Sequence[str]) -> Any:
    """Value at a path of keys; None if a key is missing."""
    part: Any = config
    for step in path:
        part = part.get(step) if isinstance(part, Mapping) else None
    return part


def part_at(config: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
    """The part of a config that has its layer count at `path`; empty if there is none."""
    part = at(config, path[:-1])
    return part if isinstance(part, Mapping) else {}
