"""lm-eval's task files: the names, tags and groups they define, and the files that each task needs.

This module does not import lm-eval. Its own index of 14,000 files takes 13 s; reading only the keys at the left margin
takes 1 s and finds the same names, files and tags (tests/evaluators/test_task_files.py).
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from bot.errors import EvaluationError

OWN_TASKS = Path(__file__).parents[1] / "tasks"
SUFFIXES = (".yaml", ".yml")

# A key at the left margin, with its value and the items of a list below it.
_KEY = re.compile(
    rb"^[\"']?(task|group|tag|include|class)[\"']?[ \t]*:[ \t]*([^\n]*(?:\n[ \t]*-[ \t][^\n]*)*)", re.MULTILINE
)
_ITEM = re.compile(
    rb"""(?:^|\n[ \t]*-[ \t]+|[\[,][ \t]*)(?!\[)["']?([^\s"'#\[\]{},][^\n"'#\[\],{}]*?)["']?[ \t\r]*(?=[\],#\n]|$)"""
)
_IMPORT = re.compile(rb"^[ \t]*(?:from[ \t]+\.?|import[ \t]+)(\w[\w.]*)", re.MULTILINE)
_SKIPPED = frozenset({"__pycache__", ".ipynb_checkpoints"})  # as lm-eval does
_READ_BYTES = 1 << 20
# Loaders of `datasets` whose data files are named by path; with any other `dataset_path` they lie inside a repo.
_BUILDERS = frozenset(
    {"json", "csv", "parquet", "arrow", "text", "xml", "pandas", "webdataset", "imagefolder", "audiofolder"}
)
_CLOSE = 0.8  # similarity (difflib) from which a name is suggested


@dataclass(frozen=True, slots=True)
class Index:
    """The tasks and groups that task files define, each with its file; which of them are groups; the tasks of a tag."""

    files: Mapping[str, Path]
    groups: frozenset[str]
    tags: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Located:
    """Files of a task or group.

    `files` holds its own first, then those of a group's members, by name; `tags` the tags that a group names. `data`
    are the local data files; `folder` is the base of their relative paths, None if no such path is used.
    """

    files: Mapping[str, Path]
    tags: Mapping[str, tuple[str, ...]]
    data: tuple[Path, ...] = ()
    folder: Path | None = None


class _Function(str):
    """The value of `!function module.name`."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML loader for task files that does not run the functions they name."""


_Loader.add_constructor("!function", lambda loader, node: _Function(loader.construct_scalar(node)))


# -- names ------------------------------------------------------------------------------------------------------------


@cache
def own() -> Index:
    """Tasks that ship with this package; they take precedence over lm-eval's."""
    return _index(OWN_TASKS)


@cache
def official() -> Index:
    """lm-eval's own tasks, groups and tags."""
    return _index(_official_folder())


@cache
def _official_folder() -> Path:
    spec = find_spec("lm_eval")
    return Path(spec.origin).parent / "tasks" if spec and spec.origin else OWN_TASKS


def matches(pattern: str) -> list[str]:
    """Tasks and groups that lm-eval's `--tasks` finds for a name, a tag or a pattern with wildcards, sorted.

    Tasks within a matching group are left out of a pattern's matches.
    """
    if pattern in own().files:
        return [pattern]
    tags = official().tags
    names = fnmatch.filter({*own().files, *official().files, *tags}, pattern)
    found = {task for name in names for task in tags.get(name, (name,))}
    return sorted(found if len(names) == 1 else found - members(found))


def members(names: Iterable[str]) -> set[str]:
    """The tasks and groups within those of lm-eval's groups that are among `names`."""
    groups = official().groups.intersection(names)
    return {member for group in groups for member in located(group).files if member != group}


def unknown(name: str) -> EvaluationError:
    """Error for an unknown name, with a suggestion if a known name differs by a typing error."""
    near = get_close_matches(name, {*own().files, *official().files, *official().tags}, 1, _CLOSE)
    hint = f"Did you mean `{near[0]}`?" if near else "`lm-eval ls tasks` lists the names."
    return EvaluationError("UNKNOWN_TASK", f"There is no task `{name}`.", hint)


def _index(folder: Path) -> Index:
    """Index of a folder as lm-eval's: the first file that defines a name counts, and includes are followed."""
    known: dict[Path, dict[str, list[str]]] = {}
    files: dict[str, Path] = {}
    groups: set[str] = set()
    tags: dict[str, set[str]] = {}
    for path in sorted(in_folder(folder, "**/"), key=Path.as_posix):
        keys = _keys(path, known)
        kind = "group" if "group" in keys and "class" not in keys else "task"
        for name in keys.get(kind, ())[:1]:
            if name in files:
                continue
            files[name] = path
            if kind == "group":
                groups.add(name)
            for tag in keys.get("tag", ()) if kind == "task" else ():
                tags.setdefault(tag, set()).add(name)
    return Index(files, frozenset(groups), {tag: tuple(sorted(names)) for tag, names in tags.items()})


def expanded(path: Path) -> list[Path]:
    """The file at `path`, or those that its wildcards match."""
    if path.is_file():
        return [path]
    matched = glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
    return sorted(file for file in map(Path, matched) if file.is_file())


def in_folder(folder: Path, below: str = "") -> list[Path]:
    """The YAML files in `folder`; `below` "**/" adds those of the folders in it."""
    found = (path for path in folder.glob(f"{below}*.y*ml") if path.suffix in SUFFIXES)
    return [path for path in found if not _SKIPPED.intersection(path.parts)]


def _keys(path: Path, known: dict[Path, dict[str, list[str]]]) -> dict[str, list[str]]:
    """Keys in the margin of a task file and of its includes; `known` caches them by file."""
    if path not in known:
        known[path] = {}  # for a file that includes itself
        keys = {
            key.decode(): [item.decode(errors="replace") for item in _ITEM.findall(value)]
            for key, value in _KEY.findall(path.read_bytes())
        }
        for name in keys.pop("include", ()):
            included = Path(os.path.normpath(path.parent / name))
            if included in known or included.is_file():
                known[path] |= _keys(included, known)
        known[path] |= keys
    return known[path]


# -- one task ---------------------------------------------------------------------------------------------------------


def defined_in(file: Path) -> str | None:
    """Name of the task or group in a task file; None for a file that is only included.

    Raises EvaluationError UNKNOWN_TASK if it is not a task file.
    """
    config = _read(file)
    name = config.get("group") if _is_group(config) else config.get("task")
    return name if isinstance(name, str) else None


def located(name: str, file: Path | None = None) -> Located:
    """Files of a task or group; `file` defines it if it is neither ours nor lm-eval's.

    Raises EvaluationError UNKNOWN_TASK, DATASET_UNAVAILABLE.
    """
    path = file or own().files.get(name) or official().files.get(name)
    if path is None or (file and defined_in(file) != name):
        raise unknown(name)
    files, tags = {name: path}, dict[str, tuple[str, ...]]()
    waiting = _members(_read(path)) if file or name in official().groups else []
    indexes = [*([_index(path.parent)] if file and waiting else []), own(), official()] if waiting else []
    for member in waiting:
        index = next((index for index in indexes if member in index.files or member in index.tags), None)
        if index is None or member in files or member in tags:
            continue  # what no file defines, the group's own file does
        if member in index.files:
            files[member] = index.files[member]
            waiting += _members(_read(files[member])) if member in index.groups else []
        else:
            tags[member] = index.tags[member]
            waiting += index.tags[member]
    data, folder = _local_data(name, _not_official(files.values())) if file else ((), None)
    return Located(files, tags, data, folder)


def content(name: str, file: Path | None = None) -> str | None:
    """Digest (64 hex) of the files of a task outside of lm-eval, whose own files are covered by its version.

    It covers the task files, their includes, the members of a group, Python code and local data.
    """
    path = file or own().files.get(name)
    if path is None:
        return None
    place = located(name, path)
    digest, seen = hashlib.sha256(), set[Path]()
    for first in (path, *_not_official(place.files.values()), *place.data):
        waiting = [first.resolve()]
        for found in waiting:
            if found in seen:
                continue
            seen.add(found)
            with found.open("rb") as stream:
                for part in iter(lambda stream=stream: stream.read(_READ_BYTES), b""):  # type: ignore[misc]
                    digest.update(part)
            waiting += _named_in(found)
    return digest.hexdigest()


def _local_data(name: str, files: Sequence[Path]) -> tuple[tuple[Path, ...], Path | None]:
    """Local data of a trusted task, and the base of their relative paths: the working folder, as for lm-eval's command
    line, else that of a task file. Raises DATASET_UNAVAILABLE."""
    asked = [each for file in files for each in _data_paths(_read(file))]
    relative = [path for path, _ in asked if not Path(path).is_absolute()]
    folders = (Path.cwd(), *(file.parent.resolve() for file in files))
    folder = next((each for each in folders if any(_on_disk(each, path) for path in relative)), None)
    data: list[Path] = []
    for path, required in asked:
        found = _on_disk(folder or folders[0], path)
        if required and not found:
            raise EvaluationError(
                "DATASET_UNAVAILABLE",
                f"The data file {path} of task `{name}` does not exist.",
                "Correct the path. A relative path starts in the working folder or in the folder of the task file.",
            )
        data += found
    return tuple(data), folder


def _data_paths(config: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Data paths of a task or of the tasks in a group's file, each with whether it must be a local path and not a
    dataset repo."""
    members = config.get("task")
    for member in members if isinstance(members, list) else ():
        if isinstance(member, dict):
            yield from _data_paths(member)
    source, options = config.get("dataset_path"), config.get("dataset_kwargs")
    options = options if isinstance(options, dict) else {}
    if not isinstance(source, str):
        return
    if source not in _BUILDERS:
        yield source, source.startswith(("/", "./", "../"))
        return
    for path in _strings(options.get("data_dir") or options.get("data_files")):
        if "://" not in path:
            yield path, True


def _on_disk(folder: Path, path: str) -> list[Path]:
    """Files for the path of a file, of a folder or with wildcards."""
    start = folder / Path(path).expanduser()
    return sorted(file for file in start.rglob("*") if file.is_file()) if start.is_dir() else expanded(start)


def _named_in(file: Path) -> list[Path]:
    """Files that a task file, or a Python file beside one, names, each once."""
    if file.suffix == ".py":
        modules = [name.decode(errors="replace") for name in _IMPORT.findall(file.read_bytes())]
        named = []
    elif file.suffix in SUFFIXES:
        try:
            values = list(_strings(_parsed(file)))
        except EvaluationError:
            return []  # data, and not a task file
        modules = sorted({value.rpartition(".")[0] for value in values if isinstance(value, _Function)})
        named = [file.parent / value for value in values]
    else:
        return []
    named += [file.parent / f"{module.replace('.', '/')}.py" for module in modules]
    return list(dict.fromkeys(each.resolve() for each in named if _is_file(each)))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a text that is no name of a file at all
        return False


def _not_official(files: Iterable[Path]) -> list[Path]:
    return [file for file in files if not file.is_relative_to(_official_folder())]


def _is_group(config: Mapping[str, Any]) -> bool:
    return "group" in config and "class" not in config


def _members(config: Mapping[str, Any]) -> list[str]:
    """The names of tasks, groups and tags that a group lists, groups within it included."""
    found: list[str] = []
    listed = config.get("task") if _is_group(config) else None
    for item in listed if isinstance(listed, list) else ():
        if isinstance(item, dict):
            found += [*_members(item), *(value for key in ("group", "task") for value in _strings(item.get(key)))]
        else:
            found += _strings(item)
    return found


def _strings(value: Any) -> Iterator[str]:
    """All strings within a YAML value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def _read(file: Path, above: Sequence[Path] = ()) -> dict[str, Any]:
    """Keys of a task file and its includes. Raises EvaluationError UNKNOWN_TASK."""
    config = _parsed(file)
    includes = config.pop("include", ())
    found: dict[str, Any] = {}
    for name in includes if isinstance(includes, list) else _strings(includes):
        if (included := file.parent / str(name)) in (*above, file):
            raise _not_a_task_file(file, "it includes itself")
        found |= _read(included, (*above, file))
    return found | config


def _parsed(file: Path) -> dict[str, Any]:
    try:
        config = yaml.load(file.read_bytes(), Loader=_Loader)
    except OSError as error:
        raise _not_a_task_file(file, error.strerror or "it cannot be read") from error
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" up to line {mark.line + 1}"
        raise _not_a_task_file(file, f"{str(error).splitlines()[0]}{where}") from error
    if not isinstance(config, dict):
        raise _not_a_task_file(file, "it is not a mapping of keys to values")
    return config


def _not_a_task_file(file: Path, why: str) -> EvaluationError:
    return EvaluationError(
        "UNKNOWN_TASK", f"{file} is not a task file: {why}.", "Name an lm-eval task file, with a line `task: its_name`."
    )
