"""Hub client. Takes and returns values of this package; every failure is an exception of bot.errors.

Address and token are explicit in every call and never read from the machine.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import disable_progress_bars

from bot.errors import HubForbidden, Refused, SourceNotFound, Transient
from bot.hub import threads
from bot.hub.files import DOWNLOAD_LIMIT_BYTES, FileFact, Progress, RepoFiles, download, read_tree, stream
from bot.hub.ranges import Verified, fetch
from bot.hub.transport import FileNotFoundOnHub, HubSession
from bot.settings import LIVE_HUB

# Progress is reported through our own callbacks; the library's bars would be drawn over them.
disable_progress_bars()

T = TypeVar("T")
Content = bytes | Path
_ID = re.compile(r"[\w\-.]{1,96}/[\w\-.]{1,96}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class PinnedRepo:
    """A repo at one commit. `licence` is the license of the card at that commit; None if it names none.

    Several are joined by commas; `other` is followed by the card's name for it in brackets.
    """

    repo: str
    revision: str
    tags: tuple[str, ...]
    licence: str | None
    private: bool
    gated: bool
    last_modified: str | None


@dataclass(frozen=True, slots=True)
class User:
    name: str
    orgs: tuple[str, ...]


def check_repo_id(repo: str) -> str:
    """Check that the text is `owner/name`. Raises Refused NOT_A_REPO_ID (docs/design/reliability.md 4.3)."""
    if not _ID.fullmatch(repo) or "--" in repo or ".." in repo or repo.endswith(".git"):
        raise Refused(
            "NOT_A_REPO_ID",
            "That is not a repo id.",
            "Write owner/name, not an address or a path.",
            value=repo,
        )
    return repo


class Hub:
    """A Hub at one address, with one token or none. `deadline_s` limits each call, repeats included."""

    def __init__(
        self,
        endpoint: str,
        token: str | None = None,
        *,
        deadline_s: float = 120.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.endpoint = endpoint.rstrip("/")
        self._session = HubSession(self.endpoint, deadline_s, sleep)
        # token=False: never a token stored on this machine
        self._api = HfApi(endpoint=self.endpoint, token=token or False)
        self._user: User | None = None

    # -- reading

    def whoami(self) -> User:
        """Owner of the token, requested once because the Hub limits this call strictly."""
        if self._user is None:
            facts = self._session.call("our token", self._api.whoami)
            self._user = User(facts["name"], tuple(org["name"] for org in facts.get("orgs", ())))
        return self._user

    def resolve(self, repo: str, revision: str | None = None, repo_type: str = "model") -> PinnedRepo:
        """Pin a name to a commit. Raises Refused SOURCE_NOT_FOUND, SOURCE_GATED, NOT_A_REPO_ID."""
        check_repo_id(repo)
        about = repo if revision is None else f"{repo}@{revision}"

        def operation() -> PinnedRepo:
            return _pinned(self._api.repo_info(repo, revision=revision, repo_type=repo_type))

        return self._session.call(about, operation)

    def files(self, repo: str, revision: str, repo_type: str = "model") -> RepoFiles:
        """The files at a commit, read by HTTP range. Refuses a revision that is not a full commit id."""
        return RepoFiles(self._api, self._session, check_repo_id(repo), _commit_id(revision), repo_type)

    def tree(self, repo: str, revision: str, repo_type: str = "model") -> dict[str, FileFact]:
        """Facts of each path in a commit."""
        return read_tree(self._api, self._session, check_repo_id(repo), revision, repo_type)

    def read_text(self, repo: str, revision: str, path: str, limit_bytes: int, repo_type: str = "model") -> str | None:
        """A small text at a commit; None if absent. Raises Refused DOWNLOAD_TOO_LARGE beyond the limit."""
        files = self.files(repo, revision, repo_type)

        def operation() -> bytes:
            with stream(files, path, 0, limit_bytes + 1, whole=True) as chunks:
                return b"".join(chunks)

        try:
            data = self._session.call(f"{path} of {files}", operation)
        except FileNotFoundOnHub:
            return None
        if len(data) > limit_bytes:
            raise Refused(
                "DOWNLOAD_TOO_LARGE", f"{path} of {files} is larger than {limit_bytes} bytes.", "Make it shorter."
            )
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Refused("REQUEST_INVALID", f"{path} of {files} is not UTF-8 text.", "Save it as UTF-8.") from error

    def download(
        self,
        repo: str,
        revision: str,
        into: Path,
        *,
        progress: Progress | None = None,
        limit_bytes: int = DOWNLOAD_LIMIT_BYTES,
    ) -> Path:
        """Download the allowed files of a model at a commit into the folder `into`, each verified by hash (files.py).

        `progress(done_bytes, total_bytes, file_name)`.
        """
        try:
            return download(self.files(repo, revision), into, progress, limit_bytes)
        except FileNotFoundOnHub as gone:
            raise _gone(gone) from gone

    def fetch(
        self,
        repo: str,
        revision: str,
        into: Path,
        ranges: Mapping[str, Sequence[tuple[int, int]]],
        *,
        progress: Progress | None = None,
        limit_bytes: int = DOWNLOAD_LIMIT_BYTES,
    ) -> dict[str, Verified]:
        """Fetch byte ranges of files at a commit into `into`, as sparse files of full size (ranges.py).

        `ranges` holds [start, end) by file. Several requests run at once; an interrupted fetch continues. Returns the
        kind of verification of each file. `progress(done_bytes, total_bytes, file_name)`.
        """
        try:
            return fetch(self.files(repo, revision), into, ranges, progress, limit_bytes)
        except FileNotFoundOnHub as gone:
            raise _gone(gone) from gone

    def tagged(self, tag: str, repo_type: str = "model", limit: int | None = None) -> list[PinnedRepo]:
        """Repos with a tag, most recently changed first. The response does not include licenses."""
        fields = ["sha", "lastModified", "tags", "private", "gated", "disabled"]
        lists: dict[str, Callable[..., Any]] = {"model": self._api.list_models, "dataset": self._api.list_datasets}

        def operation() -> list[PinnedRepo]:
            found = lists[repo_type](filter=tag, sort="last_modified", limit=limit, expand=fields)
            return [_pinned(info) for info in found if not info.disabled]

        return self._session.call(f"the list of repos tagged {tag}", operation)

    # -- writing: the caller checks the effect before it repeats one of these (reliability.md 6.2)

    def create_private(self, repo: str, repo_type: str = "model") -> None:
        """Create the repo if it is missing. An existing repo keeps its visibility."""
        check_repo_id(repo)
        self._write(
            repo, lambda: self._api.create_repo(repo, private=True, exist_ok=True, repo_type=repo_type), repeat=True
        )

    def head(self, repo: str, repo_type: str = "model") -> str | None:
        """Commit of main; None if the repo does not exist."""
        try:
            return self.resolve(repo, repo_type=repo_type).revision
        except SourceNotFound:
            return None

    def upload(self, repo: str, files: Mapping[str, Content], repo_type: str = "model") -> Iterator[str]:
        """Upload large contents ahead of the commit, one by one; yields each path once it is on the Hub.

        Contents are addressed by their hash, so a repeat costs nothing. Small files are part of the commit.
        """
        for path, content in files.items():

            def operation(path: str = path, content: Content = content) -> None:
                with ExitStack() as opened:
                    addition = self._addition(opened, path, content)
                    self._api.preupload_lfs_files(repo, [addition], repo_type=repo_type, free_memory=False)

            self._write(f"{path} of {repo}", operation, repeat=True, deadline_s=_upload_time_s(content))
            yield path

    def commit(
        self,
        repo: str,
        files: Mapping[str, Content],
        *,
        parent: str | None,
        message: str,
        description: str = "",
        repo_type: str = "model",
    ) -> str:
        """Commit all files to main at once and return the commit. Raises PublishConflict if main is not at `parent`.

        The client leaves out files that are equal on the Hub; if all are, the current head is returned. Read the tree
        back to verify the result.
        """

        def operation() -> str:
            with ExitStack() as opened:
                return str(
                    self._api.create_commit(
                        repo,
                        [self._addition(opened, path, content) for path, content in files.items()],
                        commit_message=message,
                        commit_description=description,
                        parent_commit=parent,
                        repo_type=repo_type,
                    ).oid
                )

        time_s = sum(_upload_time_s(content) for content in files.values())
        return self._write(repo, operation, deadline_s=time_s)

    def make_public(self, repo: str, repo_type: str = "model") -> None:
        """Make the repo public and verify it."""
        self._write(
            repo, lambda: self._api.update_repo_settings(repo, visibility="public", repo_type=repo_type), repeat=True
        )
        if self.resolve(repo, repo_type=repo_type).private:
            raise Transient("HUB_UNAVAILABLE", f"{repo} is still private.", "It is tried again automatically.")

    # -- discussions (threads.py)

    def find_discussion(self, repo: str, title: str, repo_type: str = "model") -> int | None:
        """Our own open or closed discussion with exactly this title."""
        return threads.find(self._api, self._session, self.whoami().name, repo, title, repo_type)

    def open_discussion(self, repo: str, title: str, text: str, repo_type: str = "model") -> int:
        return threads.start(self._api, self._session, repo, title, text, repo_type)

    def comment(self, repo: str, number: int, text: str, ref: str, repo_type: str = "model") -> None:
        """Post the comment unless one of ours already has the line `ref`."""
        threads.comment(self._api, self._session, self.whoami().name, repo, number, text, ref, repo_type)

    def close_discussion(self, repo: str, number: int, text: str, ref: str, repo_type: str = "model") -> None:
        """Close with a last comment, each of the two at most once."""
        threads.close(self._api, self._session, self.whoami().name, repo, number, text, ref, repo_type)

    # -- inside

    def _write(
        self, about: str, operation: Callable[[], T], *, repeat: bool = False, deadline_s: float | None = None
    ) -> T:
        try:
            return self._session.call(about, operation, repeat=repeat, deadline_s=deadline_s)
        except HubForbidden as error:
            # reliability.md 8.2: a token that lost its rights must not fail a job
            raise Transient(
                "PUBLISHING_PAUSED",
                f"The Hub does not accept our token for {about}.",
                "Publishing waits until the token is renewed.",
                retry_after_s=600,
            ) from error

    def _addition(self, opened: ExitStack, path: str, content: Content) -> CommitOperationAdd:
        """An operation that uploads without Xet, which only the live Hub supports (docs/design/hub.md 5.5): an open
        file or a buffer instead of a path or bytes makes the client use the plain upload."""
        if self.endpoint == LIVE_HUB:
            return CommitOperationAdd(path, content)
        if isinstance(content, Path):
            return CommitOperationAdd(path, opened.enter_context(content.open("rb")))
        return CommitOperationAdd(path, io.BytesIO(content))


def _gone(absent: FileNotFoundOnHub) -> Refused:
    return Refused(
        "SOURCE_CHANGED_OR_GONE", f"{absent} no longer exists.", "Submit the request again with the current repo."
    )


def _upload_time_s(content: Content) -> float:
    """Two minutes, plus a second per megabyte."""
    size = content.stat().st_size if isinstance(content, Path) else len(content)
    return 120.0 + size / 1e6


def _commit_id(revision: str) -> str:
    if not _COMMIT.fullmatch(revision):
        raise ValueError(f"{revision!r} is not a full commit id: resolve names first")
    return revision


def _pinned(info: Any) -> PinnedRepo:
    """Convert the library's repo info. A missing field makes the response invalid, so it raises."""
    if not _COMMIT.fullmatch(info.sha or ""):
        raise ValueError("the response names no commit")
    card = getattr(info, "card_data", None)
    modified = info.last_modified
    return PinnedRepo(
        repo=info.id,
        revision=info.sha,
        tags=tuple(info.tags or ()),
        licence=None if card is None else _license(card.to_dict()),
        private=bool(info.private),
        gated=bool(info.gated),
        last_modified=None if modified is None else modified.isoformat(),
    )


def _license(card: Mapping[str, Any]) -> str | None:
    """The license of a card's metadata: a text or a list of them, in any case of letters."""
    value = card.get("license")
    names = [each.strip().lower() for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]
    if names == ["other"] and isinstance(card.get("license_name"), str):
        return f"other ({card['license_name'].strip().lower()})"
    return ", ".join(dict.fromkeys(names)) or None
