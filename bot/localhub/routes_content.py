"""Content of a repo: tree, paths-info, refs, commits, and the files themselves."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

from starlette.responses import JSONResponse, Response, StreamingResponse

from bot.localhub.answers import HubError, bad_request, entry_not_found
from bot.localhub.blobs import CHUNK_BYTES
from bot.localhub.info import pointer_size
from bot.localhub.names import is_number
from bot.localhub.page import PICTURES
from bot.localhub.routes_repos import next_page
from bot.localhub.routing import Call, Routes
from bot.localhub.storage import Commit, FileEntry, Repo

routes = Routes()
_TREE_PAGE, _TREE_PAGE_EXPANDED, _COMMITS_PAGE, _MAX_PATHS = 1000, 50, 100, 1000
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")
_TEXT = "text/plain; charset=utf-8"
_TYPES = {".json": "application/json", ".jsonl": _TEXT, ".md": _TEXT, **PICTURES}


@routes.add("GET", "/api/{kind}/{ns}/{name}/tree/{rev}")
@routes.add("GET", "/api/{kind}/{ns}/{name}/tree/{rev}/{path*}")
def tree(call: Call) -> Response:
    repo = call.repo()
    commit = call.store.at(repo.id, call.params["rev"])
    folder = call.params.get("path", "").strip("/")
    expand = call.flag("expand")
    entries = _entries_below(commit, folder, recursive=call.flag("recursive"))
    if not entries and folder:
        raise entry_not_found(folder, commit.oid)
    cursor = call.query("cursor") or "0"
    if not is_number(cursor):
        raise bad_request("cursor must be a number")
    start, page = int(cursor), _TREE_PAGE_EXPANDED if expand else _TREE_PAGE
    shown = [_described(call, repo, commit, entry, expand) for entry in entries[start : start + page]]
    return JSONResponse(shown, headers=next_page(call, start + page, len(entries)))


@routes.add("POST", "/api/{kind}/{ns}/{name}/paths-info/{rev}")
def paths_info(call: Call) -> Response:
    repo = call.repo()
    commit = call.store.at(repo.id, call.params["rev"])
    if call.request.headers.get("content-type", "").startswith("application/json"):
        body = call.json()
        listed = body.get("paths")
        paths, expand = [str(path) for path in listed] if isinstance(listed, list) else [], bool(body.get("expand"))
    else:
        form = parse_qs(call.body.decode("utf-8", "replace"))
        paths, expand = form.get("paths", []), form.get("expand", ["false"])[0].lower() == "true"
    if len(paths) > _MAX_PATHS:
        raise HubError(413, f"at most {_MAX_PATHS} paths at once")
    known = {entry["path"]: entry for entry in _entries_below(commit, "", recursive=True)}
    wanted = [known[path] for path in dict.fromkeys(path.strip("/") for path in paths) if path in known]
    return JSONResponse([_described(call, repo, commit, entry, expand) for entry in wanted])


def _entries_below(commit: Commit, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    """Files and folders below `folder`; folders are listed in recursive answers too (datasets relies on it)."""
    start = f"{folder}/" if folder else ""
    below = {path: entry for path, entry in commit.files.items() if path.startswith(start)}
    folders: dict[str, hashlib._Hash] = {}
    for path, entry in sorted(below.items()):
        parts = path.removeprefix(start).split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            digest = folders.setdefault(start + "/".join(parts[:depth]), hashlib.sha1())
            digest.update(f"{path} {entry.oid}\n".encode())
    listed: list[dict[str, Any]] = [
        {"type": "directory", "oid": digest.hexdigest(), "size": 0, "path": path} for path, digest in folders.items()
    ]
    listed += [_file_entry(path, entry) for path, entry in below.items()]
    if not recursive:
        listed = [entry for entry in listed if "/" not in entry["path"].removeprefix(start)]
    return sorted(listed, key=lambda entry: str(entry["path"]))


def _file_entry(path: str, entry: FileEntry) -> dict[str, Any]:
    shown: dict[str, Any] = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
    if entry.sha256:
        shown["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": pointer_size(entry)}
    return shown


def _described(call: Call, repo: Repo, commit: Commit, entry: dict[str, Any], expand: bool) -> dict[str, Any]:
    if not expand:
        return entry
    last = _last_change(call, repo, commit, entry["path"])
    shown = {**entry, "lastCommit": {"id": last.oid, "title": last.title, "date": last.date}}
    if entry["type"] == "file":
        unscanned = {"status": "unscanned"}
        shown["securityFileStatus"] = {"status": "unscanned", "avScan": unscanned, "pickleImportScan": unscanned}
    return shown


def _last_change(call: Call, repo: Repo, commit: Commit, path: str) -> Commit:
    def content(at: Commit) -> list[FileEntry]:
        return [entry for name, entry in sorted(at.files.items()) if name == path or name.startswith(f"{path}/")]

    last = commit
    for older in call.store.history(repo.id, commit.oid):
        if content(older) != content(commit):
            break
        last = older
    return last


@routes.add("GET", "/api/{kind}/{ns}/{name}/refs")
def refs(call: Call) -> Response:
    repo = call.repo()
    known = call.store.refs(repo.id)
    answer: dict[str, Any] = {
        "branches": [_ref(name, f"refs/heads/{name}", sha) for name, sha in sorted(known.heads.items())],
        "converts": [],
        "tags": [_ref(name, f"refs/tags/{name}", sha) for name, sha in sorted(known.tags.items())],
    }
    if call.flag("include_prs"):
        answer["pullRequests"] = [_ref(n, f"refs/pr/{n}", sha) for n, sha in sorted(known.pr.items())]
    return JSONResponse(answer)


def _ref(name: str, ref: str, sha: str) -> dict[str, str]:
    return {"name": name, "ref": ref, "targetCommit": sha}


@routes.add("GET", "/api/{kind}/{ns}/{name}/commits/{rev}")
def commits(call: Call) -> Response:
    repo = call.repo()
    history = list(call.store.history(repo.id, call.store.resolve(repo.id, call.params["rev"])))
    cursor = call.query("cursor") or "0"
    start = int(cursor) if is_number(cursor) else 0
    shown = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.message,
            "date": commit.date,
            "authors": [{"user": commit.author}],
        }
        for commit in history[start : start + _COMMITS_PAGE]
    ]
    return JSONResponse(shown, headers=next_page(call, start + _COMMITS_PAGE, len(history)))


@routes.add("POST", "/api/{kind}/{ns}/{name}/branch/{branch*}")
def create_branch(call: Call) -> Response:
    repo = call.writable_repo()
    start = str(call.json().get("startingPoint") or "main")
    with call.store.locked(repo.id):
        call.store.add_ref(repo.id, "heads", call.params["branch"], call.store.resolve(repo.id, start))
    return JSONResponse({})


@routes.add("DELETE", "/api/{kind}/{ns}/{name}/branch/{branch*}")
def delete_branch(call: Call) -> Response:
    repo = call.writable_repo()
    with call.store.locked(repo.id):
        call.store.remove_ref(repo.id, "heads", call.params["branch"])
    return JSONResponse({})


@routes.add("POST", "/api/{kind}/{ns}/{name}/tag/{rev}")
def create_tag(call: Call) -> Response:
    repo = call.writable_repo()
    name = str(call.json().get("tag") or "")
    with call.store.locked(repo.id):
        call.store.add_ref(repo.id, "tags", name, call.store.resolve(repo.id, call.params["rev"]))
    return JSONResponse({})


@routes.add("DELETE", "/api/{kind}/{ns}/{name}/tag/{tag*}")
def delete_tag(call: Call) -> Response:
    repo = call.writable_repo()
    with call.store.locked(repo.id):
        call.store.remove_ref(repo.id, "tags", call.params["tag"])
    return JSONResponse({})


@routes.add("GET HEAD", "/{P}{ns}/{name}/resolve/{rev}/{path*}")
def resolve(call: Call) -> Response:
    repo = call.repo()
    if not call.users.may_download(call.visitor, repo):
        raise HubError(401 if call.visitor.name is None else 403, "Access to this repo is restricted", "GatedRepo")
    commit = call.store.at(repo.id, call.params["rev"])
    path = call.params["path"]
    entry = commit.files.get(path)
    if entry is None:
        raise entry_not_found(path, commit.oid)
    headers = {
        "X-Repo-Commit": commit.oid,
        "ETag": f'"{entry.sha256 or entry.oid}"',
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(path.rsplit('/', 1)[-1])}",
        # Untrusted files share the origin of the pages: a browser must neither guess their type nor run them. An SVG
        # that is opened directly may use inline styles only.
        "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; sandbox",
        "X-Content-Type-Options": "nosniff",
    }
    if entry.sha256:
        headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    return _file_response(call, call.store.content_path(repo.id, entry), entry.size, path, headers)


def _file_response(call: Call, file: Path, size: int, name: str, headers: dict[str, str]) -> Response:
    media = _TYPES.get(Path(name).suffix.lower(), "application/octet-stream")
    asked = call.request.headers.get("range")
    start, end, status = 0, size, 200
    if asked is not None and (found := _RANGE.fullmatch(asked.strip())):
        start, end = _span(found.group(1), found.group(2), size)
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        status = 206
    headers["Content-Length"] = str(end - start)
    if call.request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=media)
    return StreamingResponse(_slices(file, start, end), status, headers=headers, media_type=media)


def _span(first: str, last: str, size: int) -> tuple[int, int]:
    """[start, end) of "a-b", "a-" or "-n"; 416 if it is outside the file."""
    if first:
        start, end = int(first), min(int(last) + 1, size) if last else size
    else:
        start, end = max(0, size - int(last or 0)), size
    if start >= end:
        raise HubError(416, "the range is outside the file", headers={"Content-Range": f"bytes */{size}"})
    return start, end


def _slices(file: Path, start: int, end: int) -> Iterator[bytes]:
    with file.open("rb") as stream:
        stream.seek(start)
        left = end - start
        while left > 0:
            chunk = stream.read(min(CHUNK_BYTES, left))
            if not chunk:
                raise OSError(f"{file} ends early")
            left -= len(chunk)
            yield chunk
