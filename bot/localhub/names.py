"""Validation of names in requests; a valid name is safe as a file name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bot.localhub.answers import bad_request

KINDS = ("models", "datasets", "spaces")
SINGULAR = {"models": "model", "datasets": "dataset", "spaces": "space"}
PLURAL = {one: many for many, one in SINGULAR.items()}
# First path segments with another meaning; a namespace of that name could not be reached.
RESERVED = frozenset({"api", "oauth", "models", "datasets", "spaces", "_local", "_lfs", "settings", "login"})
_SEGMENT = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,95})")
_REF = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,199}")


@dataclass(frozen=True, slots=True, order=True)
class RepoId:
    """Id of a repo: kind (plural, as in URLs), namespace and name."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def prefix(self) -> str:
        """Part before the id in URLs outside /api ("" for models)."""
        return "" if self.kind == "models" else f"{self.kind}/"

    @property
    def type(self) -> str:
        return SINGULAR[self.kind]


def valid_segment(text: str) -> bool:
    return (
        _SEGMENT.fullmatch(text) is not None
        and ".." not in text
        and "--" not in text
        and not text.endswith((".git", "-", "."))
    )


def repo_id(kind: str, namespace: str, name: str) -> RepoId:
    """The id of a repo; 400 if a part is not a valid folder name."""
    if kind not in KINDS:
        raise bad_request(f"unknown repo type {kind!r}")
    if namespace in RESERVED or not (valid_segment(namespace) and valid_segment(name)):
        raise bad_request(
            "repo ids are namespace/name with letters, digits, '-', '_' and '.', at most 96 each, no '--' and no '..'"
        )
    return RepoId(kind, namespace, name)


def valid_ref(name: str) -> bool:
    """Check a branch or tag name. One that looks like a commit id is refused because it would shadow a commit."""
    return (
        _REF.fullmatch(name) is not None
        and ".." not in name
        and "//" not in name
        and not name.endswith(("/", ".", ".lock"))
        and not name.startswith("refs/")
        and re.fullmatch(r"[0-9a-f]{7,40}", name) is None
    )


def valid_path(path: str) -> bool:
    """Check a path inside a repo: relative, normalised and printable, because clients create files at it."""
    parts = path.split("/")
    return (
        0 < len(path.encode("utf-8", "replace")) <= 1024
        and "\\" not in path
        and path.isprintable()
        and all(part not in ("", ".", "..") and part.lower() != ".git" for part in parts)
        and not (len(parts[0]) == 2 and parts[0][1] == ":")
    )


def is_number(text: str) -> bool:
    """Return whether the text is plain digits that fit an int; `str.isdigit` also accepts "²" and a thousand digits."""
    return text.isascii() and text.isdigit() and len(text) <= 18
