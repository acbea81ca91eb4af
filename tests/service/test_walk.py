"""The main job through its real doors: a form sent by Gradio's client, a card pushed by the Hub's client.

One Hub, one Space with its scheduler, one tiny real family; the walk runs once and each test looks at what it left.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from gradio_client import Client

from bot.demo import skills
from bot.hub import Hub
from bot.jobs.job import ENDED, Job, Stage, stage
from bot.jobs.queue import Queue, open_queue
from bot.jobs.request import front_matter
from bot.localhub import seed
from bot.publishing import leaderboard
from bot.settings import Settings
from bot.stages import local_runs
from tests import family
from tests.localhub.server import RunningHub, running_hub
from tests.space.server import running_space
from tests.verify_promises import broken_promises

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CARD = """---
license: apache-2.0
tags: [mergebot]
mergebot:
  version: 1
  recipe:
    merge_method: linear
    models:
    - {model: alice/left, parameters: {weight: 1}}
    - {model: alice/right, parameters: {weight: 1}}
    dtype: bfloat16
  evaluate: {suite: none}
  deliver: {name: averaged}
---
# Please merge
"""


@dataclass(frozen=True)
class Walk:
    """What the two requests left behind."""

    hub: RunningHub
    settings: Settings
    queue: Queue
    form: Job
    card: Job
    answers: list[dict[str, Any]]
    home: Path


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    folder = tmp_path_factory.mktemp("walk")
    content = folder / "content"
    family.make(content / "models" / "alice")
    skills.write(content / "datasets" / "mergebot")
    with running_hub(folder / "hub") as hub:
        seed(hub.root, content)
        token = folder / "token"
        token.write_text(hub.token_of("mergebot"))
        settings = Settings(
            home=folder / "bot",
            hub=hub.url,
            namespace="mergebot",
            publish_token_file=token,
            device="cpu",
            poll_s=1,
            tick_s=0.2,
            speed_budget_s=10,
            speed_questions=2,
            speed_new_tokens=16,
        )
        told = ("namespace", "publish_token_file", "device", "poll_s", "tick_s", "speed_budget_s", "speed_questions")
        environment = {f"MERGEBOT_{name.upper()}": str(getattr(settings, name)) for name in told}
        environment |= {"MERGEBOT_SPEED_NEW_TOKENS": "16", "MERGEBOT_SCHEDULE": "true"}
        settings.home.mkdir()
        with running_space(settings.home, hub.url, log=folder / "space.log", environment=environment) as address:
            push = f"api.create_repo('alice/asks'); api.upload_file(path_or_fileobj={CARD.encode()!r}, "
            hub.client(push + "path_in_repo='README.md', repo_id='alice/asks')", folder / "client", "alice")
            answers = [_submit(address), _submit(address)]
            queue = open_queue(settings)
            form, card = _ended(queue, answers[0]["job"]["id"])
            _told(queue, Hub(hub.url), settings)
        yield Walk(hub, settings, queue, form, card, answers, folder / "client")


def _submit(address: str) -> dict[str, Any]:
    client = Client(address, verbose=False)
    answer = client.predict(
        recipe=family.RECIPE, name="both", suite="demo-skills", tasks=[], limit=8, speed="medusa", api_name="/submit"
    )
    assert isinstance(answer, dict)
    return answer


def _ended(queue: Queue, form: str, timeout_s: float = 500) -> tuple[Job, Job]:
    for _ in _until(timeout_s):
        jobs = queue.jobs()
        if len(jobs) == 2 and all(job.ended_at for job in jobs):
            first, second = sorted(jobs, key=lambda job: job.id != form)
            return first, second
    raise AssertionError(
        f"after {timeout_s} s: {[(job.request.name, job.progress, job.failures) for job in queue.jobs()]}"
    )


def _told(queue: Queue, hub: Hub, settings: Settings) -> None:
    for _ in _until(60):
        if not queue.unanswered() and len(leaderboard.read(hub, settings)) == 2:
            return
    raise AssertionError("the card's author was not answered, or the board is behind")


def _until(timeout_s: float) -> Iterator[None]:
    """Look again a few times a second: other processes do the work."""
    pause, end = threading.Event(), time.monotonic() + timeout_s
    while time.monotonic() < end:
        yield
        pause.wait(0.2)


def test_both_doors_end_as_published_repos(walk: Walk) -> None:
    for job, name in ((walk.form, "mergebot/visitor-both"), (walk.card, "mergebot/alice-averaged")):
        assert stage(job, job.submitted_at) is Stage.PUBLISHED, job.failures
        assert job.publication is not None
        assert job.publication.repo == name
        assert Hub(walk.hub.url).resolve(name).private is False


def test_the_same_form_sent_twice_is_one_job(walk: Walk) -> None:
    assert walk.answers[0]["job"]["id"] == walk.answers[1]["job"]["id"]
    assert len(walk.queue.jobs()) == 2


def test_the_promises_hold_from_the_database_and_the_hub_alone(walk: Walk) -> None:
    assert broken_promises(walk.settings, walk.hub.root) == []


@pytest.fixture(scope="module")
def in_transformers(walk: Walk) -> dict[str, Any]:
    """What somebody finds who has transformers and the repo's name: they wait for transformers once."""
    code = """
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        def weights(name):
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
            return {key: value.float() for key, value in model.state_dict().items()}
        base, left, right = (weights("alice/" + name) for name in ("base", "left", "right"))
        repo = "mergebot/visitor-both"
        got = weights(repo)
        gap = max(
            float((got[key] - (base[key] + (left[key] - base[key]) + 0.5 * (right[key] - base[key]))).abs().max())
            for key in got
        )
        model, tokenizer = AutoModelForCausalLM.from_pretrained(repo), AutoTokenizer.from_pretrained(repo)
        asked = dict(**tokenizer("The crest", return_tensors="pt"), max_new_tokens=20, do_sample=False)
        asked.pop("token_type_ids", None)
        own = model.float().generate(**asked).tolist()
        with_heads = model.generate(**asked, custom_generate=repo, trust_remote_code=True).tolist()
        used = getattr(model, "_medusa_heads", None) is not None
        result = dict(gap=gap, own=own, with_heads=with_heads, used=used)
    """
    return dict(walk.hub.client(code, walk.home))


