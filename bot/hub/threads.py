"""Discussions, identified by exact title and our user name; comments, identified by their `ref:` line (hub.md 2.4)."""

from __future__ import annotations

from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.community import DiscussionComment

from bot.hub.transport import HubSession


def find(api: HfApi, session: HubSession, me: str, repo: str, title: str, repo_type: str) -> int | None:
    def operation() -> int | None:
        found = api.get_repo_discussions(repo, author=me, discussion_type="discussion", repo_type=repo_type)
        # Another user may open a thread with the same title: only ours counts.
        numbers = [thread.num for thread in found if thread.title == title and thread.author == me]
        return min(numbers, default=None)

    return session.call(f"the discussions of {repo}", operation)


def start(api: HfApi, session: HubSession, repo: str, title: str, text: str, repo_type: str) -> int:
    def operation() -> int:
        return int(api.create_discussion(repo, title, description=text, repo_type=repo_type).num)

    return session.call(f"the discussions of {repo}", operation, repeat=False)


def comment(
    api: HfApi, session: HubSession, me: str, repo: str, number: int, text: str, ref: str, repo_type: str
) -> None:
    if any(_carries(event, me, ref) for event in _details(api, session, repo, number, repo_type).events):
        return
    about = f"discussion {number} of {repo}"
    session.call(
        about, lambda: api.comment_discussion(repo, number, _with_ref(text, ref), repo_type=repo_type), repeat=False
    )


def close(
    api: HfApi, session: HubSession, me: str, repo: str, number: int, text: str, ref: str, repo_type: str
) -> None:
    comment(api, session, me, repo, number, text, ref, repo_type)
    if _details(api, session, repo, number, repo_type).status != "closed":
        about = f"discussion {number} of {repo}"
        session.call(
            about, lambda: api.change_discussion_status(repo, number, "closed", repo_type=repo_type), repeat=False
        )


def _details(api: HfApi, session: HubSession, repo: str, number: int, repo_type: str) -> Any:
    about = f"discussion {number} of {repo}"
    return session.call(about, lambda: api.get_discussion_details(repo, number, repo_type=repo_type))


def _carries(event: Any, me: str, ref: str) -> bool:
    return (
        isinstance(event, DiscussionComment)
        and event.author == me
        and _line_of(ref) in [row.strip() for row in event.content.splitlines()]
    )


def _line_of(ref: str) -> str:
    return ref if ref.startswith("ref: ") else f"ref: {ref}"


def _with_ref(text: str, ref: str) -> str:
    if _line_of(ref) in [row.strip() for row in text.splitlines()]:
        return text
    return f"{text.rstrip()}\n\n{_line_of(ref)}"
