"""What the server refuses, and what it says: raw HTTP, so that a polite client cannot hide a gap."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from joserfc import jwt
from joserfc.jwk import KeySet

from bot.localhub import add_user
from bot.localhub.names import RepoId
from bot.localhub.users import Users
from tests.localhub.server import RunningHub, hub_process

pytestmark = pytest.mark.slow


def client(hub: RunningHub, user: str | None = None, token: str | None = None) -> httpx.Client:
    token = token or (hub.token_of(user) if user else None)
    return httpx.Client(base_url=hub.url, headers={"Authorization": f"Bearer {token}"} if token else {}, timeout=20)


def make_repo(http: httpx.Client, name: str, kind: str = "model", **more: Any) -> None:
    owner, _, short = name.partition("/")
    answer = http.post("/api/repos/create", json={"name": short, "organization": owner, "type": kind, **more})
    assert answer.status_code == 200, answer.text


def commit(http: httpx.Client, name: str, *records: dict[str, Any], parent: str | None = None) -> httpx.Response:
    header = {"summary": "change", **({"parentCommit": parent} if parent else {})}
    lines = [{"key": "header", "value": header}, *records]
    body = "\n".join(json.dumps(line) for line in lines)
    return http.post(f"/api/models/{name}/commit/main", content=body, headers={"Content-Type": "application/x-ndjson"})


def small(path: str, data: bytes) -> dict[str, Any]:
    content = base64.b64encode(data).decode()
    return {"key": "file", "value": {"path": path, "content": content, "encoding": "base64"}}


def upload(http: httpx.Client, name: str, data: bytes, announce: bytes | None = None) -> int:
    """Send one large object the way the client does; the status of the upload."""
    told = announce if announce is not None else data
    oid = hashlib.sha256(told).hexdigest()
    answer = http.post(
        f"/{name}.git/info/lfs/objects/batch",
        json={"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": len(told)}],
              "ref": {"name": "main"}},
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    actions = answer.json()["objects"][0].get("actions")
    return 200 if actions is None else httpx.put(actions["upload"]["href"], content=data).status_code


def large(path: str, data: bytes) -> dict[str, Any]:
    oid = hashlib.sha256(data).hexdigest()
    return {"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": oid, "size": len(data)}}


def test_each_kind_of_visitor_sees_and_changes_only_what_is_theirs(local_hub: RunningHub) -> None:
    add_user(local_hub.root, "alice", "hf_aliceReads", role="read")
    add_user(local_hub.root, "alice", "hf_aliceFine", role="fineGrained", namespaces=["elsewhere"])
    add_user(local_hub.root, "bob", None, orgs=["club"])
    visitors = {
        "nobody": client(local_hub),
        "bob": client(local_hub, "bob"),
        "alice": client(local_hub, "alice"),
        "alice reading": client(local_hub, token="hf_aliceReads"),
        "alice elsewhere": client(local_hub, token="hf_aliceFine"),
        "unknown token": client(local_hub, token="hf_nobodyHasThis"),
    }
    make_repo(visitors["alice"], "alice/secret", visibility="private")
    make_repo(visitors["alice"], "alice/open")

    def statuses(call: Any) -> dict[str, int]:
        return {name: call(http).status_code for name, http in visitors.items()}

    reading = statuses(lambda http: http.get("/api/models/alice/secret"))
    assert reading == {
        "nobody": 401, "bob": 404, "alice": 200, "alice reading": 200, "alice elsewhere": 200, "unknown token": 401,
    }  # fmt: skip
    codes = {name: http.get("/api/models/alice/secret").headers.get("x-error-code") for name, http in visitors.items()}
    assert codes["nobody"] == codes["bob"] == "RepoNotFound" and codes["unknown token"] is None
    assert statuses(lambda http: http.get("/alice/secret/resolve/main/.gitattributes")) == reading
    assert statuses(lambda http: http.get("/api/models/alice/secret/tree/main")) == reading
    assert statuses(lambda http: http.get("/api/models/alice/secret/discussions")) == reading

    writing = {
        "nobody": 401, "bob": 403, "alice": 200, "alice reading": 403, "alice elsewhere": 403, "unknown token": 401,
    }  # fmt: skip
    assert statuses(lambda http: commit(http, "alice/open", small("x.txt", b"1"))) == writing
    assert statuses(lambda http: http.put("/api/models/alice/open/settings", json={"visibility": "public"})) == writing
    assert statuses(lambda http: http.post("/api/models/alice/open/tag/main", json={"tag": "v1"})) == writing
    batch = {"operation": "upload", "objects": [{"oid": "0" * 64, "size": 1}], "ref": {"name": "main"}}
    assert statuses(lambda http: http.post("/alice/open.git/info/lfs/objects/batch", json=batch)) == writing
    delete = {"name": "open", "organization": "alice", "type": "model"}
    others = {name: http for name, http in visitors.items() if name != "alice"}
    refused = {
        name: http.request("DELETE", "/api/repos/delete", json=delete).status_code for name, http in others.items()
    }
    assert refused == {name: status for name, status in writing.items() if name != "alice"}
    assert visitors["bob"].post("/api/repos/create", json={"name": "x", "organization": "alice"}).status_code == 403
    assert visitors["bob"].post("/api/repos/create", json={"name": "x", "organization": "club"}).status_code == 200
    listed = {
        name: http.get("/api/models?author=alice").json() for name, http in visitors.items() if "unknown" not in name
    }
    assert {name: len(found) for name, found in listed.items()} == {
        "nobody": 1, "bob": 1, "alice": 2, "alice reading": 2, "alice elsewhere": 2,
    }  # fmt: skip


def test_a_gated_repo_shows_itself_and_keeps_its_files(local_hub: RunningHub) -> None:
    alice, bob = client(local_hub, "alice"), client(local_hub, "bob")
    make_repo(alice, "alice/gated")
    assert alice.put("/api/models/alice/gated/settings", json={"gated": "auto"}).status_code == 200
    path = "/alice/gated/resolve/main/.gitattributes"
    answers = [client(local_hub).get(path), bob.get(path), alice.get(path)]
    assert [answer.status_code for answer in answers] == [401, 403, 200]
    assert [answer.headers.get("x-error-code") for answer in answers] == ["GatedRepo", "GatedRepo", None]
    assert bob.get("/api/models/alice/gated").json()["gated"] == "auto"
    Users(local_hub.root).grant(RepoId("models", "alice", "gated"), "bob")
    assert bob.get(path).status_code == 200


def test_a_large_file_is_only_for_the_repo_it_was_sent_to(local_hub: RunningHub) -> None:
    """Otherwise a sha256 seen anywhere would copy the content out of a private repo."""
    alice, bob = client(local_hub, "alice"), client(local_hub, "bob")
    make_repo(alice, "alice/secret", visibility="private")
    make_repo(bob, "bob/mine")
    data = b"private weights"
    assert upload(alice, "alice/secret", data) == 200
    assert commit(alice, "alice/secret", large("m.safetensors", data)).status_code == 200
    assert commit(bob, "bob/mine", large("m.safetensors", data)).status_code == 400
    assert upload(bob, "bob/mine", b"something else!", announce=data) == 400
    assert commit(bob, "bob/mine", large("m.safetensors", data)).status_code == 400
    assert upload(bob, "bob/mine", data) == 200
    assert commit(bob, "bob/mine", large("m.safetensors", data)).status_code == 200


def test_an_upload_with_the_wrong_bytes_or_a_forged_ticket_is_refused(local_hub: RunningHub) -> None:
    alice = client(local_hub, "alice")
    make_repo(alice, "alice/one")
    assert upload(alice, "alice/one", b"bytes", announce=b"other") == 400
    assert upload(alice, "alice/one", b"too many bytes", announce=b"few") == 400
    assert upload(alice, "alice/one", b"few", announce=b"many more bytes") == 400
    batch = {"operation": "upload", "objects": [{"oid": "0" * 64, "size": 5}], "ref": {"name": "main"}}
    href = alice.post("/alice/one.git/info/lfs/objects/batch", json=batch).json()["objects"][0]["actions"]["upload"][
        "href"
    ]
    assert httpx.put(href.replace("0" * 64, "1" * 64), content=b"12345").status_code == 403
    assert httpx.put(href.replace("/5/", "/6/"), content=b"12345").status_code == 403
    assert httpx.put(href[:-4] + "0000", content=b"12345").status_code == 403
    left = [path for path in (local_hub.root / "blobs").rglob("*") if path.is_file()]
    assert left == []


HOSTILE_PATHS = [
    "../outside", "/etc/passwd", "a/../../b", "./a", "a//b", "C:/windows", "a\\b", ".git/config", "sub/.GIT/hooks",
    "nul\0byte", "line\nbreak", "\u202egnp.exe", "", "x" * 2000, "a/", "..",
]  # fmt: skip


def test_no_path_in_a_commit_leaves_the_repo(local_hub: RunningHub) -> None:
    alice = client(local_hub, "alice")
    make_repo(alice, "alice/one")
    before = sorted(local_hub.root.parent.rglob("*"))
    for path in HOSTILE_PATHS:
        assert commit(alice, "alice/one", small(path, b"x")).status_code == 400, path
        asked = {"files": [{"path": path, "size": 1, "sample": ""}]}
        pre = alice.post("/api/models/alice/one/preupload/main", json=asked)
        assert pre.status_code == 400, path
    assert commit(alice, "alice/one", small("a", b"x"), small("a/b", b"x")).status_code == 400
    new = set(local_hub.root.parent.rglob("*")) - set(before)
    assert all("objects" in path.parts for path in new), new  # unreferenced contents at most
    assert [entry["path"] for entry in alice.get("/api/models/alice/one/tree/main").json()] == [".gitattributes"]


HOSTILE_URLS = [
    "/alice/one/resolve/main/..%2F..%2Frefs.json", "/alice/one/resolve/main/%2e%2e/%2e%2e/repo.json",
    "/alice/one/resolve/..%2F..%2Frefs/repo.json", "/api/models/..%2F..%2Fusers.json/one",
    "/api/models/alice/..%2Ftwo", "/api/models/%2e%2e/%2e%2e", "/api/models/alice/one%00",
    "/alice/one/raw/main/repo.json",
    "/api/models/alice/one/tree/main/..%2F..", "/api/models/alice/one/revision/..%2F..%2Fusers",
    "/alice/one/resolve/main/%ff%fe", "/..%2Fusers.json", "/api/models/alice/one/discussions/..%2Frefs",
    "/api/models/alice/one/discussions/%C2%B2",
]  # fmt: skip


def test_no_address_reads_a_file_of_the_server(local_hub: RunningHub) -> None:
    alice = client(local_hub, "alice")
    make_repo(alice, "alice/one")
    host, port = urlsplit(local_hub.url).hostname, urlsplit(local_hub.url).port
    for url in HOSTILE_URLS:  # a raw socket: an HTTP library would tidy these addresses up
        with socket.create_connection((host, port), timeout=10) as line:
            token = local_hub.token_of("alice")
            headers = f"Host: {host}:{port}\r\nAuthorization: Bearer {token}\r\nConnection: close"
            line.sendall(f"GET {url} HTTP/1.1\r\n{headers}\r\n\r\n".encode())
            answer = b""
            while chunk := line.recv(65536):
                answer += chunk
        status = int(answer.split()[1])
        assert status in (400, 404), (url, status)
        assert b"sha256" not in answer and b"heads" not in answer, url


def test_ranges_are_exact(local_hub: RunningHub) -> None:
    alice = client(local_hub, "alice")
    make_repo(alice, "alice/one")
    data = bytes(range(256)) * 5000
    assert upload(alice, "alice/one", data) == 200
    sha = commit(alice, "alice/one", large("m.safetensors", data), small("e.txt", b"")).json()["commitOid"]
    url = f"/alice/one/resolve/{sha}/m.safetensors"
    for asked, expected in [("0-0", data[:1]), ("10-19", data[10:20]), ("1279990-", data[-10:]), ("-5", data[-5:]),
                            ("1279999-9999999", data[-1:])]:  # fmt: skip
        answer = alice.get(url, headers={"Range": f"bytes={asked}"})
        assert answer.status_code == 206 and answer.content == expected, asked
        assert answer.headers["content-range"].endswith(f"/{len(data)}")
    beyond = alice.get(url, headers={"Range": "bytes=1280000-"})
    assert beyond.status_code == 416 and beyond.headers["content-range"] == f"bytes */{len(data)}"
    head = alice.head(url, headers={"Accept-Encoding": "identity"})
    digest = hashlib.sha256(data).hexdigest()
    assert head.headers["x-repo-commit"] == sha and head.headers["content-length"] == str(len(data))
    assert head.headers["etag"] == head.headers["x-linked-etag"] == f'"{digest}"' and head.content == b""
    assert alice.get(f"/alice/one/resolve/{sha}/e.txt").content == b""
    missing = alice.get(f"/alice/one/resolve/{sha}/none.txt")
    assert missing.status_code == 404 and missing.headers["x-error-code"] == "EntryNotFound"
    assert missing.headers["x-repo-commit"] == sha


def test_of_many_commits_on_one_parent_exactly_one_wins(local_hub: RunningHub) -> None:
    alice = client(local_hub, "alice")
    make_repo(alice, "alice/race")
    parent = alice.get("/api/models/alice/race").json()["sha"]

    def one(number: int) -> int:
        with client(local_hub, "alice") as own:
            return commit(own, "alice/race", small(f"{number}.txt", b"x"), parent=parent).status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(one, range(16)))
    assert sorted(statuses) == [200] + [412] * 15
    assert len(alice.get("/api/models/alice/race/tree/main").json()) == 2
    assert len(alice.get("/api/models/alice/race/commits/main").json()) == 2


def test_a_killed_server_comes_back_with_everything_it_acknowledged(tmp_path: Path) -> None:
    root = tmp_path / "hub"
    data = b"w" * 3_000_000
    with hub_process(root) as (hub, process):
        alice = client(hub, "alice")
        make_repo(alice, "alice/kept", visibility="private")
        assert upload(alice, "alice/kept", data) == 200
        sha = commit(alice, "alice/kept", large("m.safetensors", data), small("config.json", b"{}")).json()["commitOid"]
        make_repo(alice, "alice/data", kind="dataset")
        alice.post("/api/models/alice/kept/discussions", json={"title": "a thread", "description": "text"})
        batch = {"operation": "upload", "objects": [{"oid": "0" * 64, "size": 9_000_000}], "ref": {"name": "main"}}
        answer = alice.post("/alice/kept.git/info/lfs/objects/batch", json=batch).json()
        href = answer["objects"][0]["actions"]["upload"]["href"]

        def half() -> Any:
            yield b"x" * 4_000_000
            process.kill()
            yield b"x" * 5_000_000

        with pytest.raises(httpx.TransportError):
            httpx.put(href, content=half(), headers={"Content-Length": "9000000"})
    with hub_process(root) as (hub, _):
        alice = client(hub, "alice")
        assert alice.get("/api/models/alice/kept").json()["sha"] == sha
        assert alice.get("/api/models/alice/kept").json()["private"] is True
        assert alice.get(f"/alice/kept/resolve/{sha}/m.safetensors").content == data
        assert alice.get("/api/datasets/alice/data").status_code == 200
        assert alice.get("/api/models/alice/kept/discussions/1").json()["events"][0]["data"]["latest"]["raw"] == "text"
        assert (
            commit(alice, "alice/kept", {"key": "lfsFile", "value": {"path": "z.bin", "oid": "0" * 64}}).status_code
            == 400
        )
        numbers = [entry["number"] for entry in hub.journal()]
        assert numbers == sorted(set(numbers))


def test_no_token_lies_on_disk_or_in_the_journal(local_hub: RunningHub) -> None:
    alice = client(local_hub, "alice")
    make_repo(alice, "alice/one")
    secret = local_hub.token_of("alice").encode()
    for path in local_hub.root.rglob("*"):
        assert not path.is_file() or secret not in path.read_bytes(), path
    fields = {"number", "time", "method", "path", "user", "status", "bytes"}
    assert all(set(entry) == fields for entry in local_hub.journal())
    assert local_hub.journal()[-1]["user"] == "alice" and local_hub.journal()[-1]["path"] == "/api/repos/create"


CARD = """---
license: mit
tags: ["<script>tag()</script>"]
---
# Hello <script>alert(1)</script>

