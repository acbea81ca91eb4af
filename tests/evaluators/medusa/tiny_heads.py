"""The shapes of heads that tests of files write and read, and what a refusal says."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bot.errors import EvaluationError
from evaluators.medusa.drafting.heads import HeadSpec

KEEP = (5, 299, 0, 17, 100)
SHARED, DEEP, OWN = HeadSpec("shared", 3), HeadSpec("shared", 2, 2), HeadSpec("own", 2)
CUT = HeadSpec("shared", 2, keep=KEEP)


def refusal(call: Callable[[], object]) -> EvaluationError:
    with pytest.raises(EvaluationError) as caught:
        call()
    return caught.value
