"""Sources: resolves model references to headers for planning, then to local files for merging.

    opened    references -> pinned recipe, headers of every model and adapter
    fetched   plan -> a folder per source, with at least the bytes that the plan reads

Local folders stay in place. Of a Hub repo only the needed byte ranges are fetched, unless all of it is already local
or is needed for evaluation.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bot.errors import Failed, Refused, Transient
from bot.merge.checkpoints.checkpoint import TRUSTED, Checkpoint, Files, Limits, LocalFiles
from bot.merge.checkpoints.lora import Adapter, open_source
from bot.merge.execution.provenance import Known, SourceFile
from bot.merge.planning.byte_ranges import Range, needed
from bot.merge.planning.plan import Plan
from bot.merge.recipe.document import is_repo_id
from bot.merge.recipe.spec import ModelRef, Recipe
from bot.progress import Show, named
from bot.settings import Settings
from bot.storage import IN_PARTS

if TYPE_CHECKING:
    from bot.hub import Hub, PinnedRepo

Source = Checkpoint | Adapter
_BLOCK_BYTES = 4 * 2**20
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True, slots=True)
class Opened:
    """A recipe with pinned references, and the opened source of each reference; `repos` are those on the Hub."""

    recipe: Recipe
    sources: Mapping[ModelRef, Source]
    repos: Mapping[ModelRef, PinnedRepo]
    folders: Mapping[ModelRef, Path]  # of those that lie here


def opened(
    asked: Recipe,
    hub: Callable[[], Hub],
    *,
    limits: Limits = TRUSTED,
    accept: Callable[[PinnedRepo], None] = lambda repo: None,
    convert: Callable[[Path], Path] = lambda folder: folder,
) -> Opened:
    """Pin and open every reference of `asked`.

    Strict limits (an untrusted request) allow only Hub repos with files that are safe to publish. `accept` may refuse a
    repo before its files are read. `convert` may replace a local folder of pickled weights.

    Raises Refused as the Hub and the reader of checkpoints do; Transient while the Hub is unavailable.
    """
    pins: dict[ModelRef, ModelRef] = {}
    sources: dict[ModelRef, Source] = {}
    repos: dict[ModelRef, PinnedRepo] = {}
    folders: dict[ModelRef, Path] = {}
    for ref in asked.repos:
        folder = None if limits.strict else local_folder(ref)
        pins[ref] = ref
        if folder is None:
            name = (ref.path, ref.revision)
            repo = hub().resolve(*name) if limits.strict else trusted_repo(*name, hub)
            accept(repo)
            pins[ref] = replace(ref, revision=repo.revision)
            repos[pins[ref]] = repo
        pin = pins[ref]
        if pin in sources:
            continue
        files: Files
        if folder is not None:
            folders[pin] = convert(folder)
            files = LocalFiles(folders[pin])
        else:
            listed = hub().files(repos[pin].repo, repos[pin].revision)
            files = listed.harmless() if limits.strict else listed
        sources[pin] = open_source(files, limits=limits, name=str(ref))
    return Opened(asked.pinned(pins), sources, repos, folders)


def trusted_repo(path: str, revision: str | None, hub: Callable[[], Hub]) -> PinnedRepo:
    """Resolve a name as a Hub repo. The command line does not retry, so Transient becomes Failed."""
    if Path(path).is_file() or path.endswith(_WEIGHTS):
        what = "a file of weights, which mergekit-pytorch merges" if path.endswith(_WEIGHTS) else "a file"
        raise Refused(
            "SOURCE_NOT_FOUND", f"{path} is {what}.", "Name the folder of the model, which holds config.json.",
            value=path,
        )  # fmt: skip
    if not is_repo_id(path):
        raise Refused(
            "SOURCE_NOT_FOUND", f"There is no model folder {path}.",
            "Check the path, or write owner/name for a repo on the Hub.", value=path,
        )  # fmt: skip
    try:
        return hub().resolve(path, revision)
    except Transient as error:
        raise Failed(
            error.code, f"there is no folder {path} here, and the Hub cannot be asked for a repo of that name.",
            "Check the path and the folder you are in, or the connection to the Hub.", value=path,
        ) from error  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fetched:
    """Local folder of one source, and the known facts about the files that a plan reads."""

    folder: Path
    files: Mapping[str, SourceFile]


def fetched(
    made: Plan, source_of: Opened, hub: Callable[[], Hub], settings: Settings, show: Show, *,
    whole: Collection[ModelRef] = (),
) -> dict[ModelRef, Fetched]:  # fmt: skip
    """A folder for every reference of `made.recipe.repos`. Repos in `whole` are downloaded in full and checked by hash.

    Raises Refused SOURCE_CHANGED_OR_GONE, DOWNLOAD_TOO_LARGE; Transient CORRUPT_DOWNLOAD, DISK_LOW, HUB_UNAVAILABLE.
    """
    wanted = {ref: dict(ranges) for ref, ranges in needed(made).items()}
    for ref, source in source_of.sources.items():
        if isinstance(source, Adapter):  # small, and all of it takes part
            wanted[ref] = {name: ((0, source.sizes[name]),) for name in (*source.headers, "adapter_config.json")}
    out: dict[ModelRef, Fetched] = {}
    for ref, ranges in wanted.items():
        if ref not in source_of.repos:
            folder = source_of.folders.get(ref)
            if folder is None or not folder.is_dir():
                raise Failed("SOURCE_CHANGED_OR_GONE", f"{ref} is gone.", "Plan again.", value=str(ref))
            out[ref] = Fetched(folder, {})
            continue
        out[ref] = _from_hub(ref, ranges, hub(), settings, show, ref in whole)
    return out


def _from_hub(
    ref: ModelRef, ranges: Mapping[str, tuple[Range, ...]], hub: Hub, settings: Settings, show: Show, whole: bool
) -> Fetched:  # fmt: skip
    from bot.hub import how_verified

    assert ref.revision is not None
    facts = hub.tree(ref.path, ref.revision)
    told = named(show, f"Downloading {ref.path}")
    folder = settings.source_folder(ref.path, ref.revision)
    if whole:
        hub.download(ref.path, ref.revision, folder, progress=told)
    if not folder.is_dir() or not all((folder / name).is_file() for name in ranges):
        folder = settings.parts_folder(ref.path, ref.revision)
        hub.fetch(ref.path, ref.revision, folder, ranges, progress=told)
    files = {}
    for name, spans in ranges.items():
        # What this merge relies on, whatever else is here by chance: the same request gives the same provenance.
        spans = ((0, facts[name].size),) if whole else spans
        how = how_verified(facts[name], spans)
        files[name] = SourceFile(facts[name].size, facts[name].sha256, facts[name].blob_id, how)
    return Fetched(folder, files)


@contextmanager
def hashing_sources(here: Mapping[ModelRef, Fetched], made: Plan | None) -> Iterator[Callable[[], Known]]:
    """Hash the local files that `made` reads while the body runs; the yielded function waits for the hashes.

    Files of the Hub are identified by their commit. Without a plan nothing is hashed.
    """
    parts = () if made is None else made.parts
    headers = {source.model.bare: source.headers for part in parts for source in part.sources}
    local = {ref: each.folder for ref, each in here.items() if not each.files}
    with ThreadPoolExecutor(1, "hash") as pool:
        stop = threading.Event()
        hashes = {
            (ref, name): pool.submit(_sha256, folder / name, stop)
            for ref, folder in local.items()
            for name in headers.get(ref, {})
        }

        def known() -> Known:
            found: dict[ModelRef, dict[str, SourceFile]] = {ref: dict(each.files) for ref, each in here.items()}
            for (ref, name), future in hashes.items():
                found[ref][name] = SourceFile(headers[ref][name][0], future.result(), None, "sha256")
            return found

        try:
            yield known
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _sha256(file: Path, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while not stop.is_set() and (block := stream.read(_BLOCK_BYTES)):
            digest.update(block)
    return digest.hexdigest()


def local_folder(ref: ModelRef) -> Path | None:
    """Local folder of a reference; None for a Hub repo. As in mergekit, an existing folder takes precedence.

    The part after an `@` is a revision or belongs to the folder's name.
    """
    folder = Path(str(ref.bare))
    return whole_folder(folder) if folder.is_dir() else None


def whole_folder(folder: Path) -> Path:
    """`folder`, refused when it holds only the parts of files that some plan needed."""
    if (folder / IN_PARTS).exists():
        raise Refused(
            "SOURCE_NOT_FOUND", f"{folder} holds only parts of a model, those that an earlier merge needed.",
            "Name the repo itself.", value=str(folder),
        )  # fmt: skip
    return folder
