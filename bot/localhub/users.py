"""Users, organisations, tokens and their rights.

    ROOT/users.json   {"users":  {name: {"fullname"}},
                       "orgs":   {name: {"members": {user: "admin" | "write" | "read"}}},
                       "tokens": {sha256: {"user", "role", "label", "namespaces"?, "expires"?}},
                       "grants": {"models/ns/name": [user]}}     users who may read a gated repo's files

Tokens are stored as their sha256 only. Roles: `read`; `write`; `fineGrained` (writes to its `namespaces` only); `oauth`
(a login, which identifies a user and grants nothing).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bot.localhub.answers import HubError
from bot.localhub.names import RepoId, valid_segment
from bot.localhub.storage import Repo
from bot.storage import exclusive, read_json, write_json

Role = Literal["read", "write", "fineGrained", "oauth"]


@dataclass(frozen=True, slots=True)
class Visitor:
    """Sender of one request; `name` is None without a token."""

    name: str | None = None
    role: str = "read"
    label: str = ""
    namespaces: tuple[str, ...] = ()


class Users:
    """Reads users.json on each change of the file, so that another process may add users while the server runs."""

    def __init__(self, root: Path) -> None:
        self._path = root / "users.json"
        self._lock = root / "locks" / "users"
        self._seen: tuple[int, int, int] | None = None
        self._facts: dict[str, Any] = {}

    def facts(self) -> dict[str, Any]:
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return _empty()
        seen = (status.st_mtime_ns, status.st_size, status.st_ino)
        if seen != self._seen:
            self._facts = {**_empty(), **(read_json(self._path) or {})}
            self._seen = seen
        return self._facts

    def visitor(self, authorization: str | None) -> Visitor:
        """Owner of a Bearer token; anonymous without one; 401 for an unknown token."""
        if not authorization:
            return Visitor()
        scheme, _, token = authorization.partition(" ")
        known = self.facts()["tokens"].get(_hash(token.strip())) if scheme.lower() == "bearer" else None
        if known is None or known.get("expires", float("inf")) < time.time():
            raise HubError(401, "Invalid credentials in Authorization header")
        return Visitor(known["user"], known["role"], known.get("label", ""), tuple(known.get("namespaces", ())))

    def orgs_of(self, user: str) -> dict[str, str]:
        """Organisation -> role of a user in it."""
        orgs = self.facts()["orgs"]
        return {name: org["members"][user] for name, org in sorted(orgs.items()) if user in org["members"]}

    def is_member(self, visitor: Visitor, namespace: str) -> bool:
        if visitor.name is None or visitor.role == "oauth":
            return False
        return visitor.name == namespace or namespace in self.orgs_of(visitor.name)

    def may_write(self, visitor: Visitor, namespace: str) -> bool:
        if visitor.name is None or visitor.role not in ("write", "fineGrained"):
            return False
        if visitor.role == "fineGrained" and namespace not in visitor.namespaces:
            return False
        return visitor.name == namespace or self.orgs_of(visitor.name).get(namespace) in ("admin", "write")

    def may_see(self, visitor: Visitor, repo: Repo) -> bool:
        return not repo.private or self.is_member(visitor, repo.id.namespace)

    def may_download(self, visitor: Visitor, repo: Repo) -> bool:
        granted = self.facts()["grants"].get(f"{repo.id.kind}/{repo.id}", [])
        return not repo.gated or self.is_member(visitor, repo.id.namespace) or visitor.name in granted

    # -- changes

    def add(self, name: str, token: str | None, role: Role, orgs: Iterable[str], namespaces: Iterable[str]) -> None:
        _check_name(name)
        with exclusive(self._lock):
            facts = self._copy()
            if name in facts["orgs"]:
                raise ValueError(f"{name} is an organisation already")
            facts["users"].setdefault(name, {"fullname": name})
            for org in orgs:
                _check_name(org)
                facts["orgs"].setdefault(org, {"members": {}})["members"][name] = "admin"
            if token:
                facts["tokens"][_hash(token)] = {"user": name, "role": role, "label": f"{name}'s token"}
                if role == "fineGrained":
                    facts["tokens"][_hash(token)]["namespaces"] = sorted(namespaces)
            write_json(self._path, facts)

    def add_login(self, name: str, token: str, lifetime_s: int) -> None:
        """Store an OAuth access token; expired ones are removed on the way."""
        with exclusive(self._lock):
            facts, now = self._copy(), time.time()
            facts["tokens"] = {k: v for k, v in facts["tokens"].items() if v.get("expires", float("inf")) > now}
            facts["tokens"][_hash(token)] = {
                "user": name,
                "role": "oauth",
                "label": "login",
                "expires": now + lifetime_s,
            }
            write_json(self._path, facts)

    def grant(self, repo: RepoId, name: str) -> None:
        with exclusive(self._lock):
            facts = self._copy()
            granted = facts["grants"].setdefault(f"{repo.kind}/{repo}", [])
            if name not in granted:
                granted.append(name)
            write_json(self._path, facts)

    def _copy(self) -> dict[str, Any]:
        return {**_empty(), **(read_json(self._path) or {})}


def add_user(
    root: Path,
    name: str,
    token: str | None = None,
    role: Role = "write",
    orgs: Iterable[str] = (),
    namespaces: Iterable[str] = (),
) -> None:
    """Create a user of the Hub at `root`, with a token of that role, as admin of `orgs`; missing ones are created."""
    Users(root).add(name, token, role, orgs, namespaces)


def _empty() -> dict[str, Any]:
    return {"users": {}, "orgs": {}, "tokens": {}, "grants": {}}


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _check_name(name: str) -> None:
    if not valid_segment(name):
        raise ValueError(f"{name!r} cannot be the name of a user or an organisation")
