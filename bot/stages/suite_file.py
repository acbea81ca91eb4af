"""What the operator asks to be measured: a suite by name, a file that describes one, or lm-eval's tasks by name.

    name: mine                    # stands in every score; letters, digits, `-`, `_`, `.`
    version: 2                    # raise it when the questions change
    about: What it is good for.
    tasks:
      - arc_easy                  # ranked as a known suite ranks it, else by the first metric it has
      - glue                      # a tag or a pattern (mmlu_*) stands for its tasks
      - task: arc_challenge
        few_shot: 25
        metric: acc_norm
        filter: none
        chance: 0.25              # given for all tasks or for none: the average then counts from chance
      - task: our_own
        file: our_own.yaml        # an lm-eval task file beside this one; it may run code, so only the operator's own

Only the command line comes here: a request can name nothing but the suites and tasks on the bot's list.
"""

from __future__ import annotations

import re
from collections.abc import Sequence as Listed
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from bot.errors import Failed, Refused, Where
from bot.merge.recipe.document import Node, Reader, Text
from bot.merge.recipe.reading import read_yaml
from bot.stages.error_subjects import translated
from bot.stages.evaluation import suite_named
from evaluators.harness import suites
from evaluators.harness.suites import Suite, SuiteTask

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}")
_KEYS = ("name", "version", "about", "tasks")
T = TypeVar("T", int, float)
_TASK_KEYS = ("task", "few_shot", "metric", "filter", "chance", "file")


def chosen(suite: str, tasks: Listed[str] = ()) -> Suite:
    """Suite of a command: `tasks` take precedence over `suite`, a name or a file.

    `tasks` are as in lm-eval's `--tasks`: names, tags, patterns, task files and folders, separated by commas or
    repeated. Raises Refused UNKNOWN_TASK, SUITE_INVALID, DATASET_UNAVAILABLE and those of the YAML guard; Failed
    FILE_NOT_FOUND.
    """
    if not tasks:
        return read(Path(suite)) if suite.endswith((".yml", ".yaml")) else suite_named(suite)
    texts = [text for each in tasks for text in ([each] if Path(each).exists() else each.split(","))]
    with translated(Refused):
        parts = {text: suites.named(text) for text in texts}
        names = [found[0].name if len(found) == 1 else Path(text).name for text, found in parts.items()]
        made = Suite("+".join(names), 1, tuple(dict.fromkeys(task for part in parts.values() for task in part)))
        suites.require_distinct(made.tasks)
    return made


def read(file: Path) -> Suite:
    """The suite in `file`, with every task resolved."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise Failed("FILE_NOT_FOUND", f"{file} cannot be read: {why}.", "Name a suite file.") from None
    try:
        with translated(Refused, where=Where(str(file))):
            made = _suite(text, file)
            suites.require_distinct(made.tasks)
    except Refused as error:
        if not error.code.startswith("RECIPE_"):
            raise
        # The guard that reads it is the recipes' own, and its words are of recipes.
        said = error.message.replace("recipe", "suite")
        raise Refused("SUITE_INVALID", said, error.next_step.replace("recipe", "suite"), where=error.where) from None
    return made


def _suite(text: str, file: Path) -> Suite:
    reader = Reader(str(file), "operator", "refuse")
    root = reader.mapping(read_yaml(text, trust="operator", file=str(file)), "the suite")
    reader.unknown(root, "", _KEYS)
    for key in ("name", "tasks"):
        if root.given(key) is None:
            reader.refuse("SUITE_INVALID", root, key, f"The suite has no `{key}`.", f"Write `{key}:`.")
    name, version = reader.text(root.items["name"], "name"), root.given("version")
    if not _NAME.fullmatch(name) or name in suites.SUITES:
        taken = "taken by a suite of the bot's own" if name in suites.SUITES else "not possible"
        reader.refuse("SUITE_INVALID", root.items["name"], "name", f"The name is {taken}.", "Choose another one.")
    nodes = reader.sequence(root.items["tasks"], "tasks").items
    tasks = tuple(
        task for place, node in enumerate(nodes) for task in _tasks(reader, node, f"tasks[{place}]", file.parent)
    )
    names = [task.name for task in tasks]
    if not names or len(set(names)) < len(names):
        found = "no task" if not names else f"`{next(each for each in names if names.count(each) > 1)}` twice"
        reader.refuse(
            "SUITE_INVALID", root.items["tasks"], "tasks", f"The suite names {found}.", "Name each task once."
        )
    if len({task.chance is None for task in tasks}) > 1:
        reader.refuse(
            "SUITE_INVALID", root.items["tasks"], "tasks", "Some tasks name their chance and some do not.",
            "Give `chance` for all of them, or for none.",
        )  # fmt: skip
    about = root.given("about")
    return Suite(
        name,
        1 if version is None else reader.integer(version, "version"),
        tasks,
        "" if about is None else reader.text(about, "about"),
    )


def _tasks(reader: Reader, node: Node, path: str, folder: Path) -> list[SuiteTask]:
    """The tasks of one entry; a tag or a pattern expands to several."""
    if isinstance(node, Text):
        return list(suites.named_in_lm_eval(reader.text(node, path)))
    table = reader.mapping(node, path)
    reader.unknown(table, path, _TASK_KEYS)
    if "task" not in table.items:
        reader.refuse("SUITE_INVALID", table, f"{path}.task", f"`{path}` names no task.", "Write `task: its_name`.")
    name, changed = reader.text(table.items["task"], f"{path}.task"), dict[str, Any]()
    for key in ("metric", "filter"):
        if (given := table.given(key)) is not None:
            changed[key] = reader.text(given, f"{path}.{key}")
    if (given := table.given("few_shot")) is not None:
        where = f"{path}.few_shot"
        changed["few_shot"] = _within(reader, given, where, reader.integer(given, where), 0, 1000)
    if (given := table.given("chance")) is not None:
        where = f"{path}.chance"
        changed["chance"] = _within(reader, given, where, reader.number(given, where), 0, 0.99)
    if (given := table.given("file")) is None:
        return [replace(task, **changed) for task in suites.named_in_lm_eval(name)]
    file = (folder / reader.text(given, f"{path}.file")).resolve()
    if not file.is_file():
        reader.refuse("SUITE_INVALID", given, f"{path}.file", "There is no such task file.", "Name one beside it.")
    return [replace(task, file=file, **changed) for task in suites.own_suite([name]).tasks]


def _within(reader: Reader, node: Node, path: str, value: T, least: float, most: float) -> T:
    if not least <= value <= most:
        reader.refuse(
            "VALUE_OUT_OF_RANGE", node, path, f"`{path}` is {value}.", f"Write a number from {least} to {most}."
        )
    return value
