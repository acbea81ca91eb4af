"""Journal of requests, one JSON line each: number, time, method, raw path, user, status, bytes. No headers or bodies.

The checker of the promises reads it, so lines are appended before the response ends and survive restarts.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path


class Journal:
    def __init__(self, root: Path) -> None:
        self._path = root / "journal.ndjson"
        self._lock = threading.Lock()
        self._number = self._last_number()
        self._end_cut_line()

    def _last_number(self) -> int:
        try:
            with self._path.open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - 65536))
                lines = file.read().splitlines()
        except FileNotFoundError:
            return 0
        for line in reversed(lines):
            try:
                return int(json.loads(line)["number"])
            except (ValueError, KeyError, TypeError):
                continue  # a line cut by a kill
        return 0

    def _end_cut_line(self) -> None:
        """End a line cut by a kill, so that the next one stays readable."""
        if self._path.is_file() and self._path.stat().st_size:
            with self._path.open("rb+") as file:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")

    def record(self, *, time: str, method: str, path: str, user: str | None, status: int, sent_bytes: int) -> None:
        with self._lock:
            self._number += 1
            fields = {
                "number": self._number,
                "time": time,
                "method": method,
                "path": path,
                "user": user,
                "status": status,
                "bytes": sent_bytes,
            }
            handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                # One write call, so that a kill cuts at most the last line.
                os.write(handle, json.dumps(fields).encode() + b"\n")
            finally:
                os.close(handle)
