"""Spellings of a tensor's name: LayerNorm's `gamma` and `beta`, and prefixes of the layers. merging.md 1.5."""

from __future__ import annotations

from collections.abc import Iterator, Mapping


def aliases(name: str) -> Iterator[str]:
    """The name, then the other spellings of it."""
    yield name
    for old, new in ((".gamma", ".weight"), (".beta", ".bias"), (".weight", ".gamma"), (".bias", ".beta")):
        if name.endswith(old):
            yield name.removesuffix(old) + new


def spelling(suffix: str, first: Mapping[str, str]) -> str:
    """The first source's spelling of a suffix."""
    return next((alias for alias in aliases(suffix) if alias in first), suffix)


def find(layer: Mapping[str, str], suffix: str) -> str | None:
    """The layer's tensor for a suffix, in whatever spelling."""
    return next((layer[alias] for alias in aliases(suffix) if alias in layer), None)


def under_prefix(name: str, prefix: str, other: str) -> Iterator[str]:
    """Spellings of a name in a model with the layer prefix `other`, for a name under `prefix`."""
    for alias in aliases(name):
        yield alias
        if prefix != other and prefix.endswith(other):
            yield alias.removeprefix(prefix.removesuffix(other))
        elif prefix != other and other.endswith(prefix):
            yield other.removesuffix(prefix) + alias
