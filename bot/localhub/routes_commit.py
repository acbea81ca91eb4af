"""Changes to a repo: upload modes and commits."""

from __future__ import annotations

import base64
import binascii
import fnmatch
import json
import re
from collections.abc import Iterator
from typing import Any

from starlette.responses import JSONResponse, Response

from bot.localhub import threads
from bot.localhub.answers import HubError, bad_request, entry_not_found
from bot.localhub.info import text_of
from bot.localhub.metadata import complaints
from bot.localhub.names import valid_path
from bot.localhub.routes_repos import repo_url
from bot.localhub.routing import Call, Routes
from bot.localhub.storage import Commit, FileEntry, Refs, Repo, Store

routes = Routes()
COMMIT_LIMIT_BYTES = 256 << 20
REGULAR_LIMIT_BYTES = 10 << 20
_MAX_FILES = 256
_COMMIT_ID = re.compile(r"[0-9a-f]{7,40}")


@routes.add("POST", "/api/{kind}/{ns}/{name}/preupload/{rev}")
def preupload(call: Call) -> Response:
    repo = call.repo() if call.flag("create_pr") else call.writable_repo()
    call.require_write_token()
    commit = call.store.at(repo.id, call.params["rev"])
    files = call.json().get("files")
    if not isinstance(files, list) or len(files) > _MAX_FILES:
        raise bad_request(f"files must be a list of at most {_MAX_FILES}")
    patterns = lfs_patterns(text_of(call.store, repo, commit.files.get(".gitattributes")))
    ignored = text_of(call.store, repo, commit.files.get(".gitignore")).splitlines()
    return JSONResponse({"files": [_advice(file, commit, patterns, ignored) for file in files]})


def _advice(file: Any, commit: Commit, patterns: list[str], ignored: list[str]) -> dict[str, Any]:
    try:
        path, size = str(file["path"]), int(file["size"])
        sample = base64.b64decode(file.get("sample") or "", validate=True)
    except (TypeError, KeyError, ValueError, OverflowError):
        raise bad_request("each file needs path, size and sample") from None
    _require_path(path)
    mode = "lfs" if goes_to_lfs(path, size, sample, patterns) else "regular"
    advice: dict[str, Any] = {"path": path, "uploadMode": mode, "shouldIgnore": _matches(path, ignored)}
    current = commit.files.get(path)
    if current is not None:
        advice["oid"] = current.sha256 or current.oid
    return advice


def lfs_patterns(attributes: str) -> list[str]:
    """The patterns of a .gitattributes that send files to large file storage."""
    rows = [line.split() for line in attributes.splitlines() if line.strip() and not line.startswith("#")]
    return [row[0] for row in rows if "filter=lfs" in row[1:]]


def goes_to_lfs(path: str, size: int, sample: bytes, patterns: list[str]) -> bool:
    return size >= REGULAR_LIMIT_BYTES or b"\0" in sample or _matches(path, patterns)


def _matches(path: str, patterns: list[str]) -> bool:
    name = path.rsplit("/", 1)[-1]
    real = [pattern.strip() for pattern in patterns if pattern.strip() and not pattern.startswith("#")]
    return any(fnmatch.fnmatchcase(path, one) or fnmatch.fnmatchcase(name, one) for one in real)


def _require_path(path: str) -> None:
    if not valid_path(path):
        raise bad_request(f"{path[:80]!r} is not a path inside a repo")


@routes.add("POST", "/api/{kind}/{ns}/{name}/commit/{rev}", limit_bytes=COMMIT_LIMIT_BYTES)
def commit(call: Call) -> Response:
    repo = call.repo() if call.flag("create_pr") else call.writable_repo()
    author = call.require_write_token()
    lines = list(_lines(call.body))
    header = next((value for key, value in lines if key == "header"), {})
    title = str(header.get("summary") or "").strip()
    if not title:
        raise bad_request("a commit needs a summary")
    with call.store.locked(repo.id):
        ref = call.params["rev"].removeprefix("refs/heads/")
        refs = call.store.refs(repo.id)
        base = _base(header.get("parentCommit"), repo, ref, refs, call)
        files = _changed_files(call.store, repo, base, lines)
        new = call.store.write_commit(repo.id, base.oid, title, str(header.get("description") or ""), author, files)
        answer: dict[str, Any] = {"success": True, "commitOid": new.oid, "hookOutput": ""}
        answer["commitUrl"] = f"{repo_url(call, repo.id)}/commit/{new.oid}"
        if call.flag("create_pr"):
            number = threads.open_pull_request(call.store, repo.id, author, title, new, base.oid, refs)
            answer["pullRequestUrl"] = f"{repo_url(call, repo.id)}/discussions/{number}"
        else:
            _advance(call.store, repo, ref, refs, new)
    return JSONResponse(answer)


