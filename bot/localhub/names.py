"""Names from outside: checked once here, safe to use as file names afterwards."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bot.localhub.answers import bad_request

KINDS = ("models", "datasets", "spaces")
SINGULAR = {"models": "model", "datasets": "dataset", "spaces": "space"}
PLURAL = {one: many for many, one in SINGULAR.items()}
# First parts of paths that mean something else; a namespace of that name could not be reached.
RESERVED = frozenset({"api", "oauth", "models", "datasets", "spaces", "_local", "_lfs", "settings", "login"})
_SEGMENT = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,95})")
_REF = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,199}")


@dataclass(frozen=True, slots=True, order=True)
class RepoId:
    """A repo's address: its kind in the plural form of URLs, its namespace, its name."""

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
    """The id, or 400 when one of its parts could mean anything else than one folder."""
    if kind not in KINDS:
        raise bad_request(f"unknown repo type {kind!r}")
    if namespace in RESERVED or not (valid_segment(namespace) and valid_segment(name)):
        raise bad_request(
            "repo ids are namespace/name with letters, digits, '-', '_' and '.', at most 96 each, no '--' and no '..'"
        )
    return RepoId(kind, namespace, name)


def valid_ref(name: str) -> bool:
    """Branch and tag names; a name that reads like a commit id is refused because it would shadow one."""
    return (
        _REF.fullmatch(name) is not None
        and ".." not in name
        and "//" not in name
        and not name.endswith(("/", ".", ".lock"))
        and not name.startswith("refs/")
        and re.fullmatch(r"[0-9a-f]{7,40}", name) is None
    )


def valid_path(path: str) -> bool:
    """Paths inside a repo: relative, normal, printable. They never name a file on our disk, but a client's."""
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
