"""Discussions and pull requests (hub.md 5.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.responses import JSONResponse, Response

from bot.localhub import threads
from bot.localhub.answers import HubError, bad_request
from bot.localhub.names import is_number
from bot.localhub.routing import Call, Routes
from bot.localhub.storage import Repo, Store
from bot.localhub.threads import Thread

routes = Routes()
_ROOT = "/api/{kind}/{ns}/{name}/discussions"
_LISTED = ("num", "title", "status", "isPullRequest", "createdAt", "author", "repo")
_TEXT_LIMIT = 65_536


@routes.add("GET", _ROOT)
def listing(call: Call) -> Response:
    repo = call.repo()
    found = [thread for thread in threads.all_threads(call.store, repo.id) if _wanted(call, thread)]
    page = call.query("p") or "0"
    start = (int(page) if is_number(page) else 0) * call.page_size
    shown = [{key: thread[key] for key in _LISTED} for thread in found[start : start + call.page_size]]
    # `start` must grow with the page: the client asks on while start + len < count.
    return JSONResponse({"discussions": shown, "count": len(found), "start": start})


def _wanted(call: Call, thread: Thread) -> bool:
    kind, status, author = call.query("type") or "all", call.query("status") or "all", call.query("author")
    if kind != "all" and thread["isPullRequest"] != (kind == "pull_request"):
        return False
    is_open = thread["status"] in ("open", "draft")
    if status != "all" and is_open != (status == "open"):
        return False
    return author is None or thread["author"]["name"] == author


@routes.add("POST", _ROOT)
def create(call: Call) -> Response:
    repo = call.repo()
    author = call.require_write_token()
    body = call.json()
    title = str(body.get("title") or "").strip()
    if not 3 <= len(title) <= 200:
        raise bad_request("a title has 3 to 200 characters")
    pull_request = bool(body.get("pullRequest"))
    text = _bounded(body.get("description"))
    with call.store.locked(repo.id):
        thread = threads.open_thread(call.store, repo.id, author, title, text, pull_request=pull_request)
        if pull_request:
            refs = call.store.refs(repo.id)
            refs.pr[str(thread["num"])] = refs.heads["main"]
            call.store.write_refs(repo.id, refs)
            thread["baseCommit"] = refs.heads["main"]
        threads.save(call.store, repo.id, thread)
    return JSONResponse({"num": thread["num"], "url": f"{call.endpoint}/{repo.id.prefix}{repo.id}/discussions"})


def _bounded(text: Any) -> str:
    if text is not None and not isinstance(text, str):
        raise bad_request("the text is not a string")
    if text and len(text) > _TEXT_LIMIT:
        raise bad_request(f"a text has at most {_TEXT_LIMIT} characters")
    return text or ""


def _number(call: Call) -> int:
    if not is_number(call.params["num"]):
        raise HubError(404, "Discussion not found")
    return int(call.params["num"])


@routes.add("GET", _ROOT + "/{num}")
def details(call: Call) -> Response:
    repo = call.repo()
    thread = threads.load(call.store, repo.id, _number(call))
    shown = {key: value for key, value in thread.items() if key != "baseCommit"}
    if thread["isPullRequest"]:
        shown["filesWithConflicts"] = _conflicts(call.store, repo, thread)
        shown["diff"] = ""
    return JSONResponse(shown)


def _change(call: Call, change: Callable[[Repo, Thread, str], dict[str, Any]]) -> Response:
    """Change one thread under the repo's lock and store it."""
    repo = call.repo()
    author = call.require_write_token()
    with call.store.locked(repo.id):
        thread = threads.load(call.store, repo.id, _number(call))
        answer = change(repo, thread, author)
        threads.save(call.store, repo.id, thread)
    return JSONResponse(answer)


@routes.add("POST", _ROOT + "/{num}/comment")
def comment(call: Call) -> Response:
    text = _bounded(call.json().get("comment"))
    if not text.strip():
        raise bad_request("an empty comment")
    return _change(
        call, lambda _, thread, author: {"newMessage": threads.add_comment(call.store, thread, author, text)}
    )


@routes.add("POST", _ROOT + "/{num}/comment/{event}/edit")
def edit(call: Call) -> Response:
    text = _bounded(call.json().get("content"))

    def change(_: Repo, thread: Thread, author: str) -> dict[str, Any]:
        event = threads.comment_of(thread, call.params["event"])
        if event["author"]["name"] != author:
            raise HubError(403, "Only its author can edit a comment")
        threads.edit_comment(call.store, event, author, text)
        return {"updatedComment": event}

    return _change(call, change)


