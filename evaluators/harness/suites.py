"""Suites: named, versioned lists of lm-eval tasks with their few-shot counts and ranking metrics.

A suite's digest covers its tasks, their settings and the text of our own task files, so equal digests mean equal
questions. The versions of lm-eval and of its task files are part of each score's environment.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bot.errors import EvaluationError
from evaluators.harness import task_files
from evaluators.harness.task_files import Located

ANY = "any"  # in place of a metric: the first that the task has


@dataclass(frozen=True, slots=True)
class SuiteTask:
    """One lm-eval task: `few_shot` None keeps the task's own number; `metric` and `filter` are lm-eval's names.

    The metric `ANY` stands for the first that the task has. `acc_norm` is accuracy with the log-likelihoods divided by
    the answers' length in characters. `chance` is the score of guessing; a suite with it counts its average from there.
    `file` is a trusted task file outside of ours and lm-eval's: task files can import code.
    """

    name: str
    metric: str = "acc"
    few_shot: int | None = None
    filter: str = "none"
    file: Path | None = None
    chance: float | None = None

    @property
    def digest(self) -> str:
        """64 hex; equal if lm-eval receives the same request, whatever the suite and its ranking metric."""
        return _digest([self.name, self.few_shot, task_files.content(self.name, self.file)])


@dataclass(frozen=True, slots=True)
class Suite:
    """A named list of tasks. `about` is a sentence for people."""

    name: str
    version: int
    tasks: tuple[SuiteTask, ...]
    about: str = ""

    @property
    def digest(self) -> str:
        """64 hex; equal for equal questions under equal settings."""
        tasks = [
            [t.name, t.metric, t.few_shot, t.filter, t.chance, task_files.content(t.name, t.file)] for t in self.tasks
        ]
        return _digest([self.name, self.version, tasks])


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, separators=(",", ":")).encode()).hexdigest()


def own_suite(names: Sequence[str]) -> Suite:
    """Suite of tasks named one by one: each ranked as in a known suite, else by the first metric it has."""
    return Suite("+".join(names), 1, tuple(map(_ranked, names)))


def _ranked(name: str) -> SuiteTask:
    known = {task.name: task for suite in SUITES.values() for task in suite.tasks}
    return replace(known.get(name, SuiteTask(name, ANY)), few_shot=None, chance=None)


def named(text: str) -> tuple[SuiteTask, ...]:
    """Tasks that lm-eval's `--tasks` finds for `text`.

    That is the name of a task, group or tag, a pattern with wildcards, a task file (files, with wildcards), or a folder
    of task files. Raises EvaluationError UNKNOWN_TASK, SUITE_INVALID.
    """
    if text.endswith(task_files.SUFFIXES):
        files = task_files.expanded(Path(text)) or [Path(text)]
    elif Path(text).is_dir() and not task_files.matches(text):
        files = sorted(task_files.in_folder(Path(text)))
    else:
        return named_in_lm_eval(text)
    found = [(name, file) for file in files if (name := task_files.defined_in(file))]
    if not found:
        raise EvaluationError(
            "UNKNOWN_TASK", f"{text} defines no task.", "Name an lm-eval task file, with a line `task: its_name`."
        )
    tasks = [SuiteTask(name, ANY, file=file.resolve()) for name, file in found]
    if len(tasks) == 1:
        return tuple(tasks)
    members = {name for task in tasks for name in task_files.located(task.name, task.file).files if name != task.name}
    return tuple(task for task in tasks if task.name not in members)


def named_in_lm_eval(pattern: str) -> tuple[SuiteTask, ...]:
    """The tasks and groups of a name, a tag or a pattern. Raises EvaluationError UNKNOWN_TASK."""
    names = task_files.matches(pattern)
    if not names:
        raise task_files.unknown(pattern)
    return tuple(map(_ranked, names))


def require_distinct(tasks: Sequence[SuiteTask]) -> None:
    """Refuse a task that occurs twice, by name or within a group. Raises EvaluationError SUITE_INVALID."""
    seen: set[str] = set()
    for task in tasks:
        files = task_files.located(task.name, task.file).files
        if twice := seen.intersection(files):
            raise EvaluationError(
                "SUITE_INVALID",
                f"The task `{min(twice)}` is named twice, or by itself and as part of a group.",
                "Name each task once.",
            )
        seen.update(files)


def find(tasks: Sequence[SuiteTask]) -> dict[str, Located]:
    """The files of each task or group. Raises EvaluationError UNKNOWN_TASK, DATASET_UNAVAILABLE."""
    return {task.name: task_files.located(task.name, task.file) for task in tasks}


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
