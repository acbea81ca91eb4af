"""The harness: lm-eval's numbers exactly, in a process that can be killed, kept for the next merge that asks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bot.errors import EvaluationError
from bot.localhub import seed
from evaluators import harness, loading, memory
from evaluators.comparison import samples
from evaluators.harness import evaluation, suites
from evaluators.harness.eval_config import EvalConfig
from evaluators.harness.scores import Environment, ModelEvaluation, Score, TaskData
from evaluators.harness.suites import SUITES, Suite, SuiteTask
from evaluators.harness.task_loading import cleaned
from tests.evaluators import tiny_harness
from tests.localhub.server import REPO, running_hub

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
TIMEOUT_S = 240.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("harness")


@pytest.fixture(scope="module")
def model(place: Path) -> Path:
    return tiny_harness.model(place / "models" / "tiny")


@pytest.fixture(scope="module")
def suite(place: Path) -> Suite:
    """A task, and a group of two others."""
    folder = place / "task"
    for name in ("which_bird", "which_fish"):
        tiny_harness.task(folder, name)
    (folder / "both.yaml").write_text(
        "group: both\ntask: [which_bird, which_fish]\n"
        "aggregate_metric_list:\n  - {metric: acc, aggregation: mean, weight_by_size: true}\n"
    )
    group = SuiteTask("both", chance=0.2, file=folder / "both.yaml")
    return Suite("animals", 1, (tiny_harness.task(folder, "which_animal"), group))


@pytest.fixture(scope="module")
def measure(place: Path) -> Callable[..., ModelEvaluation]:
    def run(model: Path, suite: Suite, scratch: str, **options: Any) -> ModelEvaluation:
        settings = {"timeout_s": TIMEOUT_S, "environment": ONE_THREAD} | options
        return tiny_harness.evaluate(model, suite, cache=place / "cache", scratch=place / scratch, **settings)

    return run


@pytest.fixture(scope="module")
def told() -> list[tuple[int, int, str]]:
    return []


@pytest.fixture(scope="module")
def measured(
    measure: Callable[..., ModelEvaluation],
    model: Path,
    suite: Suite,
    told: list[tuple[int, int, str]],
) -> ModelEvaluation:
    return measure(model, suite, "scratch", progress=lambda *line: told.append(line))


def logged(folder: Path, task: str) -> list[dict[str, Any]]:
    """The samples of a task, as lm-eval logs them."""
    return [json.loads(line) for line in (folder / "samples" / f"{task}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_scores_are_exactly_those_of_calling_lm_eval(measured: ModelEvaluation, model: Path, suite: Suite) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = suite.tasks[0].file
    assert file is not None
    direct = simple_evaluate(
        HFLM(
            pretrained=AutoModelForCausalLM.from_pretrained(model),
            tokenizer=AutoTokenizer.from_pretrained(model),
            batch_size="16",
        ),
        tasks=["which_animal"],
        task_manager=TaskManager(include_path=str(file.parent), include_defaults=False),
        bootstrap_iters=1000,
    )
    assert direct is not None
    expected = direct["results"]["which_animal"]
    score, normalised = measured.scores[0], measured.others[0]
    assert (score.metric, score.value, score.stderr) == ("acc", expected["acc,none"], expected["acc_stderr,none"])
    assert (normalised.metric, normalised.value) == ("acc_norm", expected["acc_norm,none"])
    assert (score.samples, score.few_shot, score.task_version) == (24, 0, "1.0")
    assert measured.environment.dtype == "float32" and measured.environment.device == "cpu"


@pytest.mark.slow
def test_every_sample_is_kept_and_no_path_of_this_machine(
    measured: ModelEvaluation, place: Path, model: Path, told: list[tuple[int, int, str]]
) -> None:
    folder = harness.folder_of(measured, place / "cache")
    asked = logged(folder, "which_animal")
    assert [sample["doc_id"] for sample in asked] == list(range(24))
    assert sum(sample["acc"] for sample in asked) / 24 == measured.scores[0].value
    results = (folder / "lm_eval.json").read_text()
    assert str(place) not in results and str(REPO) not in results and str(Path.home()) + "/" not in results
    assert "pretty_env_info" not in results and "git_hash" not in results
    assert told[-1][0] == told[-1][1] > 0
    assert list((place / "cache" / "partial").iterdir()) == []


@pytest.mark.slow
def test_a_metric_that_a_task_has_not_is_said_before_anything_is_asked(place: Path, model: Path, suite: Suite) -> None:
    wrong = Suite("animals", 1, (suite.tasks[1], replace(suite.tasks[0], metric="exact_match")))
    asked: list[tuple[int, int, str]] = []
    where = {"cache": place / "cache-of-a-slip", "scratch": place / "scratch-of-a-slip"}
    with pytest.raises(EvaluationError, match="`which_animal` has no metric `exact_match,none`") as caught:
        tiny_harness.evaluate(model, wrong, timeout_s=100, progress=lambda *told: asked.append(told), **where)
    assert caught.value.next_step.endswith(": acc,none, acc_norm,none.")
    assert {done for done, _, _ in asked} == {0}


@pytest.mark.slow
def test_samples_are_read_back_as_lm_eval_scored_them(measured: ModelEvaluation, place: Path) -> None:
    folder = harness.folder_of(measured, place / "cache")
    answers = samples.read(folder, measured.others[0], samples.groups(folder))
    assert measured.others[0].metric == "acc_norm" and answers.choices is not None
    asked = logged(folder, "which_animal")
    right = [float(choice == str(sample["target"])) for choice, sample in zip(answers.choices, asked, strict=True)]
    assert right == answers.values.tolist() == [sample["acc_norm"] for sample in asked]


@pytest.mark.slow
def test_a_group_is_one_score_and_each_of_its_tasks_keeps_its_samples(measured: ModelEvaluation, place: Path) -> None:
    folder = harness.folder_of(measured, place / "cache")
    right = [sample["acc"] for name in ("which_bird", "which_fish") for sample in logged(folder, name)]
    score = measured.scores[1]
    assert len(right) == 48 and score.value == pytest.approx(sum(right) / 48)
    assert score.normalised == pytest.approx(max(0.0, (sum(right) / 48 - 0.2) / 0.8))
    told = json.loads((folder / "lm_eval.json").read_text())
    assert told["group_subtasks"]["both"] == ["which_bird", "which_fish"]
    assert set(told["n-samples"]) == {"which_animal", "which_bird", "which_fish"}


@pytest.mark.slow
def test_the_same_question_is_answered_from_the_cache_without_a_process(
    measured: ModelEvaluation, measure: Callable[..., ModelEvaluation], model: Path, suite: Suite, place: Path
) -> None:
    assert measure(model, suite, "unused", timeout_s=0.0) == measured
    assert not (place / "unused").exists()


@pytest.mark.slow
def test_another_setting_another_model_or_another_suite_is_another_question(
    measured: ModelEvaluation, measure: Callable[..., ModelEvaluation], model: Path, suite: Suite, place: Path
) -> None:
    other_model = tiny_harness.model(place / "models" / "other", seed=1)
    other_suite = replace(suite, tasks=(replace(suite.tasks[0], few_shot=0), suite.tasks[1]))
    for asked in ((model, suite, {"limit": 3}), (other_model, suite, {}), (model, other_suite, {})):
        with pytest.raises(EvaluationError) as caught:
            measure(asked[0], asked[1], "none", timeout_s=0.0, **asked[2])
        assert caught.value.code == "TIME_LIMIT"


@pytest.mark.slow
def test_an_evaluation_past_its_time_is_killed_with_its_process(
    measure: Callable[..., ModelEvaluation], model: Path, suite: Suite
) -> None:
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(EvaluationError) as caught:
        measure(model, suite, "late", limit=5, timeout_s=1.0)
    assert caught.value.code == "TIME_LIMIT" and "1 seconds" in caught.value.message
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.mark.slow
def test_the_process_dies_with_whoever_started_it(place: Path, model: Path, suite: Suite) -> None:
    code = f"""
