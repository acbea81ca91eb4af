"""Filling a Hub from a folder: `models|datasets|spaces/<ns>/<name>/…` become repos with one commit each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from bot.localhub.blobs import CHUNK_BYTES
from bot.localhub.names import KINDS, RepoId, repo_id, valid_path
from bot.localhub.routes_commit import goes_to_lfs, lfs_patterns
from bot.localhub.storage import GIT_ATTRIBUTES, FileEntry, Refs, Store, hash_pointer
from bot.storage import sha256_file


def seed(root: Path, folder: Path, *, author: str = "seed") -> list[str]:
    """Put every repo below `folder` on the Hub at `root`; repos that hold exactly these files stay as they are.

    Returns "models/ns/name" of each repo found. Raises ValueError for a name or path that no repo may have.
    """
    store, found = Store(root), []
    for kind in KINDS:
        for place in sorted((folder / kind).glob("*/*")):
            if place.is_dir():
                repo = repo_id(kind, place.parent.name, place.name)
                _seed_repo(store, repo, place, author)
                found.append(f"{kind}/{repo}")
    return found


def _seed_repo(store: Store, repo: RepoId, place: Path, author: str) -> None:
    with store.locked(repo):
        if store.find(repo) is None:
            store.create(repo, author=author, private=False)
        head = store.at(repo, "main")
        files = {".gitattributes": head.files[".gitattributes"]}
        for path in sorted(place.rglob("*")):
            if path.is_file() and not path.is_symlink():
                name = path.relative_to(place).as_posix()
                if not valid_path(name):
                    raise ValueError(f"{path}: {name!r} cannot be a path of a repo")
                files[name] = _store_file(store, repo, path, name)
        if files != dict(head.files):
            commit = store.write_commit(repo, head.oid, "Add files", "", author, files)
            refs = store.refs(repo)
            store.write_refs(repo, Refs({**refs.heads, "main": commit.oid}, refs.tags, refs.pr))


def _store_file(store: Store, repo: RepoId, path: Path, name: str) -> FileEntry:
    size = path.stat().st_size
    with path.open("rb") as file:
        sample = file.read(512)
        if not goes_to_lfs(name, size, sample, lfs_patterns(GIT_ATTRIBUTES.decode())) or not size:
            data = sample + file.read()
            return FileEntry(store.objects(repo).put(data), len(data))
        sha256 = sha256_file(path)
        if not store.blobs.has(sha256):
            file.seek(0)
            store.blobs.store(_chunks(file), sha256, size)
    store.allow_blob(repo, sha256, size)
    return FileEntry(hash_pointer(sha256, size), size, sha256)


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk
