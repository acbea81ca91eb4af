"""The loss of heads on the base's own text and its gradient, in as few passes over the logits as it takes.

Nearly all of a training step is the projection of every row onto the draft vocabulary and back. Both are done in what
this machine multiplies fastest, in blocks whose logits stay in the CPU's cache, and no logits are kept for later:
softmax minus target is projected back at once. Parameters and their gradients stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from evaluators.medusa.drafting.heads import Heads
from evaluators.medusa.model import causal_lm
from evaluators.medusa.training.distillation import IGNORED, Features

DECAY_PER_HEAD = 0.8
BLOCK_LOGITS = 1 << 21  # 4 MiB in bfloat16
OWN_LOGITS = 1 << 25  # where the projection learns, too: its gradient is as large as itself, and each block adds one
LEAST_BLOCK = 16
SMALLEST = 1e-30  # a probability that rounds to 0 still has a logarithm
SOFT_SHARE = 0.5
CHOICES = 16


@dataclass(frozen=True, slots=True)
class Targets:
    """What K heads are to say at N rows: ids [K, N, m] in the draft vocabulary, none twice, and shares [K, N, m] that
    add up to 1; a row whose shares are all 0 teaches nothing."""

    ids: Tensor
    shares: Tensor

    @classmethod
    def certain(cls, rows: Tensor) -> Targets:
        """[K, N] rows of the draft vocabulary, IGNORED where there is nothing to say."""
        return cls(rows.clamp_min(0)[..., None], (rows != IGNORED).float()[..., None])


def draft_loss(heads: Heads, h: Tensor, following: Tensor, targets: Targets, unembed: Tensor | None = None) -> Tensor:
    """The sum of 0.8^k cross entropies, k from 1 (arXiv 2401.10774, section 2.2.1).

    h [N, H] and the base's next tokens [N] enter the heads. Differentiable in the heads' parameters and in h. `unembed`
    (`frozen_unembedding`) saves converting a projection that does not change.
    """
    dtype = product_dtype(h.device)
    with torch.autocast(h.device.type, dtype, enabled=dtype != torch.float32):
        rows = heads.rows(h, following).float()
    unembed = heads.unembed if unembed is None else unembed
    loss: Tensor = _DraftLoss.apply(  # type: ignore[no-untyped-call]
        rows, unembed, heads.unembed_bias, targets.ids, targets.shares, heads.base.post, dtype
    )
    return loss


def frozen_unembedding(heads: Heads) -> Tensor | None:
    """The shared projection as `draft_loss` multiplies by it; None where it is trained."""
    return heads.unembed.to(product_dtype(heads.unembed.device)) if heads.spec.kind == "shared" else None


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and causal_lm.cpu_multiplies_bfloat16() else torch.float32


class SoftTargets:
    """At each row, half the token that came and half what else the base held possible there.

    The rows that heads are trained on hold the base's distribution of every token that is to be guessed: one
    projection a row, done once, serves all heads and all epochs, and teaches more than the token alone (measured on a
    135 M Llama: 0.015 tokens per step with 16 nodes, at a seventh more time a step).
    """

    @torch.no_grad()
    def __init__(self, heads: Heads, features: Features, came: Tensor, rows: Tensor) -> None:
        """`came` [T] is each row's own token and `rows` [K, T] the tokens of later rows that the heads are to guess,
        both in the draft vocabulary or IGNORED."""
        dtype = product_dtype(features.tokens.device)
        weight = heads.base.output.weight.detach()
        weight = (weight if heads.keep is None else weight[heads.keep]).to(dtype)
        size = max(LEAST_BLOCK, BLOCK_LOGITS // len(weight))
        count = min(CHOICES, len(weight))
        bias = None if heads.unembed_bias is None else heads.unembed_bias.to(dtype)
        self._ids = torch.zeros((len(came), count), dtype=torch.long, device=came.device)
        self._shares = torch.zeros((len(came), count), device=came.device)
        for at in range(0, len(came), size):
            logits = heads.base.post(F.linear(features.hidden[at : at + size].to(dtype), weight, bias))
            likely = logits.topk(count, -1).indices
            real = came[at : at + size, None].clamp_min(0)
            # The token that came is the likeliest, except where two tied in the precision it was chosen in.
            likely[:, -1:] = torch.where((likely == real).any(-1, keepdim=True), likely[:, -1:], real)
            possible = torch.softmax(logits.gather(1, likely).float(), -1)
            self._shares[at : at + size] = SOFT_SHARE * possible + (1 - SOFT_SHARE) * (likely == real)
            self._ids[at : at + size] = likely
        self._known = rows != IGNORED

    def at(self, chosen: Tensor) -> Targets:
        """The targets of all heads at the rows `chosen` [N]."""
        heads = torch.arange(1, len(self._known) + 1, device=chosen.device)
        guessed = (chosen + heads[:, None]).clamp_max(len(self._ids) - 1)
        return Targets(self._ids[guessed], self._shares[guessed] * self._known[:, chosen, None])


class _DraftLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        unembed: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        shares: Tensor,
        post: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
    ) -> Tensor:
        """rows [K, N, H], unembed [V', H] for all heads or [K, V', H] for each -> the loss."""
        to_rows = torch.zeros_like(rows)
        to_unembed = torch.zeros_like(unembed) if ctx.needs_input_grad[1] else None
        loss = rows.new_zeros(())
        size = max(LEAST_BLOCK, (BLOCK_LOGITS if to_unembed is None else OWN_LOGITS) // unembed.shape[-2])
        bias = None if bias is None else bias.to(dtype)
        shared = unembed.to(dtype) if unembed.dim() == 2 else None
        for k in range(len(rows)):
            known = shares[k].any(-1).nonzero().squeeze(-1)
            share = DECAY_PER_HEAD ** (k + 1) / max(1, len(known))
            weight = unembed[k].to(dtype) if shared is None else shared
            for block in torch.split(known, size):
                x = rows[k, block].to(dtype)
                surprise, slope = _surprise(F.linear(x, weight, bias), ids[k, block], shares[k, block], post)
                loss += share * surprise
                to_rows[k, block] = share * (slope @ weight).float()
                if to_unembed is not None:
                    to_unembed[k].add_(slope.t() @ x, alpha=share)
        ctx.save_for_backward(to_rows, to_unembed)
        return loss

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        to_rows, to_unembed = ctx.saved_tensors
        scaled = None if to_unembed is None else to_unembed.mul_(outer[0])
        return outer[0] * to_rows, scaled, None, None, None, None, None


def _surprise(logits: Tensor, ids: Tensor, shares: Tensor, post: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Raw logits [n, V'] -> the sum of -share log p over all targets [n, m], and its gradient to them."""
    with torch.enable_grad():
        raw = logits.requires_grad_()
        shaped = post(raw)
    slope = torch.softmax(shaped.detach(), -1)
    held = slope.gather(1, ids)
    surprise = -(shares * held.float().clamp_min(SMALLEST).log()).sum()
    slope.scatter_(1, ids, slope.gather(1, ids) - shares.to(slope.dtype))
    return surprise, slope if shaped is raw else torch.autograd.grad(shaped, raw, slope)[0]
