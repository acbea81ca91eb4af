"""Fetching parts of a repo: only what a plan reads, several requests at once, resumable, and never silently wrong."""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bot.errors import Refused, Transient
from bot.hub import Hub, is_partial
from bot.hub.ranges import chunks, without
from bot.localhub import seed
from bot.merge.checkpoints import checkpoint
from bot.merge.execution import engine
from bot.merge.planning import byte_ranges, plan, planner
from bot.merge.recipe import reading as recipe
from bot.merge.recipe.spec import ModelRef
from tests.hub.test_hub_client import hub_of, published, refusal
from tests.localhub.server import ORG, REPO, RunningHub, running_hub
from tests.merge.tiny_checkpoints import llama_tensors, save

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
NAME, FILE = f"{ORG}/model", "model.safetensors"
SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda pair: (min(pair), max(pair))), max_size=6)
EIGHT_OF_32 = """merge_method: passthrough
slices:
- sources: [{model: deep/model, layer_range: [12, 20]}]
dtype: bfloat16
"""


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    """A Hub with `deep/model`: 32 layers of 2 MiB in one file (which orders them 0, 1, 10, 11, 12, ...)."""
    folder = tmp_path_factory.mktemp("deep")
    content = folder / "content" / "models" / "deep" / "model"
    save(content, llama_tensors(0, layers=32, hidden=512), dtype=torch.bfloat16, shards=1)
    with running_hub(folder / "hub") as running:
        seed(running.root, folder / "content")
        yield running


def served(running: RunningHub, since: int = 0) -> int:
    """Bytes of file contents the Hub has sent since its request number `since`."""
    return sum(entry["bytes"] for entry in running.journal()[since:] if "/resolve/" in entry["path"])


def planned(hub: Hub, text: str = EIGHT_OF_32) -> plan.Plan:
    asked = recipe.parse(text)
    [source] = asked.sources
    pinned = ModelRef(source.path, hub.resolve(source.path).revision)
    assert pinned.revision is not None
    opened = checkpoint.open_checkpoint(hub.files(source.path, pinned.revision))
    return planner.make(asked.pinned({source: pinned}), {pinned: opened})


# -- without a server


@given(SPANS, SPANS)
def test_what_is_missing_is_what_was_wanted_and_is_not_held(
    wanted: list[tuple[int, int]], held: list[tuple[int, int]]
) -> None:
    def points(spans: list[tuple[int, int]]) -> set[int]:
        return {at for start, end in spans for at in range(start, end)}

    found = without(wanted, held)
    assert points(found) == points(wanted) - points(held)
    assert all(start < end for start, end in found)


@given(SPANS, st.integers(1, 20))
def test_requests_cover_a_range_once_and_none_is_too_large(spans: list[tuple[int, int]], most: int) -> None:
    cut = chunks(spans, most)
    assert [at for start, end in cut for at in range(start, end)] == [at for s, e in spans for at in range(s, e)]
    assert all(0 < end - start <= most for start, end in cut)


@given(SPANS, st.integers(0, 20))
def test_bridging_keeps_every_byte_and_only_adds_small_gaps(spans: list[tuple[int, int]], gap: int) -> None:
    found = byte_ranges.bridged(spans, gap)
    assert without(spans, list(found)) == []
    assert all(after[0] - before[1] >= max(gap, 1) for before, after in itertools.pairwise(found))
    assert all(after - before < gap for before, after in without(list(found), spans))


# -- against the local Hub


@pytest.mark.slow
def test_eight_layers_of_thirty_two_move_eight_layers(deep: RunningHub, tmp_path: Path) -> None:
    hub = hub_of(deep)
    made = planned(hub)
    [(ref, wanted)] = byte_ranges.needed(made).items()
    layer = 2 * (4 * 512 * 512 + 3 * 12 * 512 + 2 * 512)
    before = len(deep.journal())
    verified = hub.fetch(ref.path, str(ref.revision), tmp_path / "part", wanted)
    moved = served(deep, before)
    assert 8 * layer < moved < 9 * layer
    assert {verified[name] for name in verified if name.endswith(".safetensors")} == {"ranges"}
    assert verified["config.json"] == "git"
    merged = engine.merge(made, {ref: tmp_path / "part"}, tmp_path / "from-part")
    whole = hub.download(ref.path, str(ref.revision), tmp_path / "whole")
    again = engine.merge(made, {ref: whole}, tmp_path / "from-whole")
    assert merged.files["model.safetensors"] == again.files["model.safetensors"]
    on_disk = sum(path.stat().st_blocks * 512 for path in (tmp_path / "part").iterdir())
    assert on_disk < 9 * layer + 200_000


