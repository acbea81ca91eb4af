"""How a Space starts, and when it refuses to."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest
import yaml
from gradio_client import Client

from bot.jobs.queue import Queue
from bot.localhub import seed
from tests.localhub.server import running_hub
from tests.space import exhibits
from tests.space.conftest import Stage
from tests.space.server import REPO, running_space, wait_for

pytestmark = pytest.mark.slow

IN_A_SPACE = {
    "SYSTEM": "spaces",
    "SPACE_ID": "mergebot/mergebot",
    "OAUTH_CLIENT_ID": "11111111-2222-3333-4444-555555555555",
    "OAUTH_CLIENT_SECRET": "not-a-secret-of-anybody-0123456789",
    "OAUTH_SCOPES": "openid profile",
    "MERGEBOT_PUBLIC": "true",
}


def start(code: str, home: Path, argv: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "TMPDIR") if key in os.environ}
    settings = {"MERGEBOT_HOME": str(home), "MERGEBOT_HUB": "http://127.0.0.1:9", "PYTHONPATH": str(REPO)}
    return subprocess.run(
        [sys.executable, "-c", code, *argv],
        env=kept | settings | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_whole_page_is_built_without_torch_or_a_model_library(tmp_path: Path) -> None:
    code = """
import json, sys
from space.app import create
create()
print(json.dumps([name for name in ("torch", "transformers", "lm_eval") if name in sys.modules]))
"""
    done = start(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_a_public_page_starts_only_where_logins_are_real(tmp_path: Path) -> None:
    code = """
import os
from bot.errors import Refused
from space.app import create
for place in ("on a machine", "in a Space without an OAuth application"):
    try:
        create()
    except Refused as refusal:
        print("REFUSED", place, refusal.code, refusal)
    os.environ |= {"SYSTEM": "spaces", "SPACE_ID": "mergebot/mergebot"}
"""
    done = start(code, tmp_path, MERGEBOT_PUBLIC="true")
    refusals = [line for line in done.stdout.splitlines() if line.startswith("REFUSED")]
    assert len(refusals) == 2 and all("LOGIN_REQUIRED" in line for line in refusals), done.stdout + done.stderr


def test_an_empty_page_shows_the_next_step(empty_space: Stage) -> None:
    client = Client(empty_space.url, verbose=False)
    assert client.predict(api_name="/jobs") == {"jobs": []}
    assert client.predict(api_name="/leaderboard") == {"rows": []}


def test_in_a_space_visitors_act_under_their_login(tmp_path: Path) -> None:
    with running_hub(tmp_path / "hub") as hub:
        seed(tmp_path / "hub", exhibits.hub_content(tmp_path / "content", ()))
        home = tmp_path / "home"
        home.mkdir()
        environment = {**IN_A_SPACE, "OPENID_PROVIDER_URL": hub.url}
        with running_space(home, hub.url, log=tmp_path / "log", environment=environment) as url:
            asked = {"recipe": exhibits.RECIPE, "name": "mine", "suite": "demo-skills"}
            nobody = Client(url, verbose=False)
            assert nobody.predict(**asked, api_name="/submit")["refused"]["code"] == "LOGIN_REQUIRED"
            assert nobody.predict(recipe=exhibits.RECIPE, api_name="/check")["refused"]["code"] == "LOGIN_REQUIRED"
            alice, bob = (
                Client(url, verbose=False, headers={"cookie": logged_in(url, hub.url, user)})
                for user in ("alice", "bob")
            )
            job = alice.predict(**asked, api_name="/submit")["job"]
            assert job["requester"] == "alice"
            assert bob.predict(job_id=job["id"], api_name="/cancel")["refused"]["code"] == "NOT_YOURS"
            assert nobody.predict(job_id=job["id"], api_name="/cancel")["refused"]["code"] == "LOGIN_REQUIRED"
            assert alice.predict(job_id=job["id"], api_name="/cancel")["job"]["stage"] == "cancelled"
            queue = Queue(f"sqlite:///{home / 'mergebot.db'}")
            assert [each.request.requester for each in queue.jobs()] == ["alice"]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def logged_in(space: str, hub: str, user: str) -> str:
    """The session cookie of `user` after the Hub's login. Its `Secure` mark is the browser's business, not ours."""
    urllib.request.urlopen(urllib.request.Request(f"{hub}/_local/login/{user}", method="POST"))
    opener = urllib.request.build_opener(_NoRedirect)
    address, cookie = f"{space}/login/huggingface", ""
    for _ in range(8):
        headers = {"cookie": cookie} if cookie and address.startswith(space) else {}
        try:
            answer: Any = opener.open(urllib.request.Request(address, headers=headers))
        except urllib.error.HTTPError as redirect:
            answer = redirect
        for header in answer.headers.get_all("set-cookie") or []:
            for name, morsel in SimpleCookie(header).items():
                cookie = f"{name}={morsel.value}" if name == "session" else cookie
        if answer.status not in (301, 302, 303, 307) or address.startswith(f"{space}/login/callback"):
            return cookie
        address = urljoin(address, answer.headers["location"])
    raise AssertionError("the login did not end")


def test_no_address_is_announced_where_the_page_must_not_be_served(tmp_path: Path) -> None:
    done = start("from bot.cli.main import main; main()", tmp_path, MERGEBOT_PUBLIC="true", argv=("serve",))
    assert done.returncode == 1 and "[LOGIN_REQUIRED]" in done.stderr
    assert "http://" not in done.stdout


def test_an_address_that_is_taken_is_not_announced(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        argv = ("serve", "--port", str(taken.getsockname()[1]))
        done = start("from bot.cli.main import main; main()", tmp_path, argv=argv)
    assert done.returncode != 0 and "http://" not in done.stdout
    assert "Nothing can be published: MERGEBOT_PUBLISH_TOKEN_FILE is not set." in done.stderr


def test_the_metadata_of_the_space_asks_for_logins_and_the_pinned_gradio() -> None:
    _, metadata, _ = (REPO / "space" / "README.md").read_text().split("---\n", 2)
    read = yaml.safe_load(metadata)
    assert read["sdk"] == "gradio" and read["app_file"] == "app.py" and read["hf_oauth"] is True
    assert f"gradio=={read['sdk_version']}" in (REPO / "constraints.txt").read_text().splitlines()
    assert read["python_version"] == "3.11" and len(read["short_description"]) <= 60


def test_a_copy_of_the_entry_point_serves_the_space(tmp_path: Path) -> None:
    app = tmp_path / "app.py"
    app.write_bytes((REPO / "space" / "__main__.py").read_bytes())
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "TMPDIR") if key in os.environ}
    settings = {"MERGEBOT_HOME": str(tmp_path), "MERGEBOT_HUB": "http://127.0.0.1:9", "MERGEBOT_SCHEDULE": "false"}
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(app), str(port)],
            env=kept | settings | {"PYTHONPATH": str(REPO)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}", process, log)
    finally:
        process.terminate()
        process.wait(20)
