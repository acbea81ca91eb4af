"""Killed at any point of the walk, the bot ends it after a restart: nothing lost, nothing published twice.

Each point is a `kill -9` of the process that reaches it: the scheduler, the worker or the publisher. A killed child is
started again by the scheduler; a killed scheduler is started again here, as an operator's supervisor would.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bot.hub import Hub
from bot.job import Stage, stage
from bot.localhub import seed
from bot.queue import Queue
from bot.settings import Settings
from tests import family
from tests.localhub.server import RunningHub, running_hub
from tests.verify_promises import broken_promises

pytestmark = pytest.mark.slow
REPO = Path(__file__).resolve().parent.parent.parent

# where -> the process that dies there is the scheduler (else a child of its)
POINTS = {
    "intake.before_insert": True,
    "intake.after_insert": True,
    "claim.after_commit": True,
    "download.after_verify": False,
    "writer.after_rename": False,
    "merge.after_fact": True,
    "eval.after_fact": True,
    "publish.after_manifest_check": False,
    "publish.after_create_repo": False,
    "publish.after_upload": False,
    "publish.before_commit": False,
    "publish.after_commit": False,
    "publish.after_readback": False,
    "publish.after_public": False,
    "publish.after_fact": True,
    "board.after_results": False,
}


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("content")
    family.make(folder / "models" / "alice")
    return folder


@pytest.fixture
def hub(tmp_path: Path, content: Path) -> Iterator[RunningHub]:
    with running_hub(tmp_path / "hub") as running:
        seed(running.root, content)
        yield running


def run_bot(tmp_path: Path, hub: RunningHub, crash_at: str | None = None) -> int:
    """Run the driver to its end; its exit status."""
    token = tmp_path / "token"
    token.write_text(hub.token_of("mergebot"))
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ} | {
        "MERGEBOT_HOME": str(tmp_path / "bot"),
        "MERGEBOT_HUB": hub.url,
        "MERGEBOT_PUBLISH_TOKEN_FILE": str(token),
        "MERGEBOT_DEVICE": "cpu",
        "MERGEBOT_TICK_S": "0.2",
        "MERGEBOT_LEASE_S": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPO),
    }
    if crash_at is not None:
        environment |= {"MERGEBOT_CRASH_AT": crash_at, "MERGEBOT_CRASH_ONCE": str(tmp_path / "crashed")}
    command = [sys.executable, "-m", "tests.crash.driver"]
    return subprocess.run(command, env=environment, cwd=REPO, timeout=120).returncode


@pytest.mark.parametrize("point", sorted(POINTS))
def test_killed_anywhere_the_request_is_published_exactly_once(point: str, tmp_path: Path, hub: RunningHub) -> None:
    first = run_bot(tmp_path, hub, point)
    assert (tmp_path / "crashed").exists(), f"{point} was never reached"
    assert first == (-signal.SIGKILL if POINTS[point] else 0)
    if POINTS[point]:
        assert run_bot(tmp_path, hub) == 0

    settings = Settings(home=tmp_path / "bot", hub=hub.url)
    queue = Queue(settings.database_url)
    [job] = queue.jobs()
    assert stage(job, job.submitted_at) is Stage.PUBLISHED
    assert broken_promises(settings, hub.root) == []
    assert job.publication is not None
    assert Hub(hub.url).resolve(job.publication.repo).private is False
    assert list(settings.scratch.glob("[0-9a-f]*")) == []
    assert len(list((hub.root / "repos" / "models" / "mergebot").iterdir())) == 1
