"""Parts of the local Hub that need no server: names, cards, blobs, seeding, users, the journal."""

from __future__ import annotations

import hashlib
import json
import struct
import time
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bot.localhub import add_user, seed
from bot.localhub.answers import HubError, stamp
from bot.localhub.blobs import Blobs, git_blob_id, lfs_pointer
from bot.localhub.info import describe
from bot.localhub.journal import Journal
from bot.localhub.metadata import card_data, complaints, parameter_counts, split_card, tags
from bot.localhub.names import is_number, repo_id, valid_path, valid_ref, valid_segment
from bot.localhub.page import markdown
from bot.localhub.routing import Routes
from bot.localhub.storage import RepoId, Store
from bot.localhub.users import Users
from bot.storage import write_atomic


@given(st.text(max_size=60))
def test_an_accepted_path_stays_below_its_repo(path: str) -> None:
    if valid_path(path):
        pure = PurePosixPath(path)
        assert not pure.is_absolute() and ".." not in pure.parts and str(pure) == path and "\0" not in path


@given(st.text(max_size=100))
def test_an_accepted_name_is_one_plain_folder(text: str) -> None:
    if valid_segment(text):
        assert PurePosixPath(text).name == text and text.isascii() and text not in (".", "..")
    if valid_ref(text):
        assert ".." not in text and text.isascii()
    if is_number(text):
        assert int(text) >= 0


@pytest.mark.parametrize(
    "name", ["api", "oauth", "datasets", "..", "a--b", "a.git", "-a", "", "a b", "a" * 97, ".hidden"]
)
def test_names_that_would_hide_something_else_are_refused(name: str) -> None:
    with pytest.raises(HubError) as caught:
        repo_id("models", name, "x")
    assert caught.value.status == 400


@given(st.text(max_size=300))
def test_any_card_is_read_or_refused_and_never_crashes(text: str) -> None:
    for card in (text, f"---\n{text}\n---\nbody"):
        data = card_data(card)
        assert data is None or isinstance(json.loads(json.dumps(data)), dict)
        assert isinstance(complaints(card), list)


BOMBS = {
    "aliases": "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b,*b,*b,*b,*b,*b]",
    "depth": "[" * 60_000,
    "width": "x: [" + "a," * 120_000 + "]",
    "tags": "x: !!python/object/apply:os.system [true]",
    "size": "x: " + "a" * 300_000,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_card_made_to_hurt_is_refused_quickly(bomb: str) -> None:
    started = time.process_time()
    found = complaints(f"---\n{BOMBS[bomb]}\n---\n")
    assert found and time.process_time() - started < 1


def test_card_metadata_becomes_the_tags_a_filter_matches() -> None:
    card = "---\nlicense: mit\ntags: [merge]\nbase_model: [o/a, o/b]\nbase_model_relation: merge\nlanguage: en\n---\nHi"
    data = card_data(card)
    assert data is not None and split_card(card)[1] == "Hi"
    found = tags(data, {"model_type": "llama"}, ["model.safetensors"])
    assert found == [
        "safetensors", "llama", "merge", "en", "base_model:o/a", "base_model:merge:o/a", "base_model:o/b",
        "base_model:merge:o/b", "license:mit", "region:us",
    ]  # fmt: skip
    dated = card_data("---\nwhen: 2024-01-01\nnan: .nan\n---\n")
    assert dated == {"when": "2024-01-01", "nan": None}


@given(st.binary(max_size=200))
def test_any_bytes_called_safetensors_are_counted_or_passed_over(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("weights") / "x.safetensors"
    path.write_bytes(data)
    assert isinstance(parameter_counts(path), tuple)


def test_parameters_are_counted_from_the_header(tmp_path: Path) -> None:
    header = json.dumps({
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]},
    }).encode()  # fmt: skip
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(34))
    assert parameter_counts(path) == (("BF16", 5), ("F32", 6))


