"""Numbers that are counted from their bits, where nothing is computed and torch is not there."""

from __future__ import annotations

import pytest
import torch

from bot.merge.execution.copying import count_nonfinite

SPECIAL = (float("nan"), float("inf"), -float("inf"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_and_infinite_numbers_are_counted_as_torch_counts_them(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    numbers = torch.tensor([*SPECIAL, largest, -largest, torch.finfo(dtype).tiny, 0.0, -0.0, 1.0], dtype=dtype)
    for count in range(len(numbers) + 1):
        some = numbers[count:].clone()
        data = some.view(torch.uint8).numpy()
        assert count_nonfinite(data, str(dtype).removeprefix("torch.")) == int((~torch.isfinite(some)).sum())


def test_every_pattern_of_sixteen_bits_is_judged_as_torch_judges_it() -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        numbers = patterns.view(dtype)
        data = patterns.view(torch.uint8).numpy()
        assert count_nonfinite(data, str(dtype).removeprefix("torch.")) == int((~torch.isfinite(numbers)).sum())


def test_integers_are_always_finite() -> None:
    assert count_nonfinite(torch.full((9,), -1, dtype=torch.int16).view(torch.uint8).numpy(), "int16") == 0
