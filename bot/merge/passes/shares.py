"""sce and ramplus_tl: each delta counts by what it contributes to the whole tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from bot.merge.methods.gram import pair_dot
from bot.merge.methods.shares import FLOOR, overlap
from bot.merge.passes.election import Election
from bot.merge.passes.elementwise import shrunk
from bot.merge.passes.inputs import Emit, Inputs, Piece
from bot.merge.passes.ranks import Shrinker, select_share


def sce(inputs: Inputs) -> Emit:
    """b + the deltas of the elected sign, averaged by energy; only where the models differ most."""
    topk = float(inputs.work.shared["select_topk"])
    chosen = None
    if topk < 1:
        chosen = select_share(inputs, lambda piece: _variance(inputs, piece.deltas()), topk)

    def deltas(piece: Piece, shrink: Shrinker | None) -> list[Tensor]:
        found = piece.deltas()
        if shrink is not None:
            keep = _variance(inputs, found)
            keep = torch.ne(shrink(keep), 0, out=keep)
            for delta in found:
                delta.mul_(keep)
        return found

    energies = [0.0] * inputs.n
    first = None if chosen is None else Shrinker(chosen, inputs.wide)
    for piece in inputs.pieces():
        for i, delta in enumerate(deltas(piece, first)):
            energies[i] += pair_dot(delta, delta, inputs.buffer("part", delta)) / max(1, inputs.count)
    total = sum(energies)
    inputs.corner("EVEN_SHARES", int(total < FLOOR))
    shares = [1 / inputs.n] * inputs.n if total < FLOOR else [energy / total for energy in energies]
    second = None if chosen is None else Shrinker(chosen, inputs.wide)
    return lambda piece: Election(inputs, deltas(piece, second), shares).shared().add_(piece.b)


def _variance(inputs: Inputs, deltas: list[Tensor]) -> Tensor:
    """Population variance over the models, per element, in a buffer."""
    first, *others = deltas
    mean, out, part = (inputs.buffer(name, first) for name in ("mean", "variance", "part"))
    total = first
    for delta in others:
        total = torch.add(total, delta, out=mean)
    torch.div(total, len(deltas), out=mean)
    torch.sub(first, mean, out=out).square_()
    for delta in others:
        out.add_(torch.sub(delta, mean, out=part).square_())
    return out.div_(len(deltas))


def ramplus_tl(inputs: Inputs) -> Emit:
    """ram, with what only one model changed raised by its overlap with the others."""
    shared = inputs.work.shared
    epsilon, r, alpha = (float(shared[name]) for name in ("epsilon", "r", "alpha"))
    own, active = [0] * inputs.n, [0] * inputs.n
    for piece in inputs.pieces():
        alone = _alone(inputs, [shrunk(delta, epsilon) for delta in piece.deltas()])[0]
        for i, tensor in enumerate(piece.x):
            changed = torch.ne(tensor, 0, out=tensor)
            active[i] += int(changed.sum())
            own[i] += int(changed.mul_(alone).sum())
    boosts = []
    for mine, all_ in zip(own, active, strict=True):
        boosts.append(1 + r * max(0.0, min(alpha, overlap(all_ - mine, mine, epsilon))))

    def emit(piece: Piece) -> Tensor:
        deltas = [shrunk(delta, epsilon) for delta in piece.deltas()]
        alone, count = _alone(inputs, deltas)
        total, boosted = inputs.buffer("total", alone).zero_(), inputs.buffer("boosted", alone).zero_()
        for delta, boost in zip(deltas, boosts, strict=True):
            total.add_(delta)
            boosted.add_(delta.mul_(boost))
        total.div_(count.clamp_(min=1)).sub_(torch.mul(total, alone, out=count))
        return total.add_(boosted.mul_(alone)).add_(piece.b)

    return emit


def _alone(inputs: Inputs, deltas: list[Tensor]) -> tuple[Tensor, Tensor]:
    """1 where exactly one model changed the element, and how many did, in buffers."""
    count, part = inputs.buffer("count", deltas[0]).zero_(), inputs.buffer("part", deltas[0])
    for delta in deltas:
        count.add_(torch.ne(delta, 0, out=part))
    return torch.eq(count, 1, out=part), count