@routes.add("POST", _ROOT + "/{num}/comment/{event}/hide")
def hide(call: Call) -> Response:
    def change(repo: Repo, thread: Thread, author: str) -> dict[str, Any]:
        event = threads.comment_of(thread, call.params["event"])
        if event["author"]["name"] != author and not call.users.may_write(call.visitor, repo.id.namespace):
            raise HubError(403, "Only its author or the repo's owner can hide a comment")
        event["data"]["hidden"] = True
        event["data"]["latest"]["raw"] = ""
        return {"updatedComment": event}

    return _change(call, change)


@routes.add("POST", _ROOT + "/{num}/status")
def status(call: Call) -> Response:
    body = call.json()
    wanted, text = body.get("status"), _bounded(body.get("comment"))
    if wanted not in ("open", "closed"):
        raise bad_request("status must be open or closed")

    def change(repo: Repo, thread: Thread, author: str) -> dict[str, Any]:
        _require_author_or_owner(call, repo, thread, author)
        if thread["status"] == "merged":
            raise HubError(409, "a merged pull request keeps its status")
        if text:
            threads.add_comment(call.store, thread, author, text)
        thread["status"] = wanted
        return {"newStatus": threads.add_event(call.store, thread, author, "status-change", {"status": wanted})}

    return _change(call, change)


def _require_author_or_owner(call: Call, repo: Repo, thread: Thread, author: str) -> None:
    if thread["author"]["name"] != author and not call.users.may_write(call.visitor, repo.id.namespace):
        raise HubError(403, "Only its author or the repo's owner can change a discussion")


@routes.add("POST", _ROOT + "/{num}/title")
def retitle(call: Call) -> Response:
    title = str(call.json().get("title") or "").strip()
    if not 3 <= len(title) <= 200:
        raise bad_request("a title has 3 to 200 characters")

    def change(repo: Repo, thread: Thread, author: str) -> dict[str, Any]:
        _require_author_or_owner(call, repo, thread, author)
        change = {"from": thread["title"], "to": title}
        thread["title"] = title
        return {"newTitle": threads.add_event(call.store, thread, author, "title-change", change)}

    return _change(call, change)


@routes.add("POST", _ROOT + "/{num}/merge")
def merge(call: Call) -> Response:
    def change(repo: Repo, thread: Thread, author: str) -> dict[str, Any]:
        call.require_write(repo.id.namespace)
        if not thread["isPullRequest"] or thread["status"] not in ("open", "draft"):
            raise HubError(409, "there is no open pull request of this number")
        if conflicts := _conflicts(call.store, repo, thread):
            raise HubError(409, f"conflicts in {', '.join(conflicts)[:200]}")
        refs = call.store.refs(repo.id)
        main = call.store.commit(repo.id, refs.heads["main"])
        files = dict(main.files)
        for path, entry in _pull_changes(call.store, repo, thread).items():
            if entry is None:
                files.pop(path, None)
            else:
                files[path] = entry
        title = f"{thread['title']} (#{thread['num']})"
        merged = call.store.write_commit(repo.id, main.oid, title, "", author, files)
        refs.heads["main"] = merged.oid
        call.store.write_refs(repo.id, refs)
        thread["status"] = "merged"
        thread["changes"]["mergeCommitId"] = merged.oid
        threads.add_event(call.store, thread, author, "status-change", {"status": "merged"})
        return {}

    return _change(call, change)


def _pull_changes(store: Store, repo: Repo, thread: Thread) -> dict[str, Any]:
    """Entries of the paths that a pull request changes; None for deleted ones."""
    head = store.commit(repo.id, store.refs(repo.id).pr[str(thread["num"])]).files
    base = store.commit(repo.id, thread["baseCommit"]).files
    return {path: head.get(path) for path in {*head, *base} if head.get(path) != base.get(path)}


def _conflicts(store: Store, repo: Repo, thread: Thread) -> list[str]:
    if thread["status"] not in ("open", "draft"):
        return []
    main = store.commit(repo.id, store.refs(repo.id).heads["main"]).files
    base = store.commit(repo.id, thread["baseCommit"]).files
    changes = _pull_changes(store, repo, thread)
    return sorted(
        path for path, entry in changes.items() if main.get(path) != base.get(path) and main.get(path) != entry
    )
