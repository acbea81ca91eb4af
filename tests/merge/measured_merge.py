"""Run by test_memory.py as its own process: one merge, and the most anonymous memory it ever had.

usage: measured_merge.py FOLDER RECIPE OUT; prints one JSON object. Linux counts it as RssAnon.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from tiny_checkpoints import plan_of

from bot.merge.execution import engine


def anonymous_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def main() -> None:
    folder, text, out = Path(sys.argv[1]), Path(sys.argv[2]).read_text(), Path(sys.argv[3])
    planned, folders = plan_of(text, folder)
    done, peak = threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    engine.merge(planned, folders, out)
    done.set()
    watcher.join()
    print(json.dumps({"peak": peak[0], "planned": planned.peak_memory_bytes}))


if __name__ == "__main__":
    main()