def test_blob_ids_are_those_of_git() -> None:
    assert git_blob_id(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object
    assert lfs_pointer("a" * 64, 5).endswith(b"\nsize 5\n")


def test_a_blob_appears_whole_and_right_or_not_at_all(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    digest = hashlib.sha256(b"right").hexdigest()
    for sent in (b"wrong", b"righ", b"rights"):
        with pytest.raises(HubError):
            blobs.store([sent], digest, 5)
        assert not blobs.has(digest) and not list(blobs.incoming.iterdir())
    blobs.store([b"ri", b"ght"], digest, 5)
    assert blobs.path(digest).read_bytes() == b"right"


def test_parts_may_arrive_in_any_order_and_twice(tmp_path: Path) -> None:
    blobs, data = Blobs(tmp_path), bytes(range(100))
    digest = hashlib.sha256(data).hexdigest()
    for offset in (50, 0, 50):
        blobs.write_part("upload", offset, data[offset : offset + 50])
    blobs.finish_parts("upload", digest, 100)
    blobs.finish_parts("upload", digest, 100)  # the answer was lost: completing again is no error
    assert blobs.path(digest).read_bytes() == data
    blobs.write_part("other", 50, data[50:])
    with pytest.raises(HubError):
        blobs.finish_parts("other", "0" * 64, 100)


def test_writing_replaces_in_one_step_and_leaves_nothing_behind(tmp_path: Path) -> None:
    write_atomic(tmp_path / "x.json", b"old")
    write_atomic(tmp_path / "x.json", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x.json", b"new")]


def test_seeding_twice_makes_one_commit_and_the_same_one_everywhere(tmp_path: Path) -> None:
    folder = tmp_path / "content" / "datasets" / "org" / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "sub" / "x.parquet").write_bytes(b"PAR1\0")
    (folder / "empty.txt").touch()
    assert seed(tmp_path / "hub", tmp_path / "content") == ["datasets/org/data"]
    assert seed(tmp_path / "hub", tmp_path / "content") == ["datasets/org/data"]
    store, repo = Store(tmp_path / "hub"), RepoId("datasets", "org", "data")
    head = store.at(repo, "main")
    assert [past.title for past in store.history(repo, head.oid)] == ["Add files", "initial commit"]
    assert set(head.files) == {".gitattributes", "README.md", "sub/x.parquet", "empty.txt"}
    assert head.files["sub/x.parquet"].sha256 == hashlib.sha256(b"PAR1\0").hexdigest()
    found = store.find(repo)
    assert found is not None and describe(store, found, head)["tags"] == ["license:mit", "region:us"]


def test_commit_ids_follow_from_content_and_clock_alone(tmp_path: Path) -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, 678_900, tzinfo=UTC)
    assert stamp(moment) == "2026-01-02T03:04:05.678Z"
    repo = RepoId("models", "a", "b")
    ids = set()
    for name in ("one", "two"):
        store = Store(tmp_path / name, clock=lambda: moment, new_id=lambda: "0" * 24)
        store.create(repo, author="a", private=False)
        ids.add(store.resolve(repo, "main"))
    assert len(ids) == 1


def test_users_added_by_another_process_are_seen_and_tokens_are_only_hashes(tmp_path: Path) -> None:
    users = Users(tmp_path)
    assert users.visitor(None).name is None
    add_user(tmp_path, "alice", "hf_secretOfAlice", orgs=["club"])
    assert users.visitor("Bearer hf_secretOfAlice").name == "alice" and users.orgs_of("alice") == {"club": "admin"}
    add_user(tmp_path, "bob", "hf_secretOfBob", role="read")
    assert users.visitor("Bearer hf_secretOfBob").role == "read"
    assert "hf_secret" not in (tmp_path / "users.json").read_text()
    with pytest.raises(HubError):
        users.visitor("Bearer hf_wrong")


def test_the_journal_goes_on_after_a_line_cut_by_a_kill(tmp_path: Path) -> None:
    (tmp_path / "journal.ndjson").write_bytes(b'{"number": 7, "path": "/x"}\n{"number": 8, "pa')
    journal = Journal(tmp_path)
    journal.record(time="t", method="GET", path="/y", user=None, status=200, sent_bytes=3)
    lines = (tmp_path / "journal.ndjson").read_bytes().splitlines()
    assert json.loads(lines[-1])["number"] == 8 and json.loads(lines[-1])["path"] == "/y"


def test_a_quoted_segment_is_one_segment() -> None:
    routes = Routes()

    @routes.add("GET", "/api/{kind}/{ns}/{name}/tree/{rev}/{path*}")
    def tree(call: object) -> object:
        raise NotImplementedError

    found = routes.match("GET", b"/api/models/a/b/tree/refs%2Fpr%2F1/sub%2Fd")
    assert found is not None and found[1]["rev"] == "refs/pr/1" and found[1]["path"] == "sub/d"
    assert routes.match("GET", b"/api/other/a/b/tree/x/y") is None


@given(st.text(max_size=200))
def test_markdown_of_strangers_brings_no_element_that_acts(text: str) -> None:
    rendered = markdown(text + "\n\n<script>x</script>\n\n[a](javascript:x) ![b](http://c/d.png)").lower()
    for element in ("<script", "<img", "<iframe", "<style", "<form", "<input", 'href="javascript:'):
        assert element not in rendered


def test_only_pictures_of_the_repo_are_shown_and_links_to_its_files_lead_to_them() -> None:
    files = {path: f"/o/r/resolve/1/{path}" for path in ("results/a.svg", "b.PNG", "notes.md", "x.html")}
    shown = markdown("![one](results/a.svg) ![two](./b.PNG?v=1 'said') [notes](notes.md)", files)
    assert '<img src="/o/r/resolve/1/results/a.svg" alt="one"' in shown
    assert '<img src="/o/r/resolve/1/b.PNG" alt="two" title="said"' in shown
    assert '<a href="/o/r/resolve/1/notes.md">notes</a>' in shown
    elsewhere = ("../results/a.svg", "/results/a.svg", "http://c/results/a.svg", "//c/b.PNG")
    for source in ("x.html", "gone.png", *elsewhere):
        rendered = markdown(f"![<b>]({source})", files)
        assert "<img" not in rendered and f'<a href="{source}">&lt;b&gt;</a>' in rendered
    assert markdown("[![x](gone.png)](notes.md)", files).count("<a ") == 1
    assert "<img" not in markdown("![one](results/a.svg)")


def test_a_table_keeps_the_cells_that_hold_a_bar() -> None:
    rendered = markdown("| a | b |\n|---|---:|\n| `x\\|y` | p\\|q |\n")
    assert "<td><code>x|y</code></td>" in rendered and ">p|q</td>" in rendered
