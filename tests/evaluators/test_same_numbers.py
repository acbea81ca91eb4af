"""The figures of official tasks are those of lm-eval's own command line: its task files, unmodified, with data in the
layout of the Hub's originals, through the real datasets client on both sides."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bot.localhub import seed
from evaluators import harness
from evaluators.harness.scores import ModelEvaluation, TaskData
from evaluators.harness.suites import Suite, SuiteTask
from tests.evaluators import tiny_harness
from tests.localhub.server import RunningHub, running_hub

LIMIT = 5
SUITE = Suite(
    "official",
    1,
    (
        SuiteTask("arc_easy", "acc_norm", 2),
        SuiteTask("lambada_openai", "acc", 2),
        SuiteTask("gsm8k", "exact_match", 2, "strict-match"),
    ),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("same")


@pytest.fixture(scope="module")
def model(place: Path) -> Path:
    return tiny_harness.model(place / "models" / "tiny", positions=2048)


@pytest.fixture(scope="module")
def hub(shared: Path, place: Path) -> Iterator[RunningHub]:
    content = place / "content" / "datasets"
    for repo in ("allenai/ai2_arc", "EleutherAI/lambada_openai", "openai/gsm8k"):
        (content / repo).parent.mkdir(parents=True, exist_ok=True)
        (content / repo).symlink_to(shared / "hub_seed" / "datasets" / repo)
    seed(place / "hub", place / "content")
    with running_hub(place / "hub") as running:
        yield running


@pytest.fixture(scope="module")
def ours(hub: RunningHub, model: Path, place: Path) -> ModelEvaluation:
    return tiny_harness.evaluate(
        model,
        SUITE,
        cache=place / "cache",
        scratch=place / "scratch",
        timeout_s=240,
        limit=LIMIT,
        batch_size="1",
        endpoint=hub.url,
        environment={"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def theirs(hub: RunningHub, model: Path, place: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    return their_run(hub, model, place, "theirs", SUITE, LIMIT)


def their_run(
    hub: RunningHub, model: Path, place: Path, out: str, suite: Suite, limit: int, *options: str
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """What `lm-eval run` writes: results, and samples by task."""
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "1"]
    command += ["--model_args", f"pretrained={model},dtype=float32", "--num_fewshot", "2", "--limit", str(limit)]
    command += ["--tasks", ",".join(task.name for task in suite.tasks)]
    command += ["--log_samples", "--output_path", str(place / out), *options]
    done = subprocess.run(command, env=hub.env(place / "home"), cwd=place, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (place / out).rglob("results_*.json")
    samples = {
        task.name: [
            json.loads(line)
            for path in (place / out).rglob(f"samples_{task.name}_*.jsonl")
            for line in path.read_text().splitlines()
        ]
        for task in suite.tasks
    }
    return json.loads(results.read_text()), samples


@pytest.mark.slow
def test_every_figure_of_three_official_tasks_is_lm_evals_own(
    ours: ModelEvaluation, theirs: tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]
) -> None:
    results = theirs[0]["results"]
    compared = 0
    for score in (*ours.scores, *ours.others):
        found = results[score.task]
        assert score.value == found[f"{score.metric},{score.filter}"]
        if score.metric != "perplexity":  # its standard error is drawn, theirs a hundred times as often
            assert score.stderr == found[f"{score.metric}_stderr,{score.filter}"]
        assert (score.samples, score.few_shot) == (LIMIT, theirs[0]["n-shot"][score.task])
        assert score.task_version == str(theirs[0]["versions"][score.task])
        compared += 1
    assert compared == sum(
        "," in label and "_stderr" not in label for task in SUITE.tasks for label in results[task.name]
    )


@pytest.mark.slow
def test_every_prompt_and_every_answer_is_lm_evals_own(
    ours: ModelEvaluation, theirs: tuple[dict[str, Any], dict[str, list[dict[str, Any]]]], place: Path
) -> None:
    for task in SUITE.tasks:
        require_equal_samples(harness.folder_of(ours, place / "cache"), task.name, theirs[1][task.name])


@pytest.mark.slow
def test_with_a_chat_template_every_prompt_and_answer_is_lm_evals_own(hub: RunningHub, place: Path) -> None:
    template = "{% for message in messages %}which {{ message.role }} {{ message.content }} answer {% endfor %}"
    model = tiny_harness.model(place / "models" / "chat", positions=2048, chat_template=template)
    suite = Suite("chat", 1, (SuiteTask("arc_easy", "acc_norm", 2),))
    ours = tiny_harness.evaluate(
        model,
        suite,
        cache=place / "chat-cache",
        scratch=place / "chat-scratch",
        timeout_s=240,
        limit=2,
        batch_size="1",
        chat_template=True,
        endpoint=hub.url,
        environment={"OMP_NUM_THREADS": "1"},
    )
    results, samples = their_run(hub, model, place, "their-chat", suite, 2, "--apply_chat_template")
    assert "which user" in samples["arc_easy"][0]["arguments"]["gen_args_0"]["arg_0"]
    assert ours.scores[0].value == results["results"]["arc_easy"]["acc_norm,none"]
    require_equal_samples(harness.folder_of(ours, place / "chat-cache"), "arc_easy", samples["arc_easy"])


def require_equal_samples(folder: Path, task: str, theirs: list[dict[str, Any]]) -> None:
    ours = [json.loads(line) for line in (folder / "samples" / f"{task}.jsonl").read_text().splitlines()]
    for samples in (ours, theirs):
        samples.sort(key=lambda sample: (sample["filter"], sample["doc_id"]))
    assert [sample["prompt_hash"] for sample in ours] == [sample["prompt_hash"] for sample in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        _require_equal(_numbers(mine["resps"]), _numbers(other["resps"]))


def _require_equal(ours: Any, theirs: Any) -> None:
    """Log-likelihoods agree to 1e-4: sums over shared prefixes are rounded otherwise. Everything else is equal."""
    if isinstance(ours, list):
        for mine, other in zip(ours, theirs, strict=True):
            _require_equal(mine, other)
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, rel=1e-4)
    else:
        assert ours == theirs


def _numbers(answers: Any) -> Any:
    """Their command line writes numbers as text."""
    if isinstance(answers, list):
        return [_numbers(answer) for answer in answers]
    return {"True": 1.0, "False": 0.0}.get(str(answers), _number(str(answers)))


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


@pytest.mark.slow
def test_a_score_names_the_data_it_was_asked_from(ours: ModelEvaluation, hub: RunningHub, place: Path) -> None:
    revision = hub.client('result = api.dataset_info("allenai/ai2_arc").sha', place / "home")
    assert ours.scores[0].data == TaskData("allenai/ai2_arc", "ARC-Easy", "test", revision)
