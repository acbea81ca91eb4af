"""Lock and recovery of the `.partial` output folder. docs/design/merging.md 5.4.

The owner holds a lock on the folder itself, which outlives the journal: the journal is removed just before the rename.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from bot.errors import Refused
from bot.merge.execution.provenance import MANIFEST
from bot.storage import try_lock


def hold(partial: Path) -> int:
    """Lock the folder; the lock lasts until the returned handle is closed. Raises `Refused(OUTPUT_EXISTS)`."""
    handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        free = try_lock(handle)
    except OSError:
        return handle  # some network file systems cannot lock folders; the lock on the journal remains
    if not free:
        os.close(handle)
        raise Refused(
            "OUTPUT_EXISTS",
            f"another process is merging into {partial.name.removesuffix('.partial')}.",
            "Wait for it, or name another folder.",
        )
    return handle


def reclaim(partial: Path, journal: str) -> None:
    """Make an interrupted output writable again; without a journal, remove what a complete merge had listed.

    A merge killed between removing its journal and the rename leaves a complete output with its manifest. Raises
    `Refused(OUTPUT_EXISTS)` for other files in the folder.
    """
    files = {path.name: path for path in partial.iterdir()}
    if journal in files or not files:
        for path in files.values():
            path.chmod(path.stat().st_mode | stat.S_IWUSR)
        return
    try:
        listed = {entry["path"] for entry in json.loads(files[MANIFEST].read_bytes())["files"]} | {MANIFEST}
    except (KeyError, TypeError, ValueError):
        listed = set()
    if strange := sorted(set(files) - listed):
        raise Refused(
            "OUTPUT_EXISTS",
            f"{partial} holds files that do not belong to a merge, such as {strange[0][:60]}.",
            "Remove that folder, or name another output.",
            value=str(partial),
        )
    for name in sorted(files, key=lambda name: name == MANIFEST):  # the manifest last, since it lists the others
        files[name].unlink()


def held_bytes(partial: Path) -> int:
    """Return the bytes that the folder occupies on the disk."""
    try:
        return sum(entry.stat().st_blocks * 512 for entry in os.scandir(partial))
    except FileNotFoundError:
        return 0