from pathlib import Path
from evaluators import harness
from evaluators.harness import EvalConfig, Question, RunOptions
from evaluators.harness.suites import Suite, SuiteTask
suite = Suite("animals", 1, (SuiteTask("which_animal", file=Path({str(suite.tasks[0].file)!r})),))
run = RunOptions(Path({str(place / "cache-of-the-dead")!r}), Path({str(place / "scratch-of-the-dead")!r}),
                 timeout_s=100, progress=lambda done, total, what: print(what, flush=True))
harness.evaluate(Path({str(model)!r}), Question(suite, EvalConfig()), run)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline().strip() == "loading lm-eval"
        orphans = psutil.Process(starter.pid).children(recursive=True)
        starter.kill()
    assert orphans
    _gone, alive = psutil.wait_procs(orphans, timeout=30)
    assert not alive


def _without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _not_a_number(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][:] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
def test_broken_models_are_refused_each_with_its_sentence_also_side_by_side(
    measure: Callable[..., ModelEvaluation], suite: Suite, place: Path
) -> None:
    """Two processes with one scratch folder, as two commands in one home: each does its own job."""

    def refused(spoil: Callable[[Path], None]) -> EvaluationError:
        folder = tiny_harness.model(place / "models" / spoil.__name__)
        spoil(folder)
        with pytest.raises(EvaluationError) as caught:
            measure(folder, suite, "scratch-of-two")
        assert str(place) not in caught.value.message
        return caught.value

    with ThreadPoolExecutor(2) as pool:
        lacking, mad = pool.map(refused, (_without_a_tensor, _not_a_number))
    assert lacking.code == "MODEL_UNLOADABLE" and "model.layers.1.mlp.up_proj.weight" in lacking.message
    assert mad.code == "EVALUATION_FAILED" and "NaN" in mad.message


