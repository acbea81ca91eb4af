"""The walls between the processes: who learns of which secret, and that nothing outlives the one that started it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bot.errors import CODES, Failed, Refused, Transient
from bot.jobs.job import Progress
from bot.jobs.request import EvaluateOptions
from bot.jobs.specs import MergeSpec
from bot.service.executors.local import LocalExecutor
from bot.settings import Settings, Zone, child_environment

REPO = Path(__file__).resolve().parents[2]
SECRET = "hf_ThisIsThePublishersTokenAndNobodyElses"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    token = tmp_path / "token"
    token.write_text(SECRET)
    return Settings(
        home=tmp_path / "home",
        hub="http://127.0.0.1:9",
        publish_token_file=token,
        database="postgresql://bot:databasepassword@127.0.0.1/bot",
    )


def test_the_worker_learns_of_no_secret(settings: Settings) -> None:
    environment = json.dumps(child_environment(settings, "worker"))
    for secret in (SECRET, "TOKEN_FILE", "databasepassword"):
        assert secret not in environment


def test_the_publisher_learns_where_the_token_lies_and_nothing_more(settings: Settings) -> None:
    environment = child_environment(settings, "publisher")
    assert environment["MERGEBOT_PUBLISH_TOKEN_FILE"] == str(settings.publish_token_file)
    assert SECRET not in json.dumps(environment)


def test_a_child_inherits_by_list_and_not_by_accident(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    for zone in ("worker", "publisher"):
        assert SECRET not in json.dumps(child_environment(settings, zone))  # type: ignore[arg-type]


def test_a_stage_that_is_unknown_ends_as_a_defect_with_one_sentence(tmp_path: Path) -> None:
    executor = LocalExecutor(Settings(home=tmp_path, hub="http://127.0.0.1:9"))
    with pytest.raises(Failed) as failed:
        executor.run("nonsense", {}, tmp_path / "scratch", zone="worker", timeout_s=60, beat=lambda _: None)
    assert failed.value.code == "INTERNAL"
    assert (tmp_path / "logs" / "scratch" / "nonsense.log").read_text()


def test_a_worker_that_is_killed_is_a_passing_fault(tmp_path: Path) -> None:
    executor = LocalExecutor(Settings(home=tmp_path, hub="http://127.0.0.1:9"))

    def kill(_: Progress | None) -> None:
        for child in _children():
            os.kill(child, signal.SIGKILL)

    spec = MergeSpec("{}", tmp_path / "o", 0, (), EvaluateOptions())
    with pytest.raises((Transient, Refused, Failed)) as died:
        executor.run("merge", spec, tmp_path / "scratch", zone="worker", timeout_s=60, beat=kill)
    assert died.value.code in CODES


def _children() -> Iterator[int]:
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            yield int(status.parent.name)


# what is started stands on the disk before anything of ours is imported, however loaded the machine is
SLEEPER = """
import json, subprocess, sys
from pathlib import Path
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path(json.loads(Path(sys.argv[2]).read_text())["pid"]).write_text(str(grandchild.pid))
from bot.jobs import stage_process
def sleep(spec, settings, report):
    report("sleeping", 0, 1)
    grandchild.wait()
stage_process.main({"sleep": (dict, sleep)})
"""


class Sleeper(LocalExecutor):
    """An executor whose one stage starts a process of its own and waits."""

    def __init__(self, folder: Path) -> None:
        super().__init__(Settings(home=folder, hub="http://127.0.0.1:9"))
        self.program = folder / "sleeper_stage.py"
        self.program.write_text(SLEEPER)

    def command(self, zone: Zone) -> list[str]:
        return [sys.executable, str(self.program)]


@pytest.fixture
def sleeper(tmp_path: Path) -> LocalExecutor:
    return Sleeper(tmp_path)


def _gone(pid: int) -> bool:
    """Whether the process ends, or is dead and only not yet reaped, within half a minute."""
    pause = threading.Event()
    for _ in range(300):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        pause.wait(0.1)
    return False


@pytest.mark.slow
def test_a_cancel_ends_everything_the_stage_started(sleeper: LocalExecutor, tmp_path: Path) -> None:
    def cancel(progress: Progress | None) -> None:
        if progress is not None:
            raise Failed("CANCELLED", "Cancelled.", "")

    spec = {"pid": str(tmp_path / "pid")}
    with pytest.raises(Failed, match="Cancelled"):
        sleeper.run("sleep", spec, tmp_path / "s", zone="worker", timeout_s=60, beat=cancel)
    assert _gone(int((tmp_path / "pid").read_text()))


@pytest.mark.slow
def test_the_time_limit_ends_everything_the_stage_started(sleeper: LocalExecutor, tmp_path: Path) -> None:
    spec = {"pid": str(tmp_path / "pid")}
    with pytest.raises(Failed, match="longer than its limit of 4 s"):
        sleeper.run("sleep", spec, tmp_path / "s", zone="worker", timeout_s=4, beat=lambda _: None)
    assert _gone(int((tmp_path / "pid").read_text()))


def test_the_command_line_answers_in_one_sentence_and_shows_a_traceback_only_when_asked(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yml"
    bad.write_text("merge_method: liner\nmodels: []\n")
    for arguments, traceback in ((["plan", str(bad)], False), (["--debug", "plan", str(bad)], True)):
        command = [sys.executable, "-P", "-m", "bot.cli.main", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
        assert done.returncode == 1
        assert "linear" in done.stderr
        assert ("Traceback" in done.stderr) is traceback
