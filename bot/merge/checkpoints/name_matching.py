"""Find the stored tensor that an adapter's tensor belongs to, where the two are named differently.

An adapter carries the paths of a model's modules (`model.language_model.layers.0...`), a checkpoint may leave out a
prefix or keep older names (`language_model.model.layers.0...`). Known renames of the family come first; then the
tower that a path names, the shapes and the words that two paths share decide. Names of one stack move together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from bot.merge.checkpoints.header import TensorInfo
from bot.merge.checkpoints.tensor_names import AUDIO, VISION, stack_of

Fits = Callable[[tuple[int, ...]], bool]  # True if a stored tensor of this shape may be the wanted one
_TOWERS = (
    ("vision", VISION),
    ("audio", AUDIO),
    ("encoder", re.compile(r"(^|\.)encoder\.")),
)
_PREFIXES_LIMIT = 10_000  # pairs of prefixes; no model has so many stacks


@dataclass(slots=True)
class Located:
    """Wanted name -> stored name, and for names with several possible tensors those tensors."""

    names: dict[str, str] = field(default_factory=dict)
    ambiguous: dict[str, tuple[str, ...]] = field(default_factory=dict)


def locate(
    wanted: Mapping[str, Fits], stored: Mapping[str, TensorInfo], published: Callable[[str], str] = lambda name: name
) -> Located:
    """Find every wanted name among the stored ones; names without a possible stored tensor are in neither table.

    `published` gives the name that the family's files have for a module of transformers 5.
    """
    known = {name: name if name in stored else published(name) for name in wanted}
    out = Located({name: own for name, own in known.items() if own in stored})
    groups: dict[str, list[str]] = {}
    for name in wanted:
        if name not in out.names:
            groups.setdefault(stack_of(name), []).append(name)
    loose = groups.pop("", [])
    stacks = {stack_of(name) for name in stored} - {""}
    if len(groups) * len(stacks) <= _PREFIXES_LIMIT:
        for prefix, names in groups.items():
            _settle(out, names, _stacks_for(prefix, names, stacks, wanted, stored))
    endings = _by_ending(name for name in stored if not stack_of(name))
    for name in loose:
        _settle(out, [name], _tensors_for(name, wanted[name], endings.get(_ending(name), ()), stored))
    _keep_one_each(out)
    return out


def _stacks_for(
    prefix: str,
    names: Sequence[str],
    stacks: Iterable[str],
    wanted: Mapping[str, Fits],
    stored: Mapping[str, TensorInfo],
) -> list[dict[str, str]]:
    """Candidates for the names of one stack of layers: one table per stored stack that is left."""
    rest = {name: name.removeprefix(prefix) for name in names}
    tower = _tower(prefix)
    possible = [
        stack
        for stack in sorted(stacks)
        if _tower(stack) == tower and all(stack + end in stored for end in rest.values())
    ]
    with_shape = [s for s in possible if all(wanted[name](stored[s + end].shape) for name, end in rest.items())]
    best = _most_alike(prefix, with_shape or possible)
    return [{name: stack + end for name, end in rest.items()} for stack in best]


def _tensors_for(
    name: str, fits: Fits, same_ending: Sequence[str], stored: Mapping[str, TensorInfo]
) -> list[dict[str, str]]:
    """Candidates for a name outside of layers."""
    possible = [own for own in same_ending if _tower(own) == _tower(name)]
    with_shape = [own for own in possible if fits(stored[own].shape)]
    return [{name: own} for own in _most_alike(name, with_shape or possible)]


def _tower(path: str) -> str:
    return next((tower for tower, words in _TOWERS if words.search(path)), "text")


def _most_alike(path: str, candidates: Sequence[str]) -> list[str]:
    """The candidates that share most words with a path."""
    words = set(path.split("."))
    shared = {candidate: len(words.intersection(candidate.split("."))) for candidate in candidates}
    most = max(shared.values(), default=0)
    return [candidate for candidate in candidates if shared[candidate] == most]


def _ending(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _by_ending(names: Iterable[str]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for name in names:
        out.setdefault(_ending(name), []).append(name)
    return out


def _settle(out: Located, names: Sequence[str], tables: Sequence[Mapping[str, str]]) -> None:
    if len(tables) == 1:
        out.names.update(tables[0])
    elif tables:
        out.ambiguous.update({name: tuple(table[name] for table in tables) for name in names})


def _keep_one_each(out: Located) -> None:
    """Two names with the same stored tensor are both ambiguous; a name that is stored as it is keeps its tensor."""
    owners: dict[str, list[str]] = {}
    for name, own in out.names.items():
        owners.setdefault(own, []).append(name)
    for own, names in owners.items():
        for name in names if len(names) > 1 else ():
            if name != own:
                del out.names[name]
                out.ambiguous[name] = (own,)