def test_a_checkpoint_beside_an_adapter_is_refused(place: Path) -> None:
    """With PEFT at hand transformers would apply it, to whatever base its file names."""
    folder = tiny_harness.model(place / "models" / "adapted")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/b"}))
    with pytest.raises(EvaluationError, match="holds an adapter") as caught:
        loading.load(folder)
    assert caught.value.code == "MODEL_UNLOADABLE"


def test_a_truncated_checkpoint_is_refused_with_a_sentence(place: Path) -> None:
    folder = tiny_harness.model(place / "models" / "truncated")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(EvaluationError) as caught:
        loading.load(folder)
    assert caught.value.code == "MODEL_UNLOADABLE"
    assert "cannot be loaded" in caught.value.message and str(place) not in caught.value.message


@pytest.mark.slow
def test_data_that_the_hub_does_not_have_are_named(
    measure: Callable[..., ModelEvaluation], model: Path, place: Path
) -> None:
    suite = tiny_harness.suite(place / "absent", repo="nobody/aggregated-data")
    with running_hub(place / "hub-without-data") as hub, pytest.raises(EvaluationError) as caught:
        measure(model, suite, "absent-scratch", endpoint=hub.url)
    assert caught.value.code == "DATASET_UNAVAILABLE"
    assert "nobody/aggregated-data" in caught.value.message


def test_an_unknown_task_is_refused_with_the_nearest_name(
    measure: Callable[..., ModelEvaluation], model: Path, place: Path
) -> None:
    with pytest.raises(EvaluationError) as caught:
        measure(model, Suite("mine", 1, (SuiteTask("arc_eazy"),)), "nothing")
    assert caught.value.code == "UNKNOWN_TASK"
    assert str(caught.value) == "There is no task `arc_eazy`. Did you mean `arc_easy`?"
    assert not (place / "nothing").exists()


def test_a_folder_without_a_model_is_refused(measure: Callable[..., ModelEvaluation], place: Path) -> None:
    (place / "empty").mkdir()
    with pytest.raises(EvaluationError) as caught:
        measure(place / "empty", SUITES["demo-skills"], "nothing")
    assert caught.value.code == "MODEL_UNLOADABLE" and "empty holds no config.json" in caught.value.message


def test_every_task_of_our_suites_exists() -> None:
    for suite in SUITES.values():
        assert set(suites.find(suite.tasks)) == {task.name for task in suite.tasks}


def test_a_suites_digest_follows_everything_that_changes_a_question(tmp_path: Path) -> None:
    suite = tiny_harness.suite(tmp_path)
    task = suite.tasks[0]
    digests = {suite.digest, replace(suite, version=2).digest, replace(suite, name="other").digest}
    digests |= {
        replace(suite, tasks=(changed,)).digest
        for changed in (replace(task, few_shot=3), replace(task, metric="acc_norm"), replace(task, filter="strict"))
    }
    assert suite.digest == tiny_harness.suite(tmp_path).digest
    assert task.file is not None
    task.file.write_text(task.file.read_text() + "repeats: 1\n")
    digests.add(suite.digest)
    assert len(digests) == 7
    assert replace(suite, about="said otherwise").digest == suite.digest


GROUP = "group: all\ntask: [one, two]\n"


