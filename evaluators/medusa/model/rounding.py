"""How near two logits must be for rounding alone to decide between them.

The same token computed alone and among others goes through other kernels. In float32 that moves its logits by less than
a constant; in 16 bit it can move them by more than the distance between the two best, so there it is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from evaluators.medusa.model.causal_lm import Base

TIE_GAP = 1e-3
NOISE_TOKENS = 8


@torch.no_grad()
def tie_limit(base: Base, ids: Sequence[int]) -> float:
    """The largest gap between the two best logits after `ids` that counts as a tie.

    In 16 bit: twice what it changes here in the gap of the two best to read the last tokens together instead of one by
    one; twice, because the gap that is held against it is itself computed in one of these ways. At least the step of
    the type at the best logit, by which a single rounding moves it.
    """
    if base.dtype == torch.float32:
        return TIE_GAP
    rest, last = list(ids[:-NOISE_TOKENS]), torch.tensor([list(ids[-NOISE_TOKENS:])], device=base.device)
    together = base.run(last, past_key_values=_read(base, rest), use_cache=True)[1][0].float()
    cache = _read(base, rest)
    singly = torch.stack(
        [base.run(last[:, [at]], past_key_values=cache, use_cache=True)[1][0, -1] for at in range(last.shape[1])]
    ).float()
    best = singly.topk(2).indices
    moved = (_apart(together, best) - _apart(singly, best)).abs().max()
    return max(TIE_GAP, 2 * float(moved), _last_place(float(singly[-1].max()), base.dtype))


def _last_place(value: float, dtype: torch.dtype) -> float:
    """The distance of the numbers of this type next to `value`: two that are no further apart may be one number
    rounded twice."""
    return 0.0 if value == 0 else 2.0 ** math.floor(math.log2(abs(value))) * torch.finfo(dtype).eps


def _apart(logits: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """[N, V] and two token ids a row [N, 2] -> how far the first lies above the second [N]."""
    found = logits.gather(-1, best)
    return found[:, 0] - found[:, 1]


def _read(base: Base, ids: Sequence[int]) -> object:
    cache = base.new_cache()
    if ids:
        base.run(torch.tensor([list(ids)], device=base.device), project=False, past_key_values=cache, use_cache=True)
    return cache
