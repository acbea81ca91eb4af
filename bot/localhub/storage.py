"""Repos on disk.

    ROOT/blobs/ab/<sha256>                        large files, shared (blobs.py)
    ROOT/repos/<kind>/<ns>/<name>/repo.json       private, gated, createdAt, ... or only movedTo
                                  objects/<sha1>  small files by git blob id
                                  lfs/<sha256>    empty: this repo may use that shared blob
                                  commits/<40hex>.json
                                  refs.json       {heads, tags, pr}: replaced last, so a commit exists or does not
                                  discussions/<n>.json
    ROOT/locks/                                   one lock file per repo, held over each change
    ROOT/users.json, ROOT/journal.ndjson          users.py, journal.py

A commit checks its parent, writes objects, writes the commit file, replaces refs.json: a kill in between
leaves unreferenced files and the old head.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bot.localhub.answers import HubError, bad_request, revision_not_found, stamp
from bot.localhub.blobs import Blobs, Objects, git_blob_id, lfs_pointer
from bot.localhub.names import RepoId, repo_id, valid_ref, valid_segment
from bot.storage import exclusive, read_json, sync_folder, write_atomic, write_json

LFS_PATTERNS = (
    *("*.safetensors", "*.bin", "*.gguf", "*.parquet", "*.arrow", "*.msgpack"),
    *("*.pt", "*.onnx", "*.zip", "tokenizer.model"),
)
UPLOAD_LIFETIME_S = 6 * 3600
GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One path of a commit: its git blob id (of the pointer, for a large file), its size, its sha256 when large."""

    oid: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, FileEntry]


@dataclass(frozen=True, slots=True)
class Repo:
    """Content of repo.json. `gated` is False, "auto" or "manual"; times are stamps."""

    id: RepoId
    object_id: str
    private: bool
    created_at: str
    gated: bool | str = False
    disabled: bool = False
    likes: int = 0
    downloads: int = 0
    sdk: str | None = None


@dataclass(frozen=True, slots=True)
class Refs:
    heads: dict[str, str]
    tags: dict[str, str]
    pr: dict[str, str]


