"""The publisher: creates a repo exactly once, under a lease. The only process with the write token.

It imports no torch, no transformers and no templates, and parses no untrusted YAML: it receives finished texts and a
manifest, hashes bytes and uploads them. The steps are those of docs/design/reliability.md 6.2; each may be repeated
after a crash.

    P1 re-hash   P2 create the repo, read the marker   P3 upload   P4 ONE commit   P5 read back   P6 make public
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bot.errors import Failed, PublishConflict, Refused, Transient
from bot.hub import FileFact, Hub
from bot.jobs import stage_process
from bot.jobs.job import Publication, PublishedFile
from bot.jobs.queue import Queue, open_queue
from bot.jobs.specs import BoardSpec, PublishSpec, ReplySpec
from bot.progress import Show
from bot.settings import Settings, failpoint
from bot.storage import sha256_file

MARKER = ".mergebot.json"
UNTOUCHED = {".gitattributes"}
ATTEMPTS = 3

Content = bytes | Path


@dataclass(frozen=True, slots=True)
class Place:
    """Target of a publication: a repo, the parent commit, and the commit that already holds everything, if any."""

    repo: str
    head: str | None
    done: str | None


def publish(spec: PublishSpec, settings: Settings, report: Show) -> Publication:
    """Publish the files of `spec` and verify on the Hub that they are the evaluated ones."""
    started, content, lease = time.monotonic(), spec.content, spec.lease
    hub, queue = Hub(settings.hub, token=settings.write_token()), open_queue(settings)
    files, heads = _verified(spec.out, content.files), _verified(spec.carried, content.heads)
    failpoint("publish.after_manifest_check")
    marker = {"schema": 1, "digest": content.digest, "manifest": content.manifest}
    bytes_of_marker = (json.dumps(marker, sort_keys=True) + "\n").encode()
    evaluated: dict[str, Content] = {**files, MARKER: bytes_of_marker}

    for _ in range(ATTEMPTS):
        place = _place(hub, list(content.texts), marker)
        failpoint("publish.after_create_repo")
        if place.done is not None:
            queue.begin_commit(lease)
            # An earlier attempt's commit: texts and heads may be of an earlier measurement, its weights are the same.
            commit, expected = place.done, evaluated
            break
        expected = evaluated | heads | {path: text.encode() for path, text in content.texts[place.repo].items()}
        new_commit = _commit(hub, queue, spec, place, expected, report)
        if new_commit is not None:
            commit = new_commit
            break
    else:
        raise Transient(
            "PUBLISH_CONFLICT",
            f"{place.repo} changed while it was being published.",
            "It is tried again automatically.",
        )
    failpoint("publish.after_commit")
    _read_back(hub, place.repo, commit, expected, alone=place.done is None)
    failpoint("publish.after_readback")
    for source in content.sources:
        _still_there(hub, source.repo, source.revision)
    hub.make_public(place.repo)
    failpoint("publish.after_public")
    return Publication(place.repo, commit, time.monotonic() - started)


def _verified(out: Path, files: Mapping[str, PublishedFile]) -> dict[str, Path]:
    """P1: compare every file with the recorded hash of what was merged and evaluated."""
    for name, file in files.items():
        if sha256_file(out / name) != file.sha256:
            raise Failed("PUBLISH_CONFLICT", f"{name} is not the file that was evaluated.", "Ask for the merge again.")
    return {name: out / name for name in files}


def _place(hub: Hub, names: list[str], marker: Mapping[str, Any]) -> Place:
    """P2: the first name that is ours or free. Without our marker only a private, empty repo is written to."""
    for repo in names:
        hub.create_private(repo)
        head = hub.head(repo)
        text = None if head is None else hub.read_text(repo, head, MARKER, limit_bytes=4096)
        if text is None:
            paths = set() if head is None else set(hub.tree(repo, head))
            if paths <= UNTOUCHED and hub.resolve(repo).private:
                return Place(repo, head, None)
            continue
        existing = json.loads(text)
        if existing["digest"] != marker["digest"]:
            continue
        if existing["manifest"] != marker["manifest"]:
            raise Failed(
                "PUBLISH_CONFLICT",
                f"{repo} already holds another result of the same request.",
                "The operator should compare the two; nothing was changed.",
            )
        return Place(repo, head, head)
    raise Failed("PUBLISH_CONFLICT", f"Every name for {names[0]} is taken.", "Ask again under another name.")


def _commit(
    hub: Hub,
    queue: Queue,
    spec: PublishSpec,
    place: Place,
    contents: Mapping[str, Content],
    report: Show,
) -> str | None:
    """P3 and P4. None if another commit came first; the caller then starts over."""
    total = len(contents)
    for done, path in enumerate(hub.upload(place.repo, contents)):
        report(f"Uploading {path}", done, total)
        failpoint("publish.after_upload", done)
    queue.begin_commit(spec.lease)
    failpoint("publish.before_commit")
    try:
        return hub.commit(
            place.repo,
            contents,
            parent=place.head,
            message=f"mergebot: publish {spec.content.key12}",
            description=f"manifest {spec.content.manifest}",
        )
    except PublishConflict:
        return None


def _read_back(hub: Hub, repo: str, commit: str, expected: Mapping[str, Content], *, alone: bool) -> None:
    """P5: verify that the tree at `commit` holds the expected bytes and, if `alone`, nothing else."""
    tree = hub.tree(repo, commit)
    wrong = sorted(set(expected) - set(tree))
    wrong += sorted(set(tree) - set(expected) - UNTOUCHED) if alone else []
    wrong += [path for path, content in expected.items() if path in tree and not _same(content, tree[path])]
    if wrong:
        raise Failed(
            "PUBLISH_CONFLICT",
            f"{repo} does not hold the evaluated bytes: {wrong[0]} differs.",
            "The operator should check it before it is used.",
        )


def _same(content: Content, stored: FileFact) -> bool:
    length = content.stat().st_size if isinstance(content, Path) else len(content)
    digest = hashlib.sha256() if stored.sha256 is not None else hashlib.sha1(f"blob {length}\0".encode())
    with content.open("rb") if isinstance(content, Path) else io.BytesIO(content) as stream:
        hashed = hashlib.file_digest(stream, lambda: digest).hexdigest()
    return hashed == stored.sha256 if stored.sha256 is not None else (length, hashed) == (stored.size, stored.blob_id)


def _still_there(hub: Hub, repo: str, revision: str) -> None:
    try:
        hub.resolve(repo, revision)
    except Refused as gone:
        raise Failed(
            "SOURCE_CHANGED_OR_GONE", f"{repo} at {revision[:7]} is no longer public.", "The merge stays private."
        ) from gone


def board(spec: BoardSpec, settings: Settings, report: Show) -> None:
    """Write the board and the results datasets; a file that is already equal is left alone."""
    hub = Hub(settings.hub, token=settings.write_token())
    for number, (repo, texts) in enumerate(spec.datasets.items()):
        report(f"Updating {repo}", number, len(spec.datasets))
        _write_dataset(hub, repo, texts, spec.message)
        failpoint("board.after_results" if number == 0 else "board.after_commit")


def _write_dataset(hub: Hub, repo: str, texts: Mapping[str, str], message: str) -> None:
    hub.create_private(repo, repo_type="dataset")
    for _ in range(ATTEMPTS):
        head = hub.head(repo, repo_type="dataset")
        tree = {} if head is None else hub.tree(repo, head, repo_type="dataset")
        changed: dict[str, Content] = {
            path: text.encode()
            for path, text in texts.items()
            if path not in tree or not _same(text.encode(), tree[path])
        }
        if not changed:
            break
        try:
            hub.commit(repo, changed, parent=head, message=message, repo_type="dataset")
            break
        except PublishConflict:
            continue
    else:
        raise Transient("PUBLISH_CONFLICT", f"{repo} keeps changing.", "It is tried again automatically.")
    hub.make_public(repo, repo_type="dataset")


def reply(spec: ReplySpec, settings: Settings, report: Show) -> None:
    """Post the reply to a request by card in one discussion of its repo, at most once."""
    hub = Hub(settings.hub, token=settings.write_token())
    number = hub.find_discussion(spec.repo, spec.title)
    if number is None:
        number = hub.open_discussion(spec.repo, spec.title, spec.opening)
    hub.comment(spec.repo, number, spec.text, ref=spec.ref)
    failpoint("reply.after_post")


if __name__ == "__main__":
    stage_process.main({"publish": (PublishSpec, publish), "board": (BoardSpec, board), "reply": (ReplySpec, reply)})