def test_a_suites_digest_follows_every_file_that_its_task_file_draws_in(tmp_path: Path) -> None:
    folder, data = tmp_path / "tasks", tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    (data / "more").mkdir(parents=True)
    texts = {
        "all.yaml": GROUP,
        "one.yaml": "task: one\ninclude: [\"../tasks/base.yaml\", 'more.yml']\n",
        "two.yaml": f"task: two\nprocess_docs: !function deep.code.docs\ndataset_path: {data}\n",
        "base.yaml": "include: defaults.yml\ndoc_to_text: !function 'words.text'\n",
        "more.yml": f"dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n",
        "defaults.yml": "output_type: multiple_choice\n",
        "words.py": "import helper\n",
        "helper.py": "A = 1\n",
        "deep/code.py": "B = 1\n",
        "../data/more/part.jsonl": "{}\n",
        "../rows.jsonl": "{}\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "beside.yaml").write_text("task: beside\n")
    suite = Suite("all", 1, suites.named(str(folder / "all.yaml")))
    before = suite.digest
    for name, text in texts.items():
        (folder / name).write_text(text + "# another\n")
        assert suite.digest != before, name
        (folder / name).write_text(text)
    (folder / "beside.yaml").write_text("task: beside\n# another\n")
    assert suite.digest == before


def test_an_evaluations_name_follows_every_condition() -> None:
    """Each of them can change a number; "auto" is the device there is."""
    here = EvalConfig(device="cpu")
    other = {
        "limit": 3,
        "seed": 1,
        "device": "cuda",
        "dtype": "bfloat16",
        "batch_size": "8",
        "chat_template": True,
        "backend": "vllm",
    }
    assert set(other) == {field.name for field in fields(EvalConfig)}
    keys = [here.key("m", "s"), here.key("n", "s"), here.key("m", "t")]
    keys += [replace(here, **{name: value}).key("m", "s") for name, value in other.items()]  # type: ignore[arg-type]
    assert len(set(keys)) == len(keys)
    there = EvalConfig(device=memory.computed_on("auto"))
    assert EvalConfig(device="auto").key("m", "s") == there.key("m", "s")


def test_the_process_inherits_nothing_but_what_is_on_the_list(tmp_path: Path) -> None:
    given = {"HF_TOKEN": "hf_x", "MERGEBOT_DATABASE": "x", "HOME": "/x", "PYTHONPATH": "/x", "OMP_NUM_THREADS": "3"}
    made = evaluation._environment(given, None, tmp_path, tmp_path)
    assert made["OMP_NUM_THREADS"] == "3" and made["HF_HUB_OFFLINE"] == "1"
    assert not {"HF_TOKEN", "MERGEBOT_DATABASE"} & set(made) and "/x" not in made.values()


def test_a_models_content_is_its_weights_configuration_and_tokenizer(tmp_path: Path) -> None:
    folder = tiny_harness.model(tmp_path / "model")
    before = harness.content_digest(folder)
    (folder / "README.md").write_text("# another card")
    (folder / "merge_provenance.json").write_text("{}")
    assert harness.content_digest(folder) == before
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1] + b" ")
        assert harness.content_digest(folder) != before
        (folder / name).write_bytes(whole)
    (folder / "additional_chat_templates").mkdir()
    for name in ("additional_chat_templates/default.jinja", "chat_template.jinja", "vocab.bpe", "qwen.tiktoken"):
        (folder / name).write_text("x")
        assert harness.content_digest(folder) != before
        (folder / name).unlink()
    (folder / "notes.json").mkdir()
    (folder / "vocab.txt").symlink_to("gone.txt")
    assert harness.content_digest(folder) == before


texts = st.text(max_size=8)
fractions = st.floats(0, 1)
scores = st.builds(
    Score,
    texts,
    texts,
    fractions,
    st.none() | fractions,
    st.integers(0, 9),
    st.integers(0, 9),
    st.booleans(),
    texts,
    texts,
    st.none() | st.builds(TaskData, texts, st.none() | texts, st.none() | texts, st.none() | texts),
    st.none() | st.floats(0, 0.9),
)
environments = st.builds(
    Environment, texts, texts, texts, st.booleans(), st.integers(), texts, texts, texts, st.none() | st.integers(1, 9)
)


@given(
    st.builds(
        ModelEvaluation,
        texts,
        texts,
        st.lists(scores, max_size=3).map(tuple),
        environments,
        fractions,
        st.lists(scores, max_size=3).map(tuple),
        texts,
    )
)
def test_an_evaluation_survives_its_own_json(found: ModelEvaluation) -> None:
    assert ModelEvaluation.from_dict(json.loads(json.dumps(found.as_dict()))) == found


@given(st.recursive(st.text(alphabet="ab/ /srv/home", max_size=20), lambda inner: st.lists(inner, max_size=3)))
def test_cleaned_results_hold_no_private_path(value: Any) -> None:
    hidden = {"config": {"x": value, "model_args": value}, "git_hash": value, "where": ["/srv/home/x", value]}
    kept = json.dumps(cleaned(hidden, ["/srv/home"]))
    assert "/srv/home/x" not in kept and "model_args" not in kept and "git_hash" not in kept


@pytest.mark.slow
def test_gated_data_are_told_apart_from_data_that_are_not_there(
    measure: Callable[..., ModelEvaluation], model: Path, place: Path
) -> None:
    data = place / "gated" / "datasets" / "mergebot" / "secret"
    data.mkdir(parents=True)
    suite = tiny_harness.suite(place / "gated-task", repo="mergebot/secret")
    (data / "test.jsonl").write_text((place / "gated-task" / "which_animal.jsonl").read_text())
    with running_hub(place / "gated-hub") as hub:
        seed(hub.root, place / "gated")
        hub.client(
            'api.update_repo_settings("mergebot/secret", gated="manual", repo_type="dataset")', place / "h", "mergebot"
        )
        with pytest.raises(EvaluationError) as caught:
            measure(model, suite, "gated-scratch", endpoint=hub.url)
    assert caught.value.code == "DATASET_GATED" and "which_animal" in caught.value.message
