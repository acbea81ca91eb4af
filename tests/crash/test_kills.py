"""Killed at any point of the walk, the bot ends it after a restart: nothing lost, nothing published twice.

Each point is a `kill -9` of the process that reaches it: the scheduler, the worker or the publisher. A killed child is
started again by the scheduler; a killed scheduler is started again here, as an operator's supervisor would. Walks take
seconds, so most are killed twice: the scheduler first and, after its restart, a child.
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
from bot.jobs.job import Stage, stage
from bot.jobs.queue import Queue
from bot.localhub import seed
from bot.settings import Settings
from tests import family
from tests.localhub.server import RunningHub, running_hub
from tests.verify_promises import broken_promises

pytestmark = pytest.mark.slow
REPO = Path(__file__).resolve().parent.parent.parent

# where the scheduler dies, if it does; then where a child of its dies
WALKS = [
    ("intake.before_insert", "download.after_verify"),
    ("intake.after_insert", "writer.after_rename"),
    ("claim.after_commit", "publish.after_manifest_check"),
    ("merge.after_fact", "publish.after_create_repo"),
    ("eval.after_fact", "publish.after_upload"),
    (None, "publish.before_commit"),
    (None, "publish.after_commit"),
    (None, "publish.after_readback"),
    (None, "publish.after_public"),
    ("publish.after_fact", "board.after_results"),
]


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


def killed(tmp_path: Path, hub: RunningHub, point: str) -> int:
    """Run the driver to its end, with the process that reaches `point` first killed there; its exit status."""
    crashed = tmp_path / f"{point} was reached"
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
        "MERGEBOT_CRASH_AT": point,
        "MERGEBOT_CRASH_ONCE": str(crashed),
        "PYTHONPATH": str(REPO),
    }
    command = [sys.executable, "-m", "tests.crash.driver"]
    status = subprocess.run(command, env=environment, cwd=REPO, timeout=240).returncode
    assert crashed.exists(), f"{point} was never reached"
    return status


@pytest.mark.parametrize(("scheduler", "child"), WALKS)
def test_killed_anywhere_the_request_is_published_exactly_once(
    scheduler: str | None, child: str, tmp_path: Path, hub: RunningHub
) -> None:
    if scheduler is not None:
        assert killed(tmp_path, hub, scheduler) == -signal.SIGKILL
    assert killed(tmp_path, hub, child) == 0

    settings = Settings(home=tmp_path / "bot", hub=hub.url)
    queue = Queue(settings.database_url)
    [job] = queue.jobs()
    assert stage(job, job.submitted_at) is Stage.PUBLISHED
    assert broken_promises(settings, hub.root) == []
    assert job.publication is not None
    assert Hub(hub.url).resolve(job.publication.repo).private is False
    assert list(settings.scratch.glob("[0-9a-f]*")) == []
    assert len(list((hub.root / "repos" / "models" / "mergebot").iterdir())) == 1
