"""A process of its own that dies when it likes, without the seconds that a new one takes to import torch."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable


def status(work: Callable[[], object]) -> int:
    """Do `work` in a fork of this process: 0 when it ends, 1 when it raises, minus the signal when it is killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)  # nothing of the test run may happen twice
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