def test_the_published_model_loads_and_is_the_sum_the_recipe_asks_for(in_transformers: dict[str, Any]) -> None:
    assert in_transformers["gap"] <= 2**-7


def test_anybody_can_verify_what_was_published(walk: Walk, tmp_path: Path) -> None:
    anyone = Settings(home=tmp_path / "bot", hub=walk.hub.url)
    for name, parameters in (("mergebot/visitor-both", 21), ("mergebot/alice-averaged", 21)):
        verdict = local_runs.verify(name, anyone, lambda what, done, total: None)
        assert verdict.differences == () and verdict.tensors == parameters, verdict.sentence


def test_the_card_has_the_metadata_the_hub_understands(walk: Walk) -> None:
    hub = Hub(walk.hub.url)
    published = hub.resolve("mergebot/visitor-both")
    card = hub.read_text("mergebot/visitor-both", published.revision, "README.md", limit_bytes=1 << 20)
    assert card is not None
    metadata = yaml.safe_load(front_matter(card) or "")
    assert metadata["base_model"] == ["alice/left", "alice/right", "alice/base"]
    assert (metadata["base_model_relation"], metadata["license"]) == ("merge", "apache-2.0")
    assert {"merge", "made-with-mergebot"} <= set(metadata["tags"])
    assert "mergebot" not in metadata["tags"]
    [index] = metadata["model-index"]
    assert {result["dataset"]["name"] for result in index["results"]} >= {"invented_crests", "invented_smiths"}
    assert published.tags and "base_model:merge:alice/left" in published.tags
    for source in walk.form.sources:
        assert source.revision in card
    loaded = walk.hub.client(
        "from huggingface_hub import ModelCard\n"
        "result = ModelCard.load('mergebot/visitor-both').data.eval_results is not None",
        walk.home,
    )
    assert loaded is True


def test_the_evaluated_and_the_published_bytes_are_the_same(walk: Walk) -> None:
    assert walk.form.merge and walk.form.evaluation and walk.form.publication
    assert walk.form.evaluation.manifest == walk.form.merge.manifest
    tree = Hub(walk.hub.url).tree(walk.form.publication.repo, walk.form.publication.commit)
    for name, file in walk.form.merge.files.items():
        assert tree[name].size == file.bytes
        assert tree[name].sha256 in (None, file.sha256)
    assert {"mergekit_config.yml", "merge_provenance.json", ".mergebot.json", "results/lm_eval.json"} <= set(tree)


def test_the_repo_carries_the_heads_it_was_measured_with_and_generate_uses_them(
    walk: Walk, in_transformers: dict[str, Any]
) -> None:
    assert walk.form.evaluation and walk.form.publication
    repo, heads = walk.form.publication.repo, walk.form.evaluation.heads
    assert {"medusa/medusa_lm_head.safetensors", "custom_generate/generate.py"} <= set(heads)
    tree = Hub(walk.hub.url).tree(repo, walk.form.publication.commit)
    assert {name: tree[name].size for name in heads} == {name: file.bytes for name, file in heads.items()}
    assert in_transformers["own"] == in_transformers["with_heads"] and in_transformers["used"]


