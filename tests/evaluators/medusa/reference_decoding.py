"""The slow reference: no cache, no mask, no positions. Tests hold the fast loop against it.

Every root-to-node path of the tree is run as plain text through the model from its first token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from evaluators.medusa.decoding.acceptance import GREEDY, Rule
from evaluators.medusa.decoding.decode import Limits, Trace
from evaluators.medusa.drafting.drafters import Drafter
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.trees.tree import Tree


@torch.no_grad()
def medusa(base: Base, drafter: Drafter, tree: Tree, ids: Sequence[int], limits: Limits, rule: Rule = GREEDY) -> Trace:
    """What `decode.medusa` must return, tokens and paths, without the context edge and with one pass per node."""
    trace = Trace()
    h, logits = _last(base, ids)
    trace.tokens.append(rule.pick(logits, len(ids)))
    while trace.tokens[-1] not in limits.stop_ids and len(trace.tokens) < limits.max_new_tokens:
        cut = tree.shallow(limits.max_new_tokens - len(trace.tokens) - 1)
        seen = [*ids, *trace.tokens]
        tokens = [seen[-1]]
        if cut.nodes > 1:
            tokens += drafter.propose(h, seen[-1], seen, cut).tolist()
            cut = cut.first(len(tokens))
        rows = [_last(base, [*seen[:-1], *(tokens[at] for at in cut.ancestors(node))]) for node in range(cut.nodes)]
        path, following = rule.accept(cut, tokens, torch.stack([row for _, row in rows]), len(seen) - 1)
        h = rows[path[-1]][0]
        block = [*(tokens[node] for node in path[1:]), following]
        stop = next((at + 1 for at, token in enumerate(block) if token in limits.stop_ids), len(block))
        trace.paths.append(path)
        trace.emitted.append(stop)
        trace.tokens += block[:stop]
    return trace


def _last(base: Base, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, logits = base.run(torch.tensor([list(ids)], device=base.device), last_only=True, use_cache=False)
    return hidden[0, -1], logits[0, -1]
