"""Run by test_memory.py as its own process: merges, and the most anonymous memory that each ever had.

usage: measured_merge.py FOLDER RECIPE...; prints a line of JSON a recipe. Each merges in a fork, which has the memory
of a process that imported torch and nothing more. Linux counts it as RssAnon.
"""

from __future__ import annotations

import json
import sys
import threading
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from tiny_checkpoints import plan_of

from bot.merge.execution import engine
from tests import forked


def anonymous_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def measure(folder: Path, recipe: Path) -> None:
    planned, folders = plan_of(recipe.read_text(), folder)
    done, peak = threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    engine.merge(planned, folders, recipe.with_suffix(".out"))
    done.set()
    watcher.join()
    print(json.dumps({"peak": peak[0], "planned": planned.peak_memory_bytes}), flush=True)


def main() -> None:
    folder, *recipes = map(Path, sys.argv[1:])
    for recipe in recipes:
        if forked.status(partial(measure, folder, recipe)):
            sys.exit(f"{recipe} was not merged")


if __name__ == "__main__":
    main()
