"""Discussions and pull requests of a repo: discussions/<n>.json, one file per thread, numbered together from 1.

A thread holds its events in order; the caller holds the repo's lock over every change.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from bot.localhub.answers import HubError, stamp
from bot.localhub.names import RepoId
from bot.localhub.storage import Commit, Refs, Store
from bot.storage import read_json, write_json

Thread = dict[str, Any]


def _folder(store: Store, repo: RepoId) -> Path:
    return store.folder(repo) / "discussions"


def all_threads(store: Store, repo: RepoId) -> list[Thread]:
    """Newest first, as the Hub lists them."""
    numbers = sorted((int(path.stem) for path in _folder(store, repo).glob("[0-9]*.json")), reverse=True)
    return [load(store, repo, number) for number in numbers]


def load(store: Store, repo: RepoId, number: int) -> Thread:
    thread: Thread | None = read_json(_folder(store, repo) / f"{number}.json")
    if thread is None:
        raise HubError(404, f"Discussion {number} not found")
    return thread


def save(store: Store, repo: RepoId, thread: Thread) -> None:
    write_json(_folder(store, repo) / f"{thread['num']}.json", thread)


def open_thread(store: Store, repo: RepoId, author: str, title: str, text: str, *, pull_request: bool) -> Thread:
    numbers = [int(path.stem) for path in _folder(store, repo).glob("[0-9]*.json")]
    thread: Thread = {
        "num": max(numbers, default=0) + 1,
        "title": title,
        "status": "draft" if pull_request else "open",
        "isPullRequest": pull_request,
        "createdAt": stamp(store.clock()),
        "author": {"name": author},
        "repo": {"name": str(repo), "type": repo.type},
        "events": [],
    }
    if text:
        add_comment(store, thread, author, text)
    if pull_request:
        thread["changes"] = {"base": "refs/heads/main"}
        thread["filesWithConflicts"] = []
    return thread


def add_event(store: Store, thread: Thread, author: str, kind: str, data: dict[str, Any]) -> dict[str, Any]:
    event = {
        "id": secrets.token_hex(12),
        "type": kind,
        "createdAt": stamp(store.clock()),
        "author": {"name": author},
        "data": data,
    }
    thread["events"].append(event)
    return event


def add_comment(store: Store, thread: Thread, author: str, text: str) -> dict[str, Any]:
    latest = {"raw": text, "html": "", "updatedAt": stamp(store.clock()), "author": {"name": author}}
    return add_event(
        store, thread, author, "comment", {"latest": latest, "edited": False, "hidden": False, "history": []}
    )


def comment_of(thread: Thread, event_id: str) -> dict[str, Any]:
    for event in thread["events"]:
        if event["id"] == event_id and event["type"] == "comment":
            found: dict[str, Any] = event
            return found
    raise HubError(404, "Comment not found")


def edit_comment(store: Store, event: dict[str, Any], author: str, text: str) -> None:
    data = event["data"]
    data["history"].append(data["latest"])
    data["latest"] = {"raw": text, "html": "", "updatedAt": stamp(store.clock()), "author": {"name": author}}
    data["edited"] = True


def open_pull_request(
    store: Store, repo: RepoId, author: str, title: str, commit: Commit, base: str, refs: Refs
) -> int:
    """Create a pull request for a commit. The ref comes first: after a kill in between, its number is used again."""
    thread = open_thread(store, repo, author, title[:200], commit.message, pull_request=True)
    thread["baseCommit"] = base
    add_event(store, thread, author, "commit", {"subject": commit.title, "oid": commit.oid})
    refs.pr[str(thread["num"])] = commit.oid
    store.write_refs(repo, refs)
    save(store, repo, thread)
    return int(thread["num"])


def add_commit_event(store: Store, repo: RepoId, number: int, commit: Commit) -> None:
    thread = load(store, repo, number)
    add_event(store, thread, commit.author, "commit", {"subject": commit.title, "oid": commit.oid})
    save(store, repo, thread)