def _base(parent: Any, repo: Repo, ref: str, refs: Refs, call: Call) -> Commit:
    """Parent of the commit: `parent` for a new pull request, else the head of `ref`, if `parent` names it.

    `parent` is an id or the first 7 or more digits of one; None builds on the head.
    """
    head = call.store.at(repo.id, ref)
    if parent is not None and not _COMMIT_ID.fullmatch(parent if isinstance(parent, str) else ""):
        raise bad_request("parentCommit must be 7 to 40 hexadecimal digits")
    if call.flag("create_pr"):
        return head if parent is None else call.store.at(repo.id, parent)
    if parent is not None and not head.oid.startswith(parent):
        raise HubError(412, f"A commit has happened since. Please refresh and try again. Head is {head.oid}.")
    if ref not in refs.heads and not ref.startswith("refs/pr/"):
        raise bad_request(f"{ref} is not a branch")
    return head


def _advance(store: Store, repo: Repo, ref: str, refs: Refs, new: Commit) -> None:
    if ref.startswith("refs/pr/"):
        number = ref.removeprefix("refs/pr/")
        refs.pr[number] = new.oid
        store.write_refs(repo.id, refs)
        threads.add_commit_event(store, repo.id, int(number), new)
    else:
        refs.heads[ref] = new.oid
        store.write_refs(repo.id, refs)


def _lines(body: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(body.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            key, value = str(record["key"]), record["value"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise bad_request(f"line {number} of the commit is not a JSON record") from None
        if not isinstance(value, dict):
            raise bad_request(f"line {number} of the commit has no value")
        yield key, value


def _changed_files(
    store: Store, repo: Repo, base: Commit, lines: list[tuple[str, dict[str, Any]]]
) -> dict[str, FileEntry]:
    """Files after the commit. An error changes no ref."""
    files = dict(base.files)
    for key, value in lines:
        if key == "header":
            continue
        path = str(value.get("path") or "")
        _require_path(path.rstrip("/") if key == "deletedFolder" else path)
        if key == "file":
            files[path] = _small_file(store, repo, path, value)
        elif key == "lfsFile":
            size = value.get("size")
            files[path] = store.large_entry(repo.id, _sha256(value), size if isinstance(size, int) else None)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise _nothing_to_delete(path, base)
        elif key == "deletedFolder":
            _delete_folder(files, path.rstrip("/"), base)
        else:
            raise bad_request(f"unknown record {key!r} in the commit")
    _check_shape(files)
    return files


def _small_file(store: Store, repo: Repo, path: str, value: dict[str, Any]) -> FileEntry:
    try:
        if value.get("encoding") == "base64":
            data = base64.b64decode(value["content"], validate=True)
        else:
            data = str(value["content"]).encode()
    except (KeyError, TypeError, binascii.Error):
        raise bad_request(f"{path}: the content is not base64") from None
    if path == "README.md" and (found := complaints(data.decode("utf-8", "replace"))):
        raise bad_request(f"README.md: {'; '.join(found)}")
    return FileEntry(store.objects(repo.id).put(data), len(data))


def _sha256(value: dict[str, Any]) -> str:
    oid = str(value.get("oid") or "")
    if value.get("algo", "sha256") != "sha256" or not is_sha256(oid):
        raise bad_request("a large file is named by its sha256")
    return oid


def is_sha256(text: str) -> bool:
    return len(text) == 64 and all(digit in "0123456789abcdef" for digit in text)


def _delete_folder(files: dict[str, FileEntry], folder: str, base: Commit) -> None:
    inside = [path for path in files if path.startswith(f"{folder}/")]
    if not inside:
        raise _nothing_to_delete(folder, base)
    for path in inside:
        del files[path]


def _nothing_to_delete(path: str, base: Commit) -> HubError:
    error = entry_not_found(path, base.oid)
    error.message = "A file with this name doesn't exist"
    return error


def _check_shape(files: dict[str, FileEntry]) -> None:
    """A path cannot be a file and a folder at once: a client could not check such a repo out."""
    for path in files:
        parts = path.split("/")
        for depth in range(1, len(parts)):
            if "/".join(parts[:depth]) in files:
                raise bad_request(f"{'/'.join(parts[:depth])!r} is a file, {path!r} needs it as a folder")
