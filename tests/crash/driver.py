"""The bot in a process that may be killed at any moment: ask for one merge, run the scheduler until it has ended.

python -m tests.crash.driver        settings by MERGEBOT_…; started again, it finds what it finds and goes on
"""

from __future__ import annotations

import threading

from bot.settings import Settings, activate

REQUESTER, NAME = "alice", "killed"
# copies layers, for which no process of the walk has to load torch
RECIPE = """merge_method: passthrough
slices:
- sources: [{model: alice/left, layer_range: [0, 1]}]
- sources: [{model: alice/right, layer_range: [1, 2]}]
dtype: bfloat16
"""


def main() -> None:
    settings = Settings()
    activate(settings)
    from bot.errors import Transient
    from bot.jobs.request import EvaluateOptions, from_form
    from bot.service import intake
    from bot.service.scheduler import Scheduler

    scheduler = Scheduler(settings)
    request = from_form(REQUESTER, RECIPE, NAME, EvaluateOptions(suite="none"))
    job = intake.take(request, scheduler.hub, scheduler.queue, settings)
    scheduler.start()
    pause = threading.Event()
    while scheduler.queue.job(job.id).ended_at is None:
        pause.wait(0.05)
    for _ in range(2):  # the publisher may be killed here as everywhere; the bot's next tick would ask again
        try:
            scheduler.tell()
            break
        except Transient:
            continue
    scheduler.stop()


if __name__ == "__main__":
    main()
