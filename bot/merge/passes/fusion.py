"""arcee_fusion: importances and their exact quartiles, then a choice per element."""

from __future__ import annotations

import torch
from torch import Tensor

from bot.merge.methods.choice import row_divergence
from bot.merge.passes.inputs import Emit, Inputs, Piece
from bot.merge.passes.ranks import select
from bot.merge.passes.rowwise import width_of


def arcee_fusion(inputs: Inputs) -> Emit:
    """The other model's element where its importance stands out, else the base's. Importances in float32."""
    width = width_of(inputs.work.shape)

    def importance(piece: Piece) -> Tensor:
        tuned, base = (tensor.float().view(-1, width) for tensor in (piece.x[0], piece.b))
        room = inputs.scratch.get("importance", tuned.numel(), torch.float32, tuned.device).view(-1, width)
        return torch.sub(tuned, base, out=room).abs_().mul_(row_divergence(tuned, base)).view(-1)

    n = inputs.count
    ranks = [int(f * (n - 1)) for f in (0.5, 0.25, 0.75)]
    median, low, high = select(inputs, lambda piece: [importance(piece)], [[n - rank for rank in ranks]])[0]
    if n - ranks[1] == n:  # element 0 of the order: the smallest
        low.threshold = min(float(importance(piece).min()) for piece in inputs.pieces())
    threshold = median.threshold + 1.5 * (high.threshold - low.threshold)

    def emit(piece: Piece) -> Tensor:
        take = importance(piece)
        take = torch.ge(take, threshold, out=take)
        piece.x[0].mul_(take)
        return piece.x[0].add_(piece.b.mul_(take.neg_().add_(1)))

    return emit