def test_every_model_was_measured_on_the_same_questions(walk: Walk) -> None:
    evaluation = walk.form.evaluation
    assert evaluation is not None and evaluation.merged is not None
    all_of_them = [evaluation.merged, *evaluation.sources.values()]
    assert len(all_of_them) == 4
    assert len({each.suite_digest for each in all_of_them}) == 1
    assert len({each.environment for each in all_of_them}) == 1
    assert all(score.samples == 8 for each in all_of_them for score in each.scores)


def test_the_merge_is_judged_beside_each_source_and_the_repo_shows_it(walk: Walk) -> None:
    assert walk.form.evaluation and walk.form.publication
    found, repo = walk.form.evaluation.comparison, walk.form.publication.repo
    assert found is not None and found.overall is not None, walk.form.evaluation.not_compared
    assert len(found.parents) == 3 and list(walk.form.evaluation.vitals) == ["", *found.parents]
    assert all(len(task.differences) == 3 and task.samples == 8 for task in found.tasks)
    hub, commit = Hub(walk.hub.url), walk.form.publication.commit
    card = hub.read_text(repo, commit, "README.md", limit_bytes=1 << 20) or ""
    assert "Against its parents, on average over 2 tasks: " in card and "](results/comparison.svg)" in card
    assert (hub.read_text(repo, commit, "results/comparison.svg", limit_bytes=1 << 20) or "").startswith("<svg ")
    board = next(row for row in leaderboard.read(hub, walk.settings) if row.model == repo)
    assert board.verdict is not None and len(board.intervals) == 8


def test_the_speed_report_is_exact_and_honest(walk: Walk) -> None:
    assert walk.form.evaluation is not None
    speed = walk.form.evaluation.decode_speed
    assert speed is not None and speed["refusal"] is None
    heads = next(row for row in speed["candidates"] if row["origin"] == "fresh")
    assert heads["exact"]["equal"] == heads["exact"]["prompts"] > 0
    assert heads["tokens_per_step"]["measured"] >= 1.0
    assert speed["plain"]["tokens_per_s"] > 0
    assert speed["sentence"]


def test_the_board_is_a_dataset_that_loads(walk: Walk) -> None:
    rows = walk.hub.client(
        """
        from datasets import load_dataset
        rows = load_dataset("mergebot/mergebot-leaderboard", split="train", revision=api.dataset_info(
            "mergebot/mergebot-leaderboard").sha)
        result = [[row["model"], row["method"], row["average"]] for row in rows]
        """,
        walk.home,
    )
    assert {(row[0], row[1]) for row in rows} == {
        ("mergebot/visitor-both", "task_arithmetic"),
        ("mergebot/alice-averaged", "linear"),
    }
    assert next(row[2] for row in rows if row[1] == "task_arithmetic") is not None


def test_the_cards_author_is_answered_once_in_a_discussion(walk: Walk) -> None:
    threads = walk.hub.client(
        """
        found = list(api.get_repo_discussions("alice/asks"))
        result = [[one.title, one.author, [event.content for event in
            api.get_discussion_details("alice/asks", one.num).events if event.type == "comment"]] for one in found]
        """,
        walk.home,
    )
    [(title, author, comments)] = threads
    assert title.startswith("mergebot: request ") and author == "mergebot"
    assert sum("Published as [mergebot/alice-averaged]" in comment for comment in comments) == 1


def test_nothing_is_left_on_the_disk_and_no_token_in_any_text(walk: Walk) -> None:
    assert list((walk.settings.scratch).glob("[0-9a-f]*")) == []
    secret = walk.hub.token_of("mergebot").encode()
    leaks = [path for path in walk.settings.home.rglob("*") if path.is_file() and secret in path.read_bytes()]
    assert leaks == []


def test_the_provenance_names_commits_and_hashes(walk: Walk) -> None:
    hub, publication = Hub(walk.hub.url), walk.form.publication
    assert publication is not None and walk.form.merge is not None
    text = hub.read_text(publication.repo, publication.commit, "merge_provenance.json", limit_bytes=1 << 20)
    provenance = json.loads(text or "")
    assert {source["ref"] for source in provenance["sources"]} == {str(source) for source in walk.form.sources}
    assert provenance["outputs"]["model.safetensors"]["sha256"] == walk.form.merge.files["model.safetensors"].sha256
    assert stage(walk.form, walk.form.submitted_at) in ENDED
