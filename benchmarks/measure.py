"""Run a command to its end and say what it cost: wall and CPU seconds, memory, bytes to and from the disk."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run of a command cost, all of its processes together. Memory is the peak of polls 50 ms apart."""

    wall_s: float
    cpu_s: float  # user + system, children that were waited for included
    rss_bytes: int  # resident, mapped files included
    anonymous_bytes: int  # resident and not backed by a file
    read_bytes: int  # from the disk: nearly 0 when the page cache is warm
    written_bytes: int  # handed to the disk layer
    status: int  # of the exit; negative: ended by that signal
    stopped: bool  # by `timeout_s`: the times are lower bounds
    said: str  # the end of what it printed


def run(
    command: Sequence[str], *, cwd: Path, environment: Mapping[str, str] | None = None, timeout_s: float = 3600
) -> Cost:
    """Run `command` in `cwd` with `environment` added to ours."""
    os.sync()  # nobody pays for what the run before left to write
    with tempfile.TemporaryFile("w+b") as spoken:
        started = time.monotonic()
        child = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=spoken,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        watch = _Watch(child.pid, started + timeout_s)
        watch.start()
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.monotonic() - started
        watch.ended.set()
        watch.join()
        child.returncode = os.waitstatus_to_exitcode(status)
        spoken.seek(0)
        said = spoken.read()[-2000:].decode(errors="replace").strip()
    return Cost(
        wall,
        usage.ru_utime + usage.ru_stime,
        max(watch.rss, usage.ru_maxrss * 1024),
        watch.anonymous,
        watch.read,
        watch.written,
        child.returncode,
        watch.stopped,
        said,
    )


class _Watch(threading.Thread):
    """Polls a process and its descendants until `ended`; kills them at the deadline."""

    def __init__(self, pid: int, deadline: float) -> None:
        super().__init__(daemon=True)
        self.pid, self.deadline, self.ended = pid, deadline, threading.Event()
        self.rss = self.anonymous = self.read = self.written = 0
        self.stopped = False

    def run(self) -> None:
        while not self.ended.wait(POLL_S):
            rss = anonymous = read = written = 0
            for pid in [self.pid, *_descendants(self.pid)]:
                status, io = _numbers(pid, "status"), _numbers(pid, "io")
                rss += status.get("VmRSS", 0) * 1024
                anonymous += status.get("RssAnon", 0) * 1024
                read += io.get("read_bytes", 0)
                written += io.get("write_bytes", 0)
            self.rss, self.anonymous = max(self.rss, rss), max(self.anonymous, anonymous)
            self.read, self.written = max(self.read, read), max(self.written, written)
            if time.monotonic() > self.deadline and not self.stopped:
                self.stopped = True
                os.killpg(self.pid, 9)


def _numbers(pid: int, file: str) -> dict[str, int]:
    """The `name: number` lines of a file in /proc; empty once the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {name: int(rest.split()[0]) for name, rest in pairs if rest.split() and rest.split()[0].isdigit()}


def _descendants(pid: int) -> Iterator[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in map(int, children):
        yield child
        yield from _descendants(child)
