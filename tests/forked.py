"""A process of its own that dies when it likes, without the seconds that a new one takes to import torch."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping

# Forked from a server that has imported and run nothing, never from the test's own process: a lock that one of its
# threads holds, or a pool of threads it has started, would be in the fork for ever.
_FRESH = multiprocessing.get_context("forkserver")
_FRESH.set_forkserver_preload(["torch", "bot.merge.execution.stages", "evaluators.medusa.training.head_training"])


def status(work: Callable[[], object]) -> int:
    """Do `work`, which can be pickled, in a process of its own: 0 when it ends, 1 when it raises, minus the signal when
    it is killed."""
    process = _FRESH.Process(target=_here, args=(work, dict(os.environ)))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _here(work: Callable[[], object], environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    work()
