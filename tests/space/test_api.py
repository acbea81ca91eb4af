"""The named endpoints, asked by Gradio's own client."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import pytest
from gradio_client import Client

from bot.jobs.job import stage
from space.desk import now
from tests.space import exhibits
from tests.space.conftest import Stage

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client(space: Stage) -> Client:
    return Client(space.url, verbose=False)


def ask(client: Client, api_name: str, **values: Any) -> dict[str, Any]:
    answer = client.predict(**values, api_name=api_name)
    assert isinstance(answer, dict)
    return answer


def test_the_endpoints_keep_their_names(client: Client) -> None:
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert sorted(named) == ["/cancel", "/check", "/job", "/jobs", "/leaderboard", "/submit"]


def test_a_submitted_recipe_is_queued_and_pinned_to_commits(client: Client, space: Stage) -> None:
    answer = ask(client, "/submit", recipe=exhibits.RECIPE, name="from-the-form", suite="demo-skills", limit=20)
    job = space.queue.job(answer["job"]["id"])
    assert (job.request.requester, job.request.name) == ("visitor", "from-the-form")
    assert job.request.text == exhibits.RECIPE
    assert job.request.evaluate.limit == 20
    assert stage(job, now()).value == answer["job"]["stage"] == "queued"
    heads = {source.repo: source.revision for source in job.sources}
    assert set(heads) == {exhibits.BASE, exhibits.POET, exhibits.SMITH}
    assert all(len(revision) == 40 and revision in job.recipe for revision in heads.values())


def test_the_same_request_twice_is_one_job(client: Client) -> None:
    asked = {"recipe": exhibits.RECIPE, "name": "asked-twice", "suite": "demo-skills"}
    first, second = (ask(client, "/submit", **asked) for _ in range(2))
    assert first["job"]["id"] == second["job"]["id"]


def test_a_check_plans_and_queues_nothing(client: Client, space: Stage) -> None:
    before = len(space.queue.jobs(limit=1000))
    answer = ask(client, "/check", recipe=exhibits.RECIPE)
    assert answer["plan"]["method"] == "task_arithmetic"
    assert answer["plan"]["tensors"] > 0
    assert answer["licence"] == "apache-2.0"
    assert all(len(source["revision"]) == 40 for source in answer["sources"])
    assert len(space.queue.jobs(limit=1000)) == before


@pytest.mark.parametrize(
    ("recipe", "code", "line"),
    [
        ("merge_method: linaer\nmodels: []\n", "UNKNOWN_METHOD", 1),
        ("merge_method: linear\nmodels:\n  - model: smol/base-135m\n    wieght: 1\n", "UNKNOWN_KEY", 4),
        ("merge_method: linear\nmodels: [", "RECIPE_INVALID", None),
        (exhibits.RECIPE.replace(exhibits.POET, "smol/absent"), "SOURCE_NOT_FOUND", None),
        (exhibits.RECIPE.replace(exhibits.POET, "../../etc/passwd"), "NOT_A_REPO_ID", None),
        ("x" * 70_000, "RECIPE_TOO_LARGE", None),
        ("", "REQUEST_INVALID", None),
    ],
)
def test_an_impossible_recipe_is_refused_with_a_next_step(
    client: Client, space: Stage, recipe: str, code: str, line: int | None
) -> None:
    before = len(space.queue.jobs(limit=1000))
    refused = ask(client, "/submit", recipe=recipe, name="no", suite="demo-skills")["refused"]
    assert refused["code"] == code
    assert refused["message"] and refused["next"] and refused["request_id"]
    if line is not None:
        assert refused["where"]["line"] == line
    assert len(space.queue.jobs(limit=1000)) == before


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"recipe": ["a"], "name": "a"}, "recipe"),
        ({"recipe": "a", "name": {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}}, "name"),
        ({"recipe": "a", "name": "a", "tasks": "all"}, "tasks"),
        ({"recipe": "a", "name": "a", "limit": 0}, "limit"),
        ({"recipe": "a", "name": "a", "limit": "many"}, "limit"),
        ({"recipe": "a", "name": "a", "speed": "ludicrous"}, "speed"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_the_name_of_its_field(
    space: Stage, values: dict[str, Any], field: str
) -> None:
    # A raw request: Gradio's client would refuse to send some of these.
    asked = {"suite": "quick", "tasks": [], "limit": None, "speed": "off"} | values
    data = [asked[name] for name in ("recipe", "name", "suite", "tasks", "limit", "speed")]
    refused = raw_call(space.url, "submit", data)
    if refused is None:  # Gradio itself refused to take the value for a file
        assert isinstance(values["name"], dict)
        return
    assert refused["refused"]["code"] == "REQUEST_INVALID"
    assert f"`{field}`" in refused["refused"]["message"]


def raw_call(url: str, name: str, data: list[Any]) -> dict[str, Any] | None:
    """One call over plain HTTP; None when Gradio ended it with an error of its own."""
    body = json.dumps({"data": data}).encode()
    sent = urllib.request.Request(
        f"{url}/gradio_api/call/{name}", body, {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(sent, timeout=30) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{url}/gradio_api/call/{name}/{event}", timeout=30) as stream:
        lines = stream.read().decode().splitlines()
    if "event: complete" not in lines:
        return None
    last = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")][-1]
    found = json.loads(last)[0]
    assert isinstance(found, dict)
    return found


def test_jobs_are_returned_with_their_facts(client: Client, space: Stage) -> None:
    told = {job["id"]: job for job in ask(client, "/jobs")["jobs"]}
    for stage_name in ("published", "failed", "cancelled", "publishing", "evaluating", "merging", "queued"):
        assert told[space.jobs[stage_name]]["stage"] == stage_name
    published = ask(client, "/job", job_id=space.jobs["published"])["job"]
    assert published["publication"]["url"] == f"{space.hub.url}/mergebot/alice-both-skills"
    assert published["evaluation"]["merged"]["scores"][0]["value"] == 66 / 80
    assert published["evaluation"]["decode_speed"]["speedup"] == 0.87
    assert told[space.jobs["merging"]]["progress"]["done"] == 161
    assert told[space.jobs["failed"]]["failures"][0]["code"] == "NOT_FINITE"


def test_mine_returns_only_the_visitors_jobs(client: Client) -> None:
    mine = ask(client, "/jobs", mine=True)["jobs"]
    assert mine and {job["requester"] for job in mine} == {"visitor"}


def test_only_the_owner_cancels_a_job(client: Client, space: Stage) -> None:
    refused = ask(client, "/cancel", job_id=space.jobs["merging"])["refused"]
    assert refused["code"] == "NOT_YOURS"
    assert stage(space.queue.job(space.jobs["merging"]), now()).value == "merging"
    own = ask(client, "/submit", recipe=exhibits.RECIPE, name="to-cancel", suite="demo-skills", limit=21)["job"]["id"]
    assert ask(client, "/cancel", job_id=own)["job"]["stage"] == "cancelled"
    assert stage(space.queue.job(own), now()).value == "cancelled"


@pytest.mark.parametrize("job_id", ["0" * 12, "../../x", "", "a" * 5000])
def test_an_unknown_job_is_not_found(client: Client, job_id: str) -> None:
    assert ask(client, "/job", job_id=job_id)["refused"]["code"] == "JOB_NOT_FOUND"


def test_the_leaderboard_equals_the_dataset_on_the_hub(client: Client, space: Stage) -> None:
    rows = ask(client, "/leaderboard")["rows"]
    held = exhibits.board_rows(space.hub.url)
    assert [row["model"] for row in rows] == [row.model for row in held]
    assert [row["speedup"] for row in rows] == [row.speedup for row in held]


def test_the_space_is_healthy(space: Stage) -> None:
    with urllib.request.urlopen(f"{space.url}/healthz") as answer:
        assert json.load(answer)["status"] == "ok"


def test_nothing_can_be_uploaded_or_sent_in_bulk(space: Stage) -> None:
    for address, size, status in (("/gradio_api/upload", 10, 403), ("/gradio_api/call/submit", 300_000, 413)):
        sent = urllib.request.Request(
            space.url + address, b"{" + b" " * size + b"}", {"Content-Type": "application/json"}, method="POST"
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(sent, timeout=20)
        assert refused.value.code == status


@pytest.mark.parametrize("address", ["/monitoring", "/gradio_api/file=/etc/passwd", "/docs"])
def test_default_routes_of_gradio_and_fastapi_are_closed(space: Stage, address: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(space.url + address, timeout=20)
    assert refused.value.code in (401, 403, 404)


def test_the_log_holds_no_traceback(space: Stage, client: Client) -> None:
    ask(client, "/jobs")
    assert "Traceback" not in space.log.read_text()
