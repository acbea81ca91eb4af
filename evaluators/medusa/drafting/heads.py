"""Medusa heads: K small residual networks that predict the tokens after the next token of the base model.

`h` is the hidden state that enters the output embedding at a position. The base predicts the next token from it; head k
(1..K, stored at index k - 1) predicts the k-th token after that. Blocks: r(x) = x + SiLU(W x + b) with W and b zero at
first, so an untrained head repeats the prediction of the base. `conditioned`: the first block also reads the embedding
of the next token, which is known when drafting: r(h, e) = h + SiLU(W [h; e] + b).

References: Medusa, arXiv 2401.10774 (own unembedding, V1; shared, V2); Hydra, arXiv 2402.05109 (conditioning).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bot.errors import EvaluationError
from evaluators.medusa.model.causal_lm import Base

Kind = Literal["shared", "own"]


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """Shape of a set of heads. `keep` lists the token ids of a reduced draft vocabulary, None for the whole one."""

    kind: Kind = "shared"
    heads: int = 4
    layers: int = 1
    conditioned: bool = False
    keep: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.heads < 1 or self.layers < 1:
            raise ValueError("heads and layers must be at least 1")
        if self.keep is not None and (not self.keep or len(set(self.keep)) != len(self.keep)):
            raise ValueError("the kept token ids must be distinct and not empty")


def require_own_projection(base: Base) -> None:
    """Raise EvaluationError SPEED_UNSUPPORTED if this base does not support heads of the kind "own"."""
    if getattr(base.output, "bias", None) is not None:
        raise EvaluationError(
            "SPEED_UNSUPPORTED",
            "Heads with their own projection cannot copy an output embedding that has a bias.",
            "Use shared heads on this model.",
        )


class Heads(nn.Module):
    """K heads over one base model. Parameters stay in float32 until `.to()` moves them.

    first [K, H, H or 2H] and first_bias [K, H] are the first block of each head, more [K, L-1, H, H] and
    more_bias [K, L-1, H] the others. unembed is [V', H] (shared, frozen)
    or [K, V', H] (own, trained).
    """

    first: nn.Parameter
    first_bias: nn.Parameter
    more: nn.Parameter
    more_bias: nn.Parameter
    unembed: Tensor
    unembed_bias: Tensor | None
    keep: Tensor | None

    def __init__(self, spec: HeadSpec, base: Base) -> None:
        super().__init__()
        if spec.keep is not None and (min(spec.keep) < 0 or max(spec.keep) >= base.vocab):
            raise EvaluationError(
                "SPEED_CHECK_FAILED",
                f"The draft vocabulary names token {max(spec.keep)}, but the model has {base.vocab} tokens.",
                "Train heads on this model.",
            )
        self.spec = spec
        self.base = base
        self.embed_scale = 1.0
        count, width, blocks = spec.heads, base.hidden, spec.layers
        self.first = nn.Parameter(torch.zeros(count, width, width * (2 if spec.conditioned else 1)))
        self.first_bias = nn.Parameter(torch.zeros(count, width))
        self.more = nn.Parameter(torch.zeros(count, blocks - 1, width, width))
        self.more_bias = nn.Parameter(torch.zeros(count, blocks - 1, width))
        keep = None if spec.keep is None else torch.tensor(spec.keep)
        self.register_buffer("keep", keep, persistent=False)
        self._take_unembedding(keep)
        self.to(base.device)

    def _take_unembedding(self, keep: Tensor | None) -> None:
        weight, bias = self.base.output.weight.detach(), getattr(self.base.output, "bias", None)
        rows = weight if keep is None else weight[keep.to(weight.device)]
        if self.spec.kind == "own":
            require_own_projection(self.base)
            self.unembed = nn.Parameter(rows.float().expand(self.spec.heads, *rows.shape).clone())
            self.unembed_bias = None
            return
        self.register_buffer("unembed", rows.float(), persistent=False)
        if bias is not None:
            bias = bias.detach() if keep is None else bias.detach()[keep.to(weight.device)]
        self.register_buffer("unembed_bias", None if bias is None else bias.float(), persistent=False)

    def rows(self, h: Tensor, following: Tensor) -> Tensor:
        """h [N, H] and the base's next tokens [N] -> the hidden rows of the heads [K, N, H]."""
        count, width = self.spec.heads, self.base.hidden
        h = h.to(self.first.dtype)
        entering = h
        if self.spec.conditioned:
            entering = torch.cat([h, self.embed_scale * self.base.embed(following).to(h.dtype)], dim=-1)
        row = h[:, None] + F.silu(self.enter(entering).view(-1, count, width))
        row = row.transpose(0, 1)
        for block in range(self.spec.layers - 1):
            z = torch.baddbmm(self.more_bias[:, block, None], row, self.more[:, block].transpose(1, 2))
            row = row + F.silu(z)
        return row

    @torch.no_grad()
    def take_embeddings_at(self, scale: float) -> None:
        """Multiply input embeddings by `scale` and divide their weights by it; powers of two leave outputs unchanged.

        An optimiser with equal step sizes for all weights learns best from inputs of similar size.
        """
        self.first[..., self.base.hidden :] *= self.embed_scale / scale
        self.embed_scale = scale

    def enter(self, x: Tensor) -> Tensor:
        """[N, H or 2H] -> [N, K*H]: the first blocks of all heads in one matrix product."""
        return F.linear(x, self.first.reshape(self.spec.heads * self.base.hidden, -1), self.first_bias.reshape(-1))

    def project(self, row: Tensor) -> Tensor:
        """[N, H] -> [N, V'] by the shared projection."""
        return F.linear(row, self.unembed, self.unembed_bias)

    def forward(self, h: Tensor, following: Tensor) -> Tensor:
        """h [N, H] and the base's next tokens [N] -> draft logits [K, N, V'], with the post-processing of the base."""
        row = self.rows(h, following)
        if self.spec.kind == "own":
            return self.base.post(torch.bmm(row, self.unembed.transpose(1, 2)))
        flat = self.project(row.reshape(-1, row.shape[-1]))
        return self.base.post(flat.view(row.shape[0], row.shape[1], -1))

    def ranks(self, h: Tensor, following: Tensor, k: int) -> Tensor:
        """k most likely token ids of each head, best first: [K, N, k]; the last is repeated if there are fewer."""
        logits = self(h, following)
        best = logits.topk(min(k, logits.shape[-1]), dim=-1).indices
        if best.shape[-1] < k:
            best = torch.cat([best, best[..., -1:].expand(*best.shape[:-1], k - best.shape[-1])], dim=-1)
        return best if self.keep is None else self.keep[best]

    def trained_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def size_bytes(self) -> int:
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters())


def identity_heads(spec: HeadSpec, base: Base) -> Heads:
    """Untrained heads, which repeat the prediction of the base: the lower bound for every training."""
    return Heads(spec, base)


def vocabulary_cut(counted: Sequence[int], size: int, base: Base) -> tuple[int, ...]:
    """Draft vocabulary of `size` ids: the stop ids, then by frequency in `counted`, then the lowest ids."""
    frequency: dict[int, int] = dict.fromkeys(sorted(base.stop_ids), len(counted) + 1)
    for token in counted:
        frequency[token] = frequency.get(token, 0) + 1
    ordered = sorted(frequency, key=lambda token: (-frequency[token], token))
    filler = (token for token in range(base.vocab) if token not in frequency)
    chosen = ordered[:size]
    while len(chosen) < min(size, base.vocab):
        chosen.append(next(filler))
    return tuple(chosen)