@pytest.mark.slow
def test_a_later_plan_adds_to_what_an_earlier_one_left(deep: RunningHub, tmp_path: Path) -> None:
    hub, into = hub_of(deep), tmp_path / "part"
    layer = 2 * (4 * 512 * 512 + 3 * 12 * 512 + 2 * 512)
    for text, least, most in (
        (EIGHT_OF_32, 8, 9),
        (EIGHT_OF_32, 0, 0.1),  # nothing is asked twice
        (EIGHT_OF_32.replace("[12, 20]", "[10, 20]"), 4, 4.2),  # 10 and 11; 0 and 1 are bridged
    ):
        [(ref, wanted)] = byte_ranges.needed(planned(hub, text)).items()
        before = len(deep.journal())
        hub.fetch(ref.path, str(ref.revision), into, wanted)
        assert least * layer <= served(deep, before) < most * layer, text
    all_of_it = planned(hub, EIGHT_OF_32.replace("[12, 20]", "[0, 32]"))
    [(ref, wanted)] = byte_ranges.needed(all_of_it).items()
    verified = hub.fetch(ref.path, str(ref.revision), into, wanted)
    assert {verified[name] for name in verified if name.endswith(".safetensors")} == {"sha256"}
    assert is_partial(into)


CHILD = """
import sys
from pathlib import Path
from bot.hub import Hub
url, revision, into = sys.argv[1:4]
Hub(url).fetch("deep/model", revision, Path(into), eval(sys.argv[4]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 2])
def test_a_killed_fetch_asks_only_for_the_rest(deep: RunningHub, tmp_path: Path, after: int) -> None:
    hub, into = hub_of(deep), tmp_path / "part"
    [(ref, wanted)] = byte_ranges.needed(planned(hub, EIGHT_OF_32.replace("[12, 20]", "[0, 32]"))).items()
    large = {name: spans for name, spans in wanted.items() if name.endswith(".safetensors")}
    command = [sys.executable, "-c", CHILD, deep.url, str(ref.revision), str(into), repr(large)]
    environment = {**deep.env(tmp_path / "home"), "MERGEBOT_CRASH_AT": f"download.after_range:{after}"}
    assert subprocess.run(command, env=environment, cwd=REPO, check=False).returncode == -signal.SIGKILL
    lines = [line for path in (into / ".ranges").iterdir() for line in path.read_text().splitlines()[1:]]
    kept = [json.loads(line.rpartition(" ")[0]) for line in lines]
    assert len(kept) >= after
    with next(path for path in (into / ".ranges").iterdir()).open("ab") as torn:
        torn.write(b'{"start": 0, "end": 99')
    told: list[int] = []
    hub.fetch(ref.path, str(ref.revision), into, large, progress=lambda done, total, _: told.append(done))
    assert told[0] > sum(entry["end"] - entry["start"] for entry in kept) > 0
    assert told[-1] == byte_ranges.total_bytes({ref: large})
    source = deep.root.parent / "content" / "models" / "deep" / "model"
    for name, spans in large.items():
        with (into / name).open("rb") as got, (source / name).open("rb") as right:
            for start, end in spans:
                got.seek(start)
                right.seek(start)
                assert got.read(end - start) == right.read(end - start)


@pytest.mark.slow
def test_what_rots_on_our_disk_is_fetched_again(local_hub: RunningHub, tmp_path: Path) -> None:
    _, commit = published(local_hub)
    hub, into = hub_of(local_hub), tmp_path / "part"
    hub.fetch(NAME, commit, into, {FILE: [(1000, 2000), (500_000, 600_000)]})
    before = (into / FILE).read_bytes()
    spoilt = bytearray(before)
    spoilt[550_000] ^= 1
    (into / FILE).write_bytes(spoilt)
    number = len(local_hub.journal())
    hub.fetch(NAME, commit, into, {FILE: [(500_000, 600_000)]})
    assert served(local_hub, number) == 100_000
    assert (into / FILE).read_bytes() == before


@pytest.mark.slow
def test_where_most_is_needed_the_whole_file_is_fetched_and_its_hash_checked(
    local_hub: RunningHub, tmp_path: Path
) -> None:
    _, commit = published(local_hub)
    hub = hub_of(local_hub)
    wanted = {FILE: [(0, 100), (100_000, 700_000)]}
    assert hub.fetch(NAME, commit, tmp_path / "a", wanted) == {FILE: "sha256"}
    local_hub.faults.add("GET", f"/{NAME}/resolve/{commit}/{FILE}", flip=True, times=1)
    assert hub.fetch(NAME, commit, tmp_path / "b", wanted) == {FILE: "sha256"}
    assert (tmp_path / "b" / FILE).read_bytes() == (tmp_path / "a" / FILE).read_bytes()
    always = local_hub.faults.add("GET", f"/{NAME}/resolve/{commit}/{FILE}", flip=True)
    error = refusal(lambda: hub.fetch(NAME, commit, tmp_path / "c", wanted))
    assert isinstance(error, Transient) and error.code == "CORRUPT_DOWNLOAD" and always.seen == 2


@pytest.mark.slow
def test_a_source_that_changed_under_way_is_noticed(local_hub: RunningHub, tmp_path: Path) -> None:
    _, commit = published(local_hub)
    hub = hub_of(local_hub)
    other = "0" * 64
    right = {"Content-Range": "bytes 0-99/700000", "X-Repo-Commit": commit}
    for headers in (
        {**right, "ETag": f'"{other}"'},
        {**right, "ETag": "x", "X-Linked-Etag": f'"{other}"'},
        {**right, "X-Repo-Commit": "f" * 40, "ETag": f'"{other}"'},
    ):
        rule = local_hub.faults.add("GET", f"/{NAME}/resolve/*", status=206, body=bytes(100), headers=headers)
        error = refusal(lambda: hub.fetch(NAME, commit, tmp_path / "m", {FILE: [(0, 100)]}))
        assert isinstance(error, Refused) and error.code == "SOURCE_CHANGED_OR_GONE" and FILE in error.message
        assert rule.seen == 1
        local_hub.faults.rules.clear()
    for asked in ({"gone.safetensors": [(0, 8)]}, {FILE: [(0, 700_001)]}):
        error = refusal(lambda asked=asked: hub.fetch(NAME, commit, tmp_path / "m", asked))
        assert error.code == "SOURCE_CHANGED_OR_GONE"


@pytest.mark.slow
def test_a_hub_that_sends_something_else_is_never_believed(local_hub: RunningHub, tmp_path: Path) -> None:
    _, commit = published(local_hub)
    hub = hub_of(local_hub)
    etag = {"ETag": f'"{hub.files(NAME, commit).sha256s()[FILE]}"'}
    named = {**etag, "Content-Range": "bytes 5-104/700000"}
    for status, body, headers in (
        (206, bytes(300), named),  # more than asked
        (206, bytes(90), named),  # less
        (200, bytes(100), etag),  # not the range
        (206, bytes(100), etag),  # no word about the range
        (206, bytes(100), {**etag, "Content-Range": "bytes 0-99/700000"}),
        (206, bytes(100), {**etag, "Content-Range": "bytes 5-104/700001"}),
        (206, bytes(100), {"Content-Range": "bytes 5-104/700000"}),  # no word about the file
    ):
        rule = local_hub.faults.add("GET", f"/{NAME}/resolve/*", status=status, body=body, headers=headers)
        error = refusal(lambda: hub.fetch(NAME, commit, tmp_path / "m", {FILE: [(5, 105)]}))
        assert isinstance(error, Transient) and error.code == "HUB_ANSWER_INVALID", (status, headers)
        assert rule.seen == 3
        local_hub.faults.rules.clear()
    hub.fetch(NAME, commit, tmp_path / "m", {FILE: [(5, 105)]})


@pytest.mark.slow
def test_a_cut_range_goes_on_where_it_stopped(local_hub: RunningHub, tmp_path: Path) -> None:
    _, commit = published(local_hub)
    cut = local_hub.faults.add("GET", f"/{NAME}/resolve/*/{FILE}", cut_after=200_000, times=2)
    hub_of(local_hub).fetch(NAME, commit, tmp_path / "m", {FILE: [(100_000, 600_000)]})
    sent = [entry["bytes"] for entry in local_hub.journal() if entry["path"].endswith(FILE)]
    assert cut.seen == 3 and sent[-1] <= 300_000
    content = random.Random(0).randbytes(700_000)
    assert (tmp_path / "m" / FILE).read_bytes()[100_000:600_000] == content[100_000:600_000]


@pytest.mark.slow
def test_only_what_is_missing_counts_against_the_limit(local_hub: RunningHub, tmp_path: Path) -> None:
    _, commit = published(local_hub)
    hub = hub_of(local_hub)
    hub.fetch(NAME, commit, tmp_path / "m", {FILE: [(0, 1000)]}, limit_bytes=1000)
    hub.fetch(NAME, commit, tmp_path / "m", {FILE: [(0, 1900)]}, limit_bytes=1000)
    error = refusal(lambda: hub.fetch(NAME, commit, tmp_path / "m", {FILE: [(0, 2901)]}, limit_bytes=1000))
    assert error.code == "DOWNLOAD_TOO_LARGE"