class Store:
    """All repos below one folder. `clock` and `new_id` (24 hex) can be passed in, so that commits are reproducible."""

    def __init__(
        self,
        root: Path,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        new_id: Callable[[], str] = lambda: secrets.token_hex(12),
    ) -> None:
        self.root, self.clock, self.new_id = root, clock, new_id
        self.blobs = Blobs(root)
        self._repos = root / "repos"
        self._repos.mkdir(parents=True, exist_ok=True)

    # -- repos

    def folder(self, repo: RepoId) -> Path:
        return self._repos / repo.kind / repo.namespace / repo.name

    def locked(self, repo: RepoId) -> AbstractContextManager[None]:
        return exclusive(self.root / "locks" / f"{repo.kind}--{repo.namespace}--{repo.name}")

    def find(self, repo: RepoId) -> Repo | None:
        facts = read_json(self.folder(repo) / "repo.json")
        return None if facts is None or "movedTo" in facts else Repo(id=repo, **facts)

    def moved_to(self, repo: RepoId) -> RepoId | None:
        """Current id of a repo that was moved away from this id."""
        facts = read_json(self.folder(repo) / "repo.json")
        if facts is None or "movedTo" not in facts:
            return None
        namespace, _, name = facts["movedTo"].partition("/")
        return repo_id(repo.kind, namespace, name)

    def all(self, kind: str) -> Iterator[Repo]:
        base = self._repos / kind
        for path in sorted(base.glob("*/*/repo.json")):
            namespace, name = path.parts[-3:-1]
            if valid_segment(namespace) and valid_segment(name):
                repo = self.find(RepoId(kind, namespace, name))
                if repo is not None:
                    yield repo

    def create(self, repo: RepoId, *, author: str, private: bool, sdk: str | None = None) -> Repo:
        """Create a repo with its first commit. The caller holds the lock and has checked that the name is free."""
        folder = self.folder(repo)
        if folder.exists():  # an interrupted creation, or the stub of a moved repo
            self._discard(folder)
        facts = Repo(repo, self.new_id(), private, stamp(self.clock()), sdk=sdk)
        entry = FileEntry(self.objects(repo).put(GIT_ATTRIBUTES), len(GIT_ATTRIBUTES))
        commit = self.write_commit(repo, None, "initial commit", "", author, {".gitattributes": entry})
        self.write_refs(repo, Refs({"main": commit.oid}, {}, {}))
        self.write_repo(facts)  # last: a repo exists when repo.json does
        return facts

    def write_repo(self, repo: Repo) -> None:
        facts = asdict(repo)
        del facts["id"]
        write_json(self.folder(repo.id) / "repo.json", facts)

    def update(self, repo: Repo, **changes: Any) -> Repo:
        changed = replace(repo, **changes)
        self.write_repo(changed)
        return changed

    def delete(self, repo: RepoId) -> None:
        self._discard(self.folder(repo))

    def move(self, old: RepoId, new: RepoId) -> None:
        target = self.folder(new)
        if target.exists():
            self._discard(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.folder(old).rename(target)
        write_json(self.folder(old) / "repo.json", {"movedTo": str(new)})
        sync_folder(target.parent)

    def sweep(self) -> None:
        """Clean up after a kill, at start-up: interrupted deletions, uploads that cannot be finished."""
        shutil.rmtree(self.root / "trash", ignore_errors=True)
        if self.blobs.incoming.is_dir():
            for path in self.blobs.incoming.iterdir():
                if time.time() - path.stat().st_mtime > UPLOAD_LIFETIME_S:
                    path.unlink(missing_ok=True)

    def _discard(self, folder: Path) -> None:
        # Renamed away first: a deletion cut short must not leave half a repo that still answers.
        trash = self.root / "trash" / secrets.token_hex(8)
        trash.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)

    # -- contents

    def objects(self, repo: RepoId) -> Objects:
        return Objects(self.folder(repo) / "objects")

    def allow_blob(self, repo: RepoId, sha256: str, size: int) -> None:
        """Allow the repo to use a blob that was uploaded or seeded to it."""
        write_atomic(self.folder(repo) / "lfs" / sha256, str(size).encode())

    def allowed_size(self, repo: RepoId, sha256: str) -> int | None:
        """Size of a large file that this repo may use; None if it was never uploaded to this repo."""
        try:
            size = int((self.folder(repo) / "lfs" / sha256).read_text())
        except FileNotFoundError:
            return None
        return size if self.blobs.has(sha256) else None

    def large_entry(self, repo: RepoId, sha256: str, size: int | None) -> FileEntry:
        known = self.allowed_size(repo, sha256)
        if known is None or (size is not None and size != known):
            raise bad_request(f"the large file {sha256[:12]}… was not uploaded to this repo with that size")
        return FileEntry(hash_pointer(sha256, known), known, sha256)

    def content_path(self, repo: RepoId, entry: FileEntry) -> Path:
        return self.blobs.path(entry.sha256) if entry.sha256 else self.objects(repo).path(entry.oid)

    def read(self, repo: RepoId, entry: FileEntry) -> bytes:
        return self.content_path(repo, entry).read_bytes()

    # -- commits and refs

    def refs(self, repo: RepoId) -> Refs:
        facts = read_json(self.folder(repo) / "refs.json") or {}
        return Refs(facts.get("heads", {}), facts.get("tags", {}), facts.get("pr", {}))

    def write_refs(self, repo: RepoId, refs: Refs) -> None:
        write_json(self.folder(repo) / "refs.json", asdict(refs))

    def resolve(self, repo: RepoId, revision: str) -> str:
        """Branch, tag, refs/…, or at least 7 digits of a commit id -> commit id; 404 RevisionNotFound otherwise."""
        refs = self.refs(repo)
        named = {
            **{f"refs/pr/{n}": sha for n, sha in refs.pr.items()},
            **{f"refs/tags/{name}": sha for name, sha in refs.tags.items()},
            **{f"refs/heads/{name}": sha for name, sha in refs.heads.items()},
            **refs.tags,
            **refs.heads,
        }
        if revision in named:
            return named[revision]
        if 7 <= len(revision) <= 40 and all(digit in "0123456789abcdef" for digit in revision):
            found = sorted((self.folder(repo) / "commits").glob(f"{revision}*.json"))
            if len(found) == 1:
                return found[0].stem
        raise revision_not_found(revision)

    def commit(self, repo: RepoId, oid: str) -> Commit:
        facts = read_json(self.folder(repo) / "commits" / f"{oid}.json")
        if facts is None:
            raise revision_not_found(oid)
        facts["files"] = {path: FileEntry(**entry) for path, entry in facts["files"].items()}
        return Commit(**facts)

    def at(self, repo: RepoId, revision: str) -> Commit:
        return self.commit(repo, self.resolve(repo, revision))

    def history(self, repo: RepoId, oid: str) -> Iterator[Commit]:
        """Newest first."""
        following: str | None = oid
        while following is not None:
            commit = self.commit(repo, following)
            yield commit
            following = commit.parent

    def write_commit(
        self, repo: RepoId, parent: str | None, title: str, message: str, author: str, files: Mapping[str, FileEntry]
    ) -> Commit:
        """Write the commit file; it is visible once a ref names it."""
        date = stamp(self.clock())
        tree = {path: asdict(files[path]) for path in sorted(files)}
        identity = {"parent": parent, "date": date, "files": tree, "title": title, "message": message, "author": author}
        text = json.dumps(identity, sort_keys=True, ensure_ascii=False).encode()
        oid = hashlib.sha1(text).hexdigest()
        write_json(self.folder(repo) / "commits" / f"{oid}.json", {"oid": oid, **identity})
        return Commit(oid, parent, title, message, author, date, dict(files))

    def add_ref(self, repo: RepoId, group: str, name: str, sha: str) -> None:
        """Create a branch ("heads") or tag ("tags"); 409 if the name is taken."""
        if not valid_ref(name):
            raise bad_request(f"{name!r} is not a valid reference name")
        refs = self.refs(repo)
        names = getattr(refs, group)
        if name in names:
            raise HubError(409, f"Reference already exists: {name}")
        names[name] = sha
        self.write_refs(repo, refs)

    def remove_ref(self, repo: RepoId, group: str, name: str) -> None:
        refs = self.refs(repo)
        names = getattr(refs, group)
        if name not in names:
            raise revision_not_found(name)
        if (group, name) == ("heads", "main"):
            raise HubError(403, "the branch main cannot be deleted")
        del names[name]
        self.write_refs(repo, refs)


def hash_pointer(sha256: str, size: int) -> str:
    return git_blob_id(lfs_pointer(sha256, size))
