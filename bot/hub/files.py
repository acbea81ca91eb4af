"""Reading one repo at one commit: names, sizes and hashes, byte ranges, and whole files that were checked.

Each small file is checked against its git blob id, each large one against its sha256, as the tree at the pinned commit
names them; the client library itself compares sizes only.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from bot.errors import Refused, Transient
from bot.hub.transport import HubSession, Unavailable, check_deadline
from bot.merge.checkpoints.model_files import OTHER_FILES, TOKENIZER_FILES
from bot.merge.checkpoints.weight_files import INDEX, weight_file
from bot.storage import exclusive, move_into_place, sha256_file, size_text, sync_folder

# reliability.md 5: the only files of a source that are written to disk, all from the top folder of the repo.
ALLOWED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "adapter_config.json",
    *TOKENIZER_FILES,
    *OTHER_FILES,
)
INDEX_LIMIT_BYTES = 8 << 20
DOWNLOAD_LIMIT_BYTES = 120_000_000_000
# A header is read in two steps, 8 bytes and the rest: one request covers both.
_FIRST_READ_BYTES = 256 << 10
_PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class FileFact:
    """Facts of one path in a commit. `blob_id` is the git blob id (of the pointer, for a large file)."""

    size: int
    sha256: str | None
    blob_id: str


def read_tree(api: HfApi, session: HubSession, repo: str, revision: str, repo_type: str) -> dict[str, FileFact]:
    """All files of the repo at the revision."""

    def operation() -> dict[str, FileFact]:
        entries = api.list_repo_tree(repo, recursive=True, revision=revision, repo_type=repo_type)
        return {
            entry.path: FileFact(entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
            for entry in entries
            if isinstance(entry, RepoFile)
        }

    return session.call(f"{repo}@{revision[:7]}", operation)


class RepoFiles:
    """The files of one repo at one commit, read by HTTP range; used for headers before any download.

    Satisfies `bot.merge.checkpoints.checkpoint.Files`. Not for several threads at once.
    """

    def __init__(self, api: HfApi, session: HubSession, repo: str, revision: str, repo_type: str = "model") -> None:
        self.repo, self.revision, self.repo_type = repo, revision, repo_type
        self.api, self.session = api, session
        self._facts: dict[str, FileFact] | None = None
        self._starts: dict[str, bytes] = {}

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision[:7]}"

    def facts(self) -> dict[str, FileFact]:
        if self._facts is None:
            self._facts = read_tree(self.api, self.session, self.repo, self.revision, self.repo_type)
        return self._facts

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of every file, names relative with `/`."""
        return {name: fact.size for name, fact in self.facts().items()}

    def sha256s(self) -> dict[str, str | None]:
        """Name -> sha256 of every large file; None for small ones, which have a git blob id only."""
        return {name: fact.sha256 for name, fact in self.facts().items()}

    def read(self, name: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`, fewer only at the end of the file."""
        size = self.facts()[name].size
        length = max(0, min(length, size - start))
        if start + length <= _FIRST_READ_BYTES:
            if name not in self._starts:
                self._starts[name] = self._range(name, 0, min(size, _FIRST_READ_BYTES))
            return self._starts[name][start : start + length]
        return self._range(name, start, length)

    def harmless(self) -> HarmlessFiles:
        """The files that are read from an untrusted repo (`ALLOWED`)."""
        return HarmlessFiles(self, allowed_files(self))

    def _range(self, name: str, start: int, length: int) -> bytes:
        if length == 0:
            return b""
        about = f"{name} of {self}"

        def operation() -> bytes:
            with stream(self, name, start, start + length) as chunks:
                data = b"".join(chunks)
            if len(data) != length:
                raise Unavailable(f"it sent {len(data)} of {length} bytes")
            return data

        return self.session.call(about, operation)


@dataclass(frozen=True, slots=True)
class HarmlessFiles:
    """Files of a repo that the allow-list names."""

    whole: RepoFiles
    facts: Mapping[str, FileFact]

    def __str__(self) -> str:
        return str(self.whole)

    def sizes(self) -> dict[str, int]:
        return {name: fact.size for name, fact in self.facts.items()}

    def read(self, name: str, start: int, length: int) -> bytes:
        return self.whole.read(name, start, length)


def address(endpoint: str, repo: str, revision: str, path: str, repo_type: str) -> str:
    return f"{endpoint}/{_PREFIXES[repo_type]}{repo}/resolve/{quote(revision, safe='')}/{quote(path)}"


@contextmanager
def answer(files: RepoFiles, name: str, span: tuple[int, int] | None) -> Iterator[httpx2.Response]:
    """Response to a request for bytes [start, end) of a file, or for all of it. Errors are raised; the body is not
    read."""
    # identity: a compressed response has no length to check and may be a decompression bomb
    headers = {**build_hf_headers(token=files.api.token), "Accept-Encoding": "identity"}
    if span is not None:
        headers["Range"] = f"bytes={span[0]}-{span[1] - 1}"
    url = address(files.api.endpoint, files.repo, files.revision, name, files.repo_type)
    with get_session().stream("GET", url, headers=headers) as response:
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        yield response


@contextmanager
def stream(files: RepoFiles, name: str, start: int, end: int, whole: bool = False) -> Iterator[Iterator[bytes]]:
    """Chunks of bytes [start, end) of a file, never more, whatever length the response announces."""
    with answer(files, name, None if whole else (start, end)) as response:
        if not whole and response.status_code != 206:
            if start:
                raise ValueError("the Hub ignored the range")
        elif not whole and not response.headers.get("content-range", "").startswith(f"bytes {start}-"):
            raise ValueError("the Hub sent another range")
        # In the size they arrive: larger chunks would lose the last bytes before a lost connection.
        yield _bounded(response.iter_bytes(), end - start)


def _bounded(chunks: Iterator[bytes], limit: int) -> Iterator[bytes]:
    left = limit
    for chunk in chunks:
        check_deadline()
        yield chunk[:left]
        left -= len(chunk)
        if left <= 0:
            return


# -- whole files


def download(files: RepoFiles, into: Path, progress: Progress | None, limit_bytes: int) -> Path:
    """Download the allowed files of a source into the new folder `into`, which is complete once it exists.

    It grows in `<into>.partial`, where files of an interrupted attempt are verified and kept. Raises Refused
    DOWNLOAD_TOO_LARGE, Transient CORRUPT_DOWNLOAD or DISK_LOW.
    """
    into.parent.mkdir(parents=True, exist_ok=True)
    partial = into.with_name(into.name + ".partial")
    with exclusive(into.with_name(f".{into.name}.lock")):
        if into.is_dir():
            return into
        partial.mkdir(exist_ok=True)
        wanted = _wanted(files, partial)
        total = sum(fact.size for fact in wanted.values())
        check_room(files, total, limit_bytes, partial, sum(path.stat().st_size for path in partial.iterdir()))
        done = 0
        for name, fact in wanted.items():
            if progress is not None:
                progress(done, total, name)
            before = done

            def advanced(count: int, name: str = name, before: int = before) -> None:
                if progress is not None:
                    progress(before + count, total, name)

            fetch_whole(files, name, fact, partial / name, advanced)
            done += fact.size
        for stray in list(partial.iterdir()):
            if stray.name not in wanted:
                stray.unlink()
        sync_folder(partial)
        partial.rename(into)
        sync_folder(into.parent)
        if progress is not None:
            progress(total, total, "")
    return into


def allowed_files(files: RepoFiles) -> dict[str, FileFact]:
    """The files at the top of the repo that `ALLOWED` names."""
    return {
        name: fact
        for name, fact in sorted(files.facts().items())
        if "/" not in name and not name.startswith(".") and any(fnmatch.fnmatchcase(name, one) for one in ALLOWED)
    }


def _wanted(files: RepoFiles, partial: Path) -> dict[str, FileFact]:
    """The allowed files; of the weights only those that belong to the checkpoint (repos may hold them twice)."""
    top = allowed_files(files)
    first = weight_file(top)
    if first == INDEX:
        if top[INDEX].size > INDEX_LIMIT_BYTES:
            raise Refused(
                "BAD_CHECKPOINT",
                f"{INDEX} of {files} has {top[INDEX].size} bytes; the limit is 8 MiB.",
                "Ask its author to save the model again.",
            )
        fetch_whole(files, INDEX, top[INDEX], partial / INDEX, lambda count: None)
        shards = _shards((partial / INDEX).read_bytes())
    elif first is not None:
        shards = {first}
    else:
        shards = {name for name in top if name.endswith(".safetensors")}
    kept = shards | {"adapter_model.safetensors"}
    return {name: fact for name, fact in top.items() if not name.endswith(".safetensors") or name in kept}


def _shards(index: bytes) -> set[str]:
    """Shard names of an index; the reader of checkpoints reports its errors."""
    try:
        return {name for name in json.loads(index)["weight_map"].values() if isinstance(name, str)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()


def check_room(files: RepoFiles, total: int, limit_bytes: int, folder: Path, already_bytes: int = 0) -> None:
    """Refuse a download over the limit. Raises Transient DISK_LOW while the disk lacks room for the missing bytes."""
    if total > limit_bytes:
        raise Refused(
            "DOWNLOAD_TOO_LARGE",
            f"{files} has a download size of {size_text(total)}; the limit is {size_text(limit_bytes)}.",
            "Choose smaller models.",
        )
    free = shutil.disk_usage(folder).free
    if total - already_bytes > free:
        raise Transient(
            "DISK_LOW",
            f"{files} needs {size_text(total)} of disk space; {size_text(free)} are free.",
            "The job waits for disk space; nothing is lost.",
            retry_after_s=300,
        )


def fetch_whole(files: RepoFiles, name: str, fact: FileFact, place: Path, advanced: Callable[[int], None]) -> None:
    """Download one file to `place` and verify it. Wrong bytes are fetched once more, then raise CORRUPT_DOWNLOAD."""
    if place.is_file() and _digest_of(place, fact) == _expected(fact):
        advanced(fact.size)
        return
    arriving = place.with_name(f".{name}.arriving")
    found = ""
    for _ in range(2):
        _receive(files, name, fact, arriving, advanced)
        found = _digest_of(arriving, fact)
        if found == _expected(fact):
            arriving.chmod(0o444)
            move_into_place(arriving, place)
            return
        arriving.unlink()
    raise Transient(
        "CORRUPT_DOWNLOAD",
        f"{name} of {files} arrived damaged twice (expected {_expected(fact)[:8]}, received {found[:8]}).",
        "It is tried again automatically.",
    )


def _receive(files: RepoFiles, name: str, fact: FileFact, arriving: Path, advanced: Callable[[int], None]) -> None:
    """Bring `arriving` to its full length; a lost connection goes on where it stopped."""
    with arriving.open("ab") as file:

        def operation() -> None:
            start = file.tell()
            if start >= fact.size:
                return
            with stream(files, name, start, fact.size) as chunks:
                for chunk in chunks:
                    file.write(chunk)
                    advanced(file.tell())
            if file.tell() != fact.size:
                raise Unavailable(f"it sent {file.tell()} of {fact.size} bytes")

        if file.tell() > fact.size:
            file.truncate(0)
        # A large file extends the deadline by a second per megabyte.
        deadline_s = files.session.deadline_s + fact.size / 1e6
        files.session.call(f"{name} of {files}", operation, deadline_s=deadline_s)


def _expected(fact: FileFact) -> str:
    return fact.sha256 or fact.blob_id


def _digest_of(path: Path, fact: FileFact) -> str:
    if fact.sha256:
        return sha256_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.sha1(b"blob %d\0" % path.stat().st_size)).hexdigest()
