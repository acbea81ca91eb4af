"""The bot's own Hub client against the local Hub: what it promises its callers, with and without faults on the way."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import struct
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bot.errors import Failed, MergebotError, Refused, Transient
from bot.hub import Hub, check_repo_id
from bot.hub.transport import requested_wait_s
from tests.localhub.server import ORG, RunningHub

# The library itself passes uploads to its transport in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
WEIGHTS = random.Random(0).randbytes(700_000)


def hub_of(
    running: RunningHub, user: str | None = None, *, waits: list[float] | None = None, deadline_s: float = 30
) -> Hub:
    """A client whose waits take no time; they are noted in `waits`."""
    noted = [] if waits is None else waits
    return Hub(running.url, running.token_of(user) if user else None, deadline_s=deadline_s, sleep=noted.append)


def published(running: RunningHub, name: str = f"{ORG}/model", **files: bytes | None) -> tuple[Hub, str]:
    """A public repo of mergebot with a small checkpoint -> (its owner's client, its commit). None leaves a file out."""
    hub = hub_of(running, "mergebot")
    hub.create_private(name)
    given: dict[str, bytes | None] = {
        "README.md": b"---\nlicense: apache-2.0\ntags: [mergebot]\n---\n# Card\n",
        "config.json": b"{}",
        "model.safetensors": WEIGHTS,
        **{key.replace("__", "."): value for key, value in files.items()},
    }
    contents = {name: content for name, content in given.items() if content is not None}
    commit = hub.commit(name, contents, parent=hub.head(name), message="publish")
    hub.make_public(name)
    return hub, commit


def refusal(operation: Callable[[], object]) -> MergebotError:
    with pytest.raises(MergebotError) as caught:
        operation()
    error = caught.value
    assert "\n" not in str(error) and "Traceback" not in str(error) and "http" not in str(error)
    return error


# -- without a server


@pytest.mark.parametrize(
    "name",
    ["gpt2", "../etc/passwd", "/etc/passwd", "a/b/c", "https://huggingface.co/a/b", "a/b.git", "a/..", "a/b--c", "",
     "a/", "C:\\x/y", "a/b\n", "ä/b", "a/" + "b" * 97],
)  # fmt: skip
def test_what_is_not_a_repo_id_is_refused_before_anything_is_asked(name: str, tmp_path: Path) -> None:
    hub = Hub("http://127.0.0.1:9")  # nothing listens there: asking would be HUB_UNAVAILABLE
    assert refusal(lambda: hub.resolve(name)).code == "NOT_A_REPO_ID"
    assert refusal(lambda: hub.download(name, "0" * 40, tmp_path / "x")).code == "NOT_A_REPO_ID"


def test_honest_repo_ids_pass() -> None:
    assert check_repo_id("HuggingFaceTB/SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "120"}, 120),
        ({"retry-after": "Fri, 02 Jan 2026 03:05:05 GMT"}, 60),
        ({"retry-after": "Fri, 02 Jan 2026 03:00:00 GMT"}, 0),
        ({"ratelimit": '"api";r=0;t=55', "retry-after": "7"}, 55),
        ({"ratelimit": '"api";r=9;t=55'}, None),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_the_wait_the_hub_asks_for_is_read(headers: dict[str, str], seconds: float | None) -> None:
    assert requested_wait_s(headers, NOW) == seconds


@given(st.text(max_size=40))
def test_any_retry_after_is_read_or_ignored_and_never_raises(text: str) -> None:
    found = requested_wait_s({"retry-after": text}, NOW)
    assert found is None or found >= 0


def test_a_hub_that_is_not_there_is_transient_and_named_in_time() -> None:
    waits: list[float] = []
    hub = Hub("http://127.0.0.1:9", deadline_s=600, sleep=waits.append)
    error = refusal(lambda: hub.resolve("alice/model"))
    assert isinstance(error, Transient) and error.code == "HUB_UNAVAILABLE" and "alice/model" in error.message
    assert len(waits) == 5  # six tries, doubling with jitter
    assert all(0.75 * 2**n <= wait <= 1.25 * 2**n for n, wait in enumerate(waits))


# -- against the local Hub


@pytest.mark.slow
def test_a_name_becomes_a_commit_with_the_licence_of_its_card(local_hub: RunningHub) -> None:
    hub, commit = published(local_hub)
    anyone = hub_of(local_hub)
    pinned = anyone.resolve(f"{ORG}/model")
    assert (pinned.repo, pinned.revision, pinned.licence) == (f"{ORG}/model", commit, "apache-2.0")
    assert (pinned.private, pinned.gated) == (False, False) and "mergebot" in pinned.tags
    hub.commit(f"{ORG}/model", {"README.md": b"---\nlicense: mit\n---\n"}, parent=commit, message="relicense")
    assert anyone.resolve(f"{ORG}/model", commit).licence == "apache-2.0"  # at the pinned commit, not today's
    assert anyone.resolve(f"{ORG}/model").licence == "mit"
    assert [repo.repo for repo in anyone.tagged("mergebot")] == []
    assert refusal(lambda: anyone.resolve(f"{ORG}/model", "v9")).code == "SOURCE_NOT_FOUND"
    assert refusal(lambda: anyone.resolve("alice/none")).code == "SOURCE_NOT_FOUND"


@pytest.mark.parametrize(
    ("written", "license"),
    [
        ("license: [apache-2.0]", "apache-2.0"), ("license: Apache-2.0", "apache-2.0"), ("license: [MIT, mit]", "mit"),
        ("license: [mit, apache-2.0]", "mit, apache-2.0"), ("license: []", None), ("tags: [x]", None),
        ("license: other\nlicense_name: Llama3\nlicense_link: LICENSE", "other (llama3)"), ("license: other", "other"),
    ],
)  # fmt: skip
def test_a_license_is_read_however_a_card_writes_it(written: str, license: str | None, local_hub: RunningHub) -> None:
    name = f"{ORG}/{hashlib.sha1(written.encode()).hexdigest()}"
    hub, _ = published(local_hub, name, README__md=f"---\n{written}\n---\n".encode())
    assert hub.resolve(name).licence == license


@pytest.mark.slow
def test_ranges_download_and_text_are_the_bytes_of_the_commit(local_hub: RunningHub, tmp_path: Path) -> None:
    _, commit = published(local_hub, **{"evil__py": b"import os", "pytorch_model__bin": b"pickle"})
    hub = hub_of(local_hub)
    files = hub.files(f"{ORG}/model", commit)
    assert files.sizes()["model.safetensors"] == len(WEIGHTS) and "evil.py" in files.sizes()
    assert files.sha256s()["model.safetensors"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert files.sha256s()["config.json"] is None
    for start, length in [(0, 8), (8, 1000), (262_140, 10), (500_000, 3), (699_990, 100), (0, 700_000), (5, 0)]:
        assert files.read("model.safetensors", start, length) == WEIGHTS[start : start + length], (start, length)
    assert hub.read_text(f"{ORG}/model", commit, "config.json", 10) == "{}"
    assert hub.read_text(f"{ORG}/model", commit, "absent.txt", 10) is None
    assert refusal(lambda: hub.read_text(f"{ORG}/model", commit, "README.md", 10)).code == "DOWNLOAD_TOO_LARGE"
    steps: list[tuple[int, int]] = []
    folder = hub.download(
        f"{ORG}/model", commit, tmp_path / "m", progress=lambda done, total, _: steps.append((done, total))
    )
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert steps == sorted(steps) and steps[-1] == (len(WEIGHTS) + 2, len(WEIGHTS) + 2)
    before = len(local_hub.journal())
    assert hub.download(f"{ORG}/model", commit, tmp_path / "m") == folder
    assert len(local_hub.journal()) == before  # complete: nothing is asked again
    tiny = refusal(lambda: hub.download(f"{ORG}/model", commit, tmp_path / "n", limit_bytes=1000))
    assert tiny.code == "DOWNLOAD_TOO_LARGE" and not (tmp_path / "n").exists()


@pytest.mark.slow
def test_only_the_shards_of_the_index_are_downloaded(local_hub: RunningHub, tmp_path: Path) -> None:
    index = b'{"metadata": {}, "weight_map": {"a": "part-1.safetensors", "b": "../../outside.safetensors"}}'
    _, commit = published(
        local_hub,
        **{"model__safetensors__index__json": index, "part-1__safetensors": b"1", "consolidated__safetensors": b"2"},
        model__safetensors=None,
    )
    folder = hub_of(local_hub).download(f"{ORG}/model", commit, tmp_path / "m")
    names = ["config.json", "model.safetensors.index.json", "part-1.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names


@pytest.mark.slow
def test_a_single_file_is_downloaded_and_not_the_shards_beside_it(local_hub: RunningHub, tmp_path: Path) -> None:
    index = b'{"metadata": {}, "weight_map": {"a": "part-1.safetensors"}}'
    files = {"model__safetensors__index__json": index, "part-1__safetensors": b"1", "model__safetensors": b"2"}
    _, commit = published(local_hub, **files)
    folder = hub_of(local_hub).download(f"{ORG}/model", commit, tmp_path / "m")
    assert (folder / "model.safetensors").read_bytes() == b"2"
    assert not (folder / "part-1.safetensors").exists()


@pytest.mark.slow
def test_publishing_is_one_commit_on_the_head_it_was_made_for(local_hub: RunningHub, tmp_path: Path) -> None:
    hub, name = hub_of(local_hub, "mergebot"), f"{ORG}/out"
    assert hub.head(name) is None
    hub.create_private(name)
    hub.create_private(name)  # a repeat is no error
    head = hub.head(name)
    assert head is not None and hub.resolve(name).private and list(hub.tree(name, head)) == [".gitattributes"]
    assert refusal(lambda: hub_of(local_hub).resolve(name)).code == "SOURCE_NOT_FOUND"
    big = tmp_path / "model-00001-of-00001.safetensors"
    big.write_bytes(os.urandom(6_000_000))  # above 5 MiB: sent in parts
    contents: dict[str, bytes | Path] = {
        "README.md": b"# Card\n",
        big.name: big,
        "results/x.json": b"{}",
        "empty.txt": b"",
    }
    assert list(hub.upload(name, contents)) == list(contents)
    puts = sum(entry["method"] == "PUT" for entry in local_hub.journal())
    assert list(hub.upload(name, contents)) == list(contents)
    commit = hub.commit(name, contents, parent=head, message="mergebot: publish", description="manifest")
    assert sum(entry["method"] == "PUT" for entry in local_hub.journal()) == puts  # repeats send nothing
    tree = hub.tree(name, commit)
    assert set(tree) == {*contents, ".gitattributes"}
    assert (tree[big.name].size, tree[big.name].sha256) == (6_000_000, hashlib.sha256(big.read_bytes()).hexdigest())
    assert tree["README.md"].blob_id == hashlib.sha1(b"blob 7\0# Card\n").hexdigest()
    stale = refusal(lambda: hub.commit(name, {"x.txt": b"1"}, parent=head, message="late"))
    assert isinstance(stale, Refused) and stale.code == "PUBLISH_CONFLICT" and hub.head(name) == commit
    hub.make_public(name)
    assert hub_of(local_hub).resolve(name).revision == commit
    assert len(commit) == 40 and local_hub.unknown() == []


@pytest.mark.slow
def test_answers_are_written_once_and_only_into_our_own_thread(local_hub: RunningHub) -> None:
    bob = hub_of(local_hub, "bob")
    bob.create_private("bob/request")
    bob.make_public("bob/request")
    title = "mergebot: request 0123456789ab"
    bob.open_discussion("bob/request", title, "I am not the bot\n\nref: mergebot/k/published")
    hub = hub_of(local_hub, "mergebot")
    assert hub.find_discussion("bob/request", title) is None  # a stranger's thread with our title is not ours
    number = hub.open_discussion("bob/request", title, "accepted")
    assert hub.find_discussion("bob/request", title) == number == 2
    bob.comment("bob/request", number, "me too", ref="mergebot/k/published")
    for _ in range(2):
        hub.comment("bob/request", number, "running", ref="mergebot/k/running")
        hub.close_discussion("bob/request", number, "published", ref="mergebot/k/published")
    events = local_hub_events(local_hub, number)
    assert [who for who, _ in events] == ["mergebot", "bob", "mergebot", "mergebot", "mergebot"]
    assert [text.split("\n")[0] for _, text in events] == ["accepted", "me too", "running", "published", "closed"]


def local_hub_events(running: RunningHub, number: int) -> list[tuple[str, str]]:
    thread = json.loads((running.root / f"repos/models/bob/request/discussions/{number}.json").read_text())
    return [
        (
            event["author"]["name"],
            event["data"]["latest"]["raw"] if event["type"] == "comment" else event["data"]["status"],
        )
        for event in thread["events"]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_passing_fault_is_sat_out_and_a_lasting_one_becomes_transient(local_hub: RunningHub, status: int) -> None:
    published(local_hub)
    waits: list[float] = []
    hub = hub_of(local_hub, waits=waits, deadline_s=600)
    passing = local_hub.faults.add("GET", f"/api/models/{ORG}/model", status=status, times=2)
    assert hub.resolve(f"{ORG}/model").repo == f"{ORG}/model"
    assert passing.seen == 3 and len(waits) == 2
    local_hub.faults.rules.clear()
    lasting = local_hub.faults.add("GET", f"/api/models/{ORG}/model/tree/*", status=status)
    error = refusal(lambda: hub.tree(f"{ORG}/model", "main"))  # a call the library would repeat by itself
    assert isinstance(error, Transient) and error.code == "HUB_UNAVAILABLE" and lasting.seen == 6


@pytest.mark.slow
def test_a_long_wait_is_not_slept_but_reported(local_hub: RunningHub) -> None:
    published(local_hub)
    waits: list[float] = []
    hub = hub_of(local_hub, waits=waits)
    rule = local_hub.faults.add("GET", "/api/models/*", status=429, headers={"Retry-After": "3600"})
    error = refusal(lambda: hub.resolve(f"{ORG}/model"))
    assert isinstance(error, Transient) and error.retry_after_s == 3600 and waits == [] and rule.seen == 1
    rule.headers = {"RateLimit": '"api";r=0;t=5', "Retry-After": "3600"}
    rule.times = 2
    assert hub.resolve(f"{ORG}/model") and waits == [5]


@pytest.mark.slow
@pytest.mark.parametrize("body", [b"<html>maintenance</html>", b"[]", b'{"id": "a/b"}', b"null", b""])
def test_an_answer_that_is_no_answer_is_tried_three_times(local_hub: RunningHub, body: bytes) -> None:
    rule = local_hub.faults.add("GET", "/api/models/*", status=200, body=body)
    error = refusal(lambda: hub_of(local_hub).resolve("alice/model"))
    assert isinstance(error, Transient) and error.code == "HUB_ANSWER_INVALID" and rule.seen == 3


@pytest.mark.slow
def test_a_write_is_never_repeated_blindly(local_hub: RunningHub) -> None:
    hub, commit = published(local_hub)
    name = f"{ORG}/model"
    lost = local_hub.faults.add("POST", f"/api/models/{name}/commit/main", lost=True)
    error = refusal(lambda: hub.commit(name, {"x.txt": b"1"}, parent=commit, message="lost answer"))
    assert isinstance(error, Transient) and error.code == "HUB_UNAVAILABLE" and lost.seen == 1
    assert "x.txt" in hub.tree(name, "main")  # it happened: the caller's look-up finds it
    local_hub.faults.rules.clear()
    before = local_hub.faults.add("POST", f"/api/models/{name}/preupload/main", status=503, times=2)
    head = hub.head(name)
    assert hub.commit(name, {"y.txt": b"1"}, parent=head, message="a fault before the commit left") != head
    assert before.seen == 3
    local_hub.faults.add("POST", "/api/models/*/discussions", status=503)
    assert refusal(lambda: hub.open_discussion(name, "a title", "text")).code == "HUB_UNAVAILABLE"
    assert local_hub.faults.rules[-1].seen == 1


@pytest.mark.slow
def test_a_token_without_rights_pauses_publishing_instead_of_failing_jobs(local_hub: RunningHub) -> None:
    published(local_hub)
    bob = hub_of(local_hub, "bob")
    error = refusal(lambda: bob.commit(f"{ORG}/model", {"x.txt": b"1"}, parent=None, message="no"))
    assert isinstance(error, Transient) and error.code == "PUBLISHING_PAUSED"
    assert refusal(lambda: bob.create_private(f"{ORG}/new")).code == "PUBLISHING_PAUSED"
    revoked = Hub(local_hub.url, "hf_revoked000000000000")
    assert refusal(lambda: list(revoked.upload(f"{ORG}/model", {"m.safetensors": b"1"}))).code == "PUBLISHING_PAUSED"


@pytest.mark.slow
def test_gated_and_private_sources_are_refused_by_name(local_hub: RunningHub, tmp_path: Path) -> None:
    _, commit = published(local_hub)
    hub = hub_of(local_hub)
    local_hub.client(f'api.update_repo_settings("{ORG}/model", gated="auto")', tmp_path / "home", "mergebot")
    assert hub.resolve(f"{ORG}/model").gated
    error = refusal(lambda: hub.download(f"{ORG}/model", commit, tmp_path / "m"))
    assert error.code == "SOURCE_GATED" and not (tmp_path / "m").exists()


@pytest.mark.slow
def test_flipped_bits_never_reach_the_merge(local_hub: RunningHub, tmp_path: Path) -> None:
    _, commit = published(local_hub)
    name, hub = f"{ORG}/model", hub_of(local_hub)
    for place in ("model.safetensors", "config.json"):  # one known by sha256, one by its git blob id
        once = local_hub.faults.add("GET", f"/{name}/resolve/{commit}/{place}", flip=True, times=1)
        folder = hub.download(name, commit, tmp_path / f"once-{place}")
        assert once.seen == 2 and (folder / "model.safetensors").read_bytes() == WEIGHTS
        local_hub.faults.rules.clear()
        always = local_hub.faults.add("GET", f"/{name}/resolve/{commit}/{place}", flip=True)
        error = refusal(lambda place=place: hub.download(name, commit, tmp_path / f"always-{place}"))
        assert isinstance(error, Transient) and error.code == "CORRUPT_DOWNLOAD" and place in error.message
        assert always.seen == 2 and not (tmp_path / f"always-{place}").exists()
        local_hub.faults.rules.clear()


@pytest.mark.slow
def test_a_cut_download_goes_on_where_it_stopped(local_hub: RunningHub, tmp_path: Path) -> None:
    _, commit = published(local_hub)
    name = f"{ORG}/model"
    cut = local_hub.faults.add("GET", f"/{name}/resolve/*/model.safetensors", cut_after=300_000, times=2)
    folder = hub_of(local_hub).download(name, commit, tmp_path / "m")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS and cut.seen == 3
    sent = [e["bytes"] for e in local_hub.journal() if e["path"].endswith("/resolve/" + commit + "/model.safetensors")]
    assert sent[-1] <= len(WEIGHTS) - 300_000


@pytest.mark.slow
def test_the_live_hub_is_never_asked(local_hub: RunningHub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever this process has imported and whatever its environment says: the address is the one given."""
    published(local_hub)
    away = local_hub.faults.add(
        "GET", f"/api/models/{ORG}/model", status=302, headers={"Location": "https://huggingface.co/api/models/a/b"}
    )
    with caplog.at_level(logging.DEBUG):
        error = refusal(lambda: hub_of(local_hub).resolve(f"{ORG}/model"))
    assert error.code == "HUB_ANSWER_INVALID" and away.seen == 3
    assert local_hub.token_of("mergebot") not in caplog.text


@pytest.mark.slow
def test_headers_of_a_checkpoint_cost_one_request_each(local_hub: RunningHub) -> None:
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    data = struct.pack("<Q", len(header)) + header + bytes(8)
    _, commit = published(local_hub, **{"model__safetensors": data})
    files = hub_of(local_hub).files(f"{ORG}/model", commit)
    files.sizes()
    before = len(local_hub.journal())
    assert files.read("model.safetensors", 0, 8) + files.read("model.safetensors", 8, len(header)) == data[:-8]
    assert len(local_hub.journal()) == before + 1


@pytest.mark.slow
def test_what_the_hub_refuses_for_good_is_not_tried_again(local_hub: RunningHub) -> None:
    hub, commit = published(local_hub)
    card = b"---\nlicense: [1, 2]\n---\n"
    error = refusal(lambda: hub.commit(f"{ORG}/model", {"README.md": card}, parent=commit, message="bad card"))
    assert isinstance(error, Failed) and "license" in error.message
    assert hub.head(f"{ORG}/model") == commit