[click](javascript:alert(1)) ![pic](https://tracker.example/x.png) <img src=x onerror=alert(1)>

| a | b |
|---|---|
| 1 | 2 |
"""


def test_the_page_of_a_repo_shows_its_card_and_none_of_its_tricks(local_hub: RunningHub) -> None:
    alice = client(local_hub, "alice")
    make_repo(alice, "alice/shown")
    files = [small("README.md", CARD.encode()), small("<b>name.html", b"<script>1</script>")]
    assert commit(alice, "alice/shown", *files).status_code == 200
    page = client(local_hub).get("/alice/shown", headers={"Accept": "text/html"})
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    assert "<h1>Hello &lt;script&gt;" in page.text and "<td>1</td>" in page.text
    for trick in ("<script", "<img", 'href="javascript:', "<b>name", 'src="'):
        assert trick not in page.text.lower(), trick
    assert 'href="/alice/shown"' in client(local_hub).get("/").text
    raw = client(local_hub).get("/alice/shown/resolve/main/%3Cb%3Ename.html")
    assert raw.headers["content-type"] == "application/octet-stream"
    assert raw.headers["x-content-type-options"] == "nosniff"
    make_repo(alice, "alice/hidden", visibility="private")
    hidden = client(local_hub).get("/alice/hidden", headers={"Accept": "text/html"})
    assert hidden.status_code == 404 and "There is nothing here" in hidden.text
    assert "alice/hidden" not in client(local_hub).get("/").text


def test_a_card_shows_the_pictures_of_its_repo_and_no_file_runs_when_it_is_opened(local_hub: RunningHub) -> None:
    alice = client(local_hub, "alice")
    make_repo(alice, "alice/drawn")
    drawing = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    files = (small("README.md", b"![a drawing](results/my%20a.svg)"), small("results/my a.svg", drawing))
    commit(alice, "alice/drawn", *files, small("p.png", b"\x89PNG"), small("p.html", drawing))
    http = client(local_hub)
    page = http.get("/alice/drawn", headers={"Accept": "text/html"}).text
    [address] = re.findall(r'<img src="([^"]+)" alt="a drawing"', page)
    assert drawing.decode() not in page
    picture = http.get(address)
    assert (picture.content, picture.headers["content-type"]) == (drawing, "image/svg+xml")
    assert http.get("/alice/drawn/resolve/main/p.png").headers["content-type"] == "image/png"
    assert http.get("/alice/drawn/resolve/main/p.html").headers["content-type"] == "application/octet-stream"
    for name in ("results/my a.svg", "p.png", "p.html"):
        headers = http.get(f"/alice/drawn/resolve/main/{name}").headers
        rules = [rule.strip() for rule in headers["content-security-policy"].split(";")]
        assert "sandbox" in rules and "default-src 'none'" in rules and not any("script" in rule for rule in rules)
        assert headers["x-content-type-options"] == "nosniff"


def test_a_login_says_who_somebody_is_and_opens_nothing(local_hub: RunningHub) -> None:
    alice = client(local_hub, "alice")
    make_repo(alice, "alice/secret", visibility="private")
    http = client(local_hub)
    about = http.get("/.well-known/openid-configuration").json()
    back = "http://127.0.0.1:7860/login/callback"
    asked = {"response_type": "code", "client_id": "space", "redirect_uri": back, "scope": "openid profile",
             "state": "s1", "nonce": "n1"}  # fmt: skip
    choice = http.get(about["authorization_endpoint"], params=asked)
    assert choice.status_code == 200 and "login=alice" in choice.text
    assert http.post("/_local/login/alice").status_code == 200
    answer = http.get(about["authorization_endpoint"], params=asked)
    sent = parse_qs(urlsplit(answer.headers["location"]).query)
    assert answer.headers["location"].startswith(back) and sent["state"] == ["s1"]
    form = {"grant_type": "authorization_code", "code": sent["code"][0], "redirect_uri": back}
    tokens = http.post(about["token_endpoint"], data=form, auth=("space", "secret")).json()
    keys = KeySet.import_key_set(http.get(about["jwks_uri"]).json())
    claims = jwt.decode(tokens["id_token"], keys, algorithms=["RS256"]).claims
    assert claims["iss"] == local_hub.url and claims["aud"] == "space" and claims["nonce"] == "n1"
    assert claims["preferred_username"] == "alice" and {"sub", "name", "picture", "profile", "exp"} <= set(claims)
    assert http.post(about["token_endpoint"], data=form, auth=("space", "secret")).status_code == 400  # used up
    logged_in = client(local_hub, token=tokens["access_token"])
    assert logged_in.get("/oauth/userinfo").json()["preferred_username"] == "alice"
    assert logged_in.get("/api/models/alice/secret").status_code == 404
    assert logged_in.post("/api/repos/create", json={"name": "x"}).status_code == 403
    elsewhere = http.get(about["authorization_endpoint"], params={**asked, "redirect_uri": "https://evil.example/cb"})
    assert elsewhere.status_code == 400


def test_a_small_answer_waits_for_no_acknowledgement(local_hub: RunningHub) -> None:
    """Without TCP_NODELAY each answer after the first few waits 40 ms for the client's delayed ACK."""
    with httpx.Client(base_url=local_hub.url, trust_env=False) as client:
        times = []
        for _ in range(30):
            assert client.get("/api/models").status_code == 200
            times.append(client.get("/api/whoami-v2").elapsed.total_seconds())
    assert min(times[10:]) < 0.02, times
