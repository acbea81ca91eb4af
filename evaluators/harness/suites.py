"""Suites: named, versioned lists of lm-eval tasks with their few-shot counts and the metric each is ranked by.

A suite's digest covers its tasks, their settings and the text of the task files that are ours, so equal digests mean
equal questions. The versions of lm-eval and of its own task files are part of each score's environment.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from evaluators.errors import EvaluationError

OWN_TASKS = Path(__file__).parents[1] / "tasks"
ANY = "any"  # in the place of a metric: the first that the task has

# A task's or group's name in a task file. Task files are YAML, but what is looked for is one plain scalar at the left
# margin: reading the 14,000 files of lm-eval 0.4.13 this way takes 0.6 s of CPU, lm-eval's own index 35 s.
_NAME = re.compile(
    rb"""^["']?(?:task|group)["']?[ \t]*:[ \t]*["']?([A-Za-z0-9][^\s"'#\[\]{}]*)["']?[ \t]*(?:\#.*)?\r?$""",
    re.MULTILINE,
)
# What a task file draws in: functions of Python files beside it, and whatever else it names, in any YAML of a list.
_FUNCTION = re.compile(rb"!function[ \t]+[\"']?([\w.]+)\.\w+")
_IMPORT = re.compile(rb"^[ \t]*(?:from[ \t]+\.?|import[ \t]+)(\w[\w.]*)", re.MULTILINE)
_WORD = re.compile(rb"[^\s\"',\[\]{}#]+")
_PART_BYTES = 1 << 20
_FOLDER = re.compile(rb"^[ \t]*(?:dataset_path|data_dir)[ \t]*:[ \t]*[\"']?(/[^\s\"'#]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class SuiteTask:
    """One lm-eval task: `few_shot` None leaves the task's own number; `metric` and `filter` are lm-eval's names.

    `ANY` in the place of a metric takes the first the task has. `acc_norm` is accuracy with the log-likelihoods divided
    by the answers' length in characters. `chance` is what guessing scores; a suite that names it counts its average
    from there. `file` is a task file of the operator's, for a task that is neither ours nor lm-eval's. Task files can
    import code: never one of a stranger's.
    """

    name: str
    metric: str = "acc"
    few_shot: int | None = None
    filter: str = "none"
    file: Path | None = None
    chance: float | None = None


@dataclass(frozen=True, slots=True)
class Suite:
    """A named list of tasks. `about` is a sentence for people."""

    name: str
    version: int
    tasks: tuple[SuiteTask, ...]
    about: str = ""

    @property
    def digest(self) -> str:
        """64 hex; equal for equal questions asked in an equal way."""
        tasks = [[t.name, t.metric, t.few_shot, t.filter, t.chance, _own_text(t)] for t in self.tasks]
        text = json.dumps([self.name, self.version, tasks], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def own_suite(names: Sequence[str]) -> Suite:
    """A suite of tasks named one by one: each ranked as a known suite ranks it, else by the first metric it has."""
    known = {task.name: task for suite in SUITES.values() for task in suite.tasks}
    tasks = tuple(replace(known.get(name, SuiteTask(name, ANY)), few_shot=None, chance=None) for name in names)
    return Suite("+".join(names), 1, tasks)


def of_file(file: Path) -> Suite:
    """A suite of the one task that a task file of the operator's defines. Raises EvaluationError UNKNOWN_TASK."""
    names = _NAME.findall(file.read_bytes()) if file.is_file() else []
    if not names:
        raise EvaluationError(
            "UNKNOWN_TASK", f"{file} defines no task.", "Name an lm-eval task file, with a line `task: its_name`."
        )
    name = names[0].decode()
    return Suite(name, 1, (SuiteTask(name, ANY, file=file.resolve()),))


def find(tasks: Sequence[SuiteTask]) -> dict[str, Path]:
    """The file that defines each task or group; ours come before lm-eval's. Raises EvaluationError UNKNOWN_TASK."""
    found = {}
    for task in tasks:
        path = task.file or _names(OWN_TASKS).get(task.name) or official().get(task.name)
        if path is None or task.name not in _names(path.parent):
            near = get_close_matches(task.name, [*_names(OWN_TASKS), *official()], 1)
            hint = f"Did you mean `{near[0]}`?" if near else "`lm-eval ls tasks` lists the names."
            raise EvaluationError("UNKNOWN_TASK", f"There is no task `{task.name}`.", hint)
        found[task.name] = path
    return found


def official() -> dict[str, Path]:
    """lm-eval's own tasks and groups and the files that define them, found without importing lm-eval."""
    spec = find_spec("lm_eval")
    return {} if spec is None or spec.origin is None else _names(Path(spec.origin).parent / "tasks")


@cache
def _names(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.yaml")):
        for name in _NAME.findall(path.read_bytes()):
            found.setdefault(name.decode(), path)
    return found


def _own_text(task: SuiteTask) -> str | None:
    """Digest of a task file that is not part of lm-eval, whose version says what its files hold; with the files that
    it draws in: others of its kind, the tasks of a group, Python code, and data that lie on this disk."""
    path = task.file or _names(OWN_TASKS).get(task.name)
    if path is None:
        return None
    content, waiting = hashlib.sha256(), [path.resolve()]
    for file in waiting:
        with file.open("rb") as stream:
            for part in iter(lambda stream=stream: stream.read(_PART_BYTES), b""):  # type: ignore[misc]
                content.update(part)
        waiting += [found for found in _drawn_in(file) if found not in waiting]
    return content.hexdigest()


def _drawn_in(file: Path) -> list[Path]:
    """The files that a task file, or a Python file beside one, names, each once."""
    text = file.read_bytes() if file.suffix in (".py", ".yaml", ".yml") else b""
    if file.suffix == ".py":
        named = [file.parent / f"{_text(name).replace('.', '/')}.py" for name in _IMPORT.findall(text)]
    else:
        words = [_text(word) for word in _WORD.findall(text)]
        named = [file.parent / word for word in words]
        named += [_names(file.parent)[word] for word in words if word in _names(file.parent)]
        named += [
            file.parent / f"{name.replace('.', '/')}.py" for name in sorted({*map(_text, _FUNCTION.findall(text))})
        ]
        named += [each for folder in _FOLDER.findall(text) for each in sorted(Path(_text(folder)).rglob("*"))]
    return list(dict.fromkeys(each.resolve() for each in named if _is_file(each)))


def _text(name: bytes) -> str:
    return name.decode(errors="replace")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a word that is no name of a file at all
        return False


def _suite(name: str, version: int, about: str, *tasks: SuiteTask) -> Suite:
    return Suite(name, version, tasks, about)


SUITES = {
    suite.name: suite
    for suite in (
        _suite(
            "demo-skills",
            1,
            "The two invented skills of the demo: chance is one in eight.",
            SuiteTask("invented_crests"),
            SuiteTask("invented_smiths"),
        ),
        _suite(
            "offline",
            1,
            "Capitals, sums and repeated words: seconds on a small model, and nothing is downloaded.",
            SuiteTask("offline_capitals", "acc", 0),
            SuiteTask("offline_sums", "acc", 4),
            SuiteTask("offline_echo", "exact_match", 2),
        ),
        _suite(
            "quick",
            1,
            "Three short multiple-choice tasks, without examples in the prompt.",
            SuiteTask("arc_easy", "acc_norm", 0),
            SuiteTask("piqa", "acc_norm", 0),
            SuiteTask("openbookqa", "acc_norm", 0),
        ),
        _suite(
            "generative",
            1,
            "What a model writes: grade-school mathematics, worked out in words, with five examples.",
            SuiteTask("gsm8k", "exact_match", 5, "strict-match"),
        ),
        _suite(
            "leaderboard-v1",
            1,
            "The six tasks of the first Open LLM Leaderboard, with its numbers of examples.",
            SuiteTask("arc_challenge", "acc_norm", 25),
            SuiteTask("hellaswag", "acc_norm", 10),
            SuiteTask("mmlu", "acc", 5),
            SuiteTask("truthfulqa_mc2", "acc", 0),
            SuiteTask("winogrande", "acc", 5),
            SuiteTask("gsm8k", "exact_match", 5, "strict-match"),
        ),
        _suite(
            "leaderboard-v2",
            1,
            "lm-eval's `leaderboard` group, the second Open LLM Leaderboard; its average counts from chance. Its data "
            "are partly gated (GPQA), and IFEval is ranked by prompts followed strictly.",
            SuiteTask("leaderboard_ifeval", "prompt_level_strict_acc", chance=0.0),
            SuiteTask("leaderboard_bbh", "acc_norm", chance=0.2885),  # mean of its 24 tasks, by size
            SuiteTask("leaderboard_math_hard", "exact_match", chance=0.0),
            SuiteTask("leaderboard_gpqa", "acc_norm", chance=0.25),
            SuiteTask("leaderboard_musr", "acc_norm", chance=0.3433),  # two, five and three choices, by size
            SuiteTask("leaderboard_mmlu_pro", "acc", chance=0.1),
        ),
    )
}
