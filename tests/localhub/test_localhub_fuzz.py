"""Whatever is sent, the server answers like a server: never with a defect of its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bot.localhub import add_user, create_app
from bot.localhub.app import LocalHub
from tests.localhub.server import token_of

pytestmark = pytest.mark.slow
HEADERS = {"Authorization": f"Bearer {token_of('alice')}"}
WORDS = [
    "api", "models", "datasets", "spaces", "alice", "one", "one.git", "tree", "resolve", "main", "refs%2Fpr%2F1",
    "commit", "preupload", "settings", "discussions", "1", "comment", "status", "merge", "refs", "commits", "branch",
    "tag", "paths-info", "revision", "info", "lfs", "objects", "batch", "verify", "_lfs", "repos", "create",
    "delete", "move", "whoami-v2", "validate-yaml", "oauth", "token", "authorize", "README.md", "%2e%2e", "%00",
    "%C2%B2", "blob", "%ff",
]  # fmt: skip
WORDS += ["0" * 64, "9" * 30, ""]
SEGMENTS = st.sampled_from(WORDS) | st.text("abc%2Ff0./-", max_size=8)
KEYS = st.sampled_from([
    "name", "organization", "type", "visibility", "private", "gated", "files", "path", "sample", "size", "operation",
    "objects", "oid", "algo", "key", "value", "content", "encoding", "summary", "title", "comment", "status", "tag",
    "paths", "expand", "fromRepo", "toRepo", "parts", "description", "pullRequest", "repoType", "ref",
    "startingPoint", "parentCommit", "transfers", "sdk",
])  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=5)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4))
BODIES = st.binary(max_size=30) | st.dictionaries(KEYS, VALUES, max_size=6).map(
    lambda value: json.dumps(value).encode()
)
RECORDS = st.sampled_from(["header", "file", "lfsFile", "deletedFile", "deletedFolder", "other"])


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    root: Path = tmp_path_factory.mktemp("fuzzed")
    add_user(root, "alice", token_of("alice"))
    yield create_app(root)


def ask(app: LocalHub, method: str, path: str, body: bytes, kind: str = "application/json") -> int:
    async def once() -> int:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=HEADERS) as http:
            await http.post("/api/repos/create", json={"name": "one"})  # again, whenever the last example deleted it
            return (
                await http.request(
                    method, httpx.URL("http://127.0.0.1" + path), content=body, headers={"Content-Type": kind}
                )
            ).status_code

    # In a thread: another test of this process may have left an event loop running in this one.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, once()).result()


QUERIES = ["", "?p=²", "?cursor=-1", "?limit=x", "?expand=sha&expand=zzz", "?recursive=1&cursor=5", "?sort=q"]
FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(
    st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH"]), st.lists(SEGMENTS, max_size=9), BODIES,
    st.sampled_from(QUERIES),
)  # fmt: skip
def test_any_address_with_any_body_is_answered(
    app: LocalHub, method: str, segments: list[str], body: bytes, query: str
) -> None:
    assert ask(app, method, "/" + "/".join(segments) + query, body) < 500


ADDRESSES = [
    ("POST", "/api/repos/create"), ("POST", "/api/repos/move"), ("DELETE", "/api/repos/delete"),
    ("PUT", "/api/models/alice/one/settings"), ("POST", "/api/models/alice/one/preupload/main"),
    ("POST", "/api/models/alice/one/paths-info/main"), ("POST", "/alice/one.git/info/lfs/objects/batch"),
    ("POST", "/alice/one.git/info/lfs/verify"), ("POST", "/api/models/alice/one/discussions"),
    ("POST", "/api/models/alice/one/discussions/1/comment"), ("POST", "/api/models/alice/one/discussions/1/status"),
    ("POST", "/api/models/alice/one/discussions/1/title"), ("POST", "/api/models/alice/one/discussions/1/merge"),
    ("POST", "/api/models/alice/one/tag/main"), ("POST", "/api/models/alice/one/branch/x"),
    ("POST", "/api/validate-yaml"), ("POST", "/oauth/token"), ("POST", "/api/models/alice/one/commit/main"),
]  # fmt: skip


@FUZZ
@given(st.sampled_from(ADDRESSES), BODIES)
def test_any_body_at_a_real_address_is_answered(app: LocalHub, address: tuple[str, str], body: bytes) -> None:
    assert ask(app, *address, body) < 500


@FUZZ
@given(st.lists(st.tuples(RECORDS, st.dictionaries(KEYS, VALUES, max_size=5)), max_size=4))
def test_any_commit_is_made_or_refused(app: LocalHub, records: list[tuple[str, dict[str, Any]]]) -> None:
    lines = [{"key": "header", "value": {"summary": "x"}}, *({"key": key, "value": value} for key, value in records)]
    body = "\n".join(json.dumps(line) for line in lines).encode()
    assert ask(app, "POST", "/api/models/alice/one/commit/main", body) in (200, 400, 404)
