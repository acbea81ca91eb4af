"""One Space for the tests of this folder: a real process before a real queue and the local Hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bot.jobs.queue import Queue
from bot.localhub import seed
from tests.localhub.server import RunningHub, running_hub
from tests.space import exhibits
from tests.space.server import running_space


@dataclass(frozen=True, slots=True)
class Stage:
    """Where the Space answers, the Hub it asks, the queue it shows, and a job's id by the name of its stage."""

    url: str
    hub: RunningHub
    queue: Queue
    jobs: dict[str, str]
    log: Path


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A Space full of content; tests leave its jobs of other people alone."""
    root = tmp_path_factory.mktemp("space")
    with running_hub(root / "hub") as hub:
        seed(root / "hub", exhibits.hub_content(root / "content", exhibits.board_rows(hub.url)))
        (root / "examples").mkdir()
        (root / "examples" / "both.yml").write_text("# Keep both skills\n" + exhibits.RECIPE)
        home = root / "home"
        home.mkdir()
        queue = Queue(f"sqlite:///{home / 'mergebot.db'}", lease_s=3600)
        jobs = exhibits.fill_queue(queue, datetime.now(UTC))
        log = root / "space.log"
        settings = {"MERGEBOT_EXAMPLES": str(root / "examples"), "MERGEBOT_OPEN_REQUESTS_PER_PERSON": "100"}
        with running_space(home, hub.url, log=log, environment=settings) as url:
            yield Stage(url, hub, queue, jobs, log)


@pytest.fixture
def empty_space(tmp_path: Path) -> Iterator[Stage]:
    """A Space on its first day."""
    with running_hub(tmp_path / "hub") as hub:
        seed(tmp_path / "hub", exhibits.hub_content(tmp_path / "content", ()))
        home = tmp_path / "home"
        home.mkdir()
        queue = Queue(f"sqlite:///{home / 'mergebot.db'}")
        log = tmp_path / "space.log"
        with running_space(home, hub.url, log=log) as url:
            yield Stage(url, hub, queue, {}, log)
