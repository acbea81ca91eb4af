"""Stored evaluations as the harness leaves them, from lists of values: for what reads them and judges."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluators.harness.scores import Cut, Environment, ModelEvaluation, Score

ENVIRONMENT = Environment("cpu", "float32", "16", False, 0, "0.4.13", "5.23.0", "2.13.0")
CHOICES = 4


def evaluation(
    cache: Path,
    key: str,
    tasks: Mapping[str, Sequence[float]],
    *,
    wrong_choice: int = 1,
    metric: str = "acc",
    higher_is_better: bool = True,
    order: Sequence[int] | None = None,
    environment: Environment = ENVIRONMENT,
    task_seconds: Sequence[float] = (),
    prompts: Mapping[str, str] | None = None,
    cut: Sequence[Cut] = (),
) -> ModelEvaluation:
    """A model whose value on question i of each task is given; a right answer is choice 0, a wrong one `wrong_choice`.

    `order` is the order in which the questions were asked; `prompts` has the beginning of a task's prompts.
    """
    folder = cache / "results" / key / "samples"
    folder.mkdir(parents=True)
    scores = []
    for task, values in tasks.items():
        asked = range(len(values)) if order is None else order
        begins = (prompts or {}).get(task, "")
        lines = [json.dumps(_sample(task, at, values[at], metric, wrong_choice, begins)) + "\n" for at in asked]
        (folder / f"{task}.jsonl").write_text("".join(lines))
        mean = sum(values) / len(values)
        stderr = (sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1) / len(values)) ** 0.5
        scores.append(Score(task, metric, mean, stderr, len(values), 0, higher_is_better, "1.0"))
    return ModelEvaluation(
        "animals", "d" * 64, tuple(scores), environment, 1.0, key=key, task_seconds=tuple(task_seconds), cut=tuple(cut)
    )


def _sample(task: str, at: int, value: float, metric: str, wrong_choice: int, begins: str) -> dict[str, object]:
    best = 0 if value == 1 else wrong_choice
    return {
        "doc_id": at,
        "doc_hash": hashlib.sha256(f"{task} {at}".encode()).hexdigest(),
        "prompt_hash": hashlib.sha256(f"{begins} {task} {at}".encode()).hexdigest(),
        "target": 0,
        "arguments": [[f"question {at}", f" choice {choice}"] for choice in range(CHOICES)],
        "filtered_resps": [[-1.0 - (choice != best), False] for choice in range(CHOICES)],
        "filter": "none",
        metric: value,
    }
