"""Decoding with static shapes: fixed buffers, one CUDA graph per tree, one wait for the device per step.

Everything a step needs stays on the device: the state and the root that the last step left, the length, the cache. A
greedy step drafts, verifies, accepts and compacts in one graph; the host reads back a single small tensor. Plain
decoding is the same step with the tree of the root alone. Without CUDA the same code runs uncaptured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from evaluators.medusa.decoding.acceptance import GREEDY, Greedy, Rule
from evaluators.medusa.decoding.capability import PROBE, disagreement, narrow_window
from evaluators.medusa.decoding.graphs import Capture, CudaGraphs
from evaluators.medusa.decoding.runners import EagerRunner, Runner, Step
from evaluators.medusa.decoding.static_cache import StaticTreeCache, row_shape
from evaluators.medusa.drafting.drafters import Drafter, TensorDrafter
from evaluators.medusa.model.attention import tiles_of
from evaluators.medusa.model.causal_lm import Base
from evaluators.medusa.trees.device_tree import DeviceTree
from evaluators.medusa.trees.tree import ROOT_ONLY, Path, Tree

SPAN = 256  # attention reads the cache up to a multiple of this many rows; one graph for each
PROBE_LENGTHS = (4, 7)  # a graph that froze the length would be right only once
TREE_ROOM = 64  # rows kept free for any tree, so that plain decoding and Medusa get caches of one size

EVERY = "every layer"
Paths = tuple[Path, ...]
Strips = dict[str, Tensor]  # by the kind of layer: what DeviceTree.mask_strip makes
T = TypeVar("T")


class StaticRunner:
    """A preallocated cache and what `Runner` promises; with `capture` each pass and step is recorded once per shape.

    Raises ValueError on a base for which `reason_against_static` has a reason.
    """

    @torch.inference_mode()
    def __init__(self, base: Base, capture: Capture | None = None, *, span: int = SPAN) -> None:
        shape = row_shape(base)
        if isinstance(shape, str):
            raise ValueError(shape)
        self.base = base
        self.length = 0
        self._row_shape, self._span = shape, span
        self._capture = capture
        self.execution = "static" if capture is None else "cuda_graph"
        self._position = torch.zeros(1, dtype=torch.long, device=base.device)  # `length`, for the device
        self._root = torch.zeros(1, dtype=torch.long, device=base.device)
        self._hidden = torch.zeros(base.hidden, dtype=base.dtype, device=base.device)
        self._trees: dict[Paths, DeviceTree] = {}
        self._steps: dict[tuple[Drafter | None, Paths, int], Callable[[], Tensor]] = {}
        self._passes: dict[tuple[Paths, int], tuple[Tensor, Callable[[], tuple[Tensor, Tensor]]]] = {}
        self._allocate(span)

    @torch.inference_mode()
    def prepare(self, drafter: Drafter | None, tree: Tree, rule: Rule, lengths: range) -> Callable[[Tree], Step] | None:
        """Make room, capture a graph for each span the text will grow through, and say whether steps are fused."""
        self._make_room(lengths.stop + max(TREE_ROOM, tree.nodes))
        self._set_length(0)
        on_device = tree.nodes == 1 or isinstance(drafter, TensorDrafter)
        fused = partial(self._step, drafter) if isinstance(rule, Greedy) and on_device else None
        if self._capture is not None:
            cuts = [tree] if fused else [tree.shallow(depth) for depth in range(tree.max_depth + 1)]
            for cut in cuts:
                first, last = (self._span_of(length + cut.nodes) for length in (lengths.start, lengths.stop - 1))
                for span in range(first, last + 1, self._span):
                    if fused:
                        self._step_call(drafter, cut, span)
                    else:
                        self._pass_call(cut, span)
        return fused

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Start anew with `ids`, uncaptured. Returns h [H] and logits [V] of the last token."""
        self._make_room(len(ids) + TREE_ROOM)
        row = torch.tensor([list(ids)], device=self.base.device)
        cache = self.cache.at(torch.arange(len(ids), device=self.base.device), len(ids), 0)
        hidden, logits = self.base.run(row, last_only=True, past_key_values=cache, use_cache=True)
        self._set_length(len(ids))
        self._hidden.copy_(hidden[0, -1])
        self._root.copy_(logits[0, -1:].argmax(-1))
        return hidden[0, -1], logits[0, -1]

    @torch.inference_mode()
    def forward(self, tokens: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
        """Tokens [n] of `tree` after the cached ones -> h [n, H], logits [n, V], the latter until the next call."""
        self._make_room(self.length + tree.nodes)
        held, call = self._pass_call(tree, self._span_of(self.length + tree.nodes))
        held.copy_(tokens)
        hidden, logits = call()
        return hidden.clone(), logits

    @torch.inference_mode()
    def keep(self, path: Sequence[int]) -> None:
        """Leave only the nodes of `path` (root first) of the last forward pass in the cache, in that order."""
        if list(path) != list(range(len(path))):
            source = torch.tensor([self.length + node for node in path], device=self.base.device)
            self.cache.move(source, torch.arange(self.length, self.length + len(path), device=self.base.device))
        self._set_length(self.length + len(path))

    @torch.inference_mode()
    def rewind(self, tokens: int) -> None:
        """Forget the last `tokens` cached tokens."""
        self._set_length(self.length - tokens)

    # -- a step in one piece -------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _step(self, drafter: Drafter | None, tree: Tree) -> Step:
        call = self._step_call(drafter, tree, self._span_of(self.length + tree.nodes))
        finite, accepted, *said = call().tolist()  # the one wait
        path, block = said[: accepted + 1], said[tree.max_depth + 1 :][: accepted + 1]
        self.length += accepted + 1
        return Step(tuple(path), block, self._hidden, bool(finite))

    def _whole_step(self, drafter: Drafter | None, tree: Tree, on_device: DeviceTree, strips: Strips) -> Tensor:
        """[finite, accepted, path (d + 1), tokens it brought (d + 1)]; the state, the root and the cache move on."""
        tokens = self._root
        if isinstance(drafter, TensorDrafter) and tree.nodes > 1:
            tokens = torch.cat([tokens, drafter.draft(self._hidden, self._root, self._position, tree)])
        hidden, logits = self._pass(tokens, on_device, strips)
        best = logits.argmax(-1)
        finite = torch.isfinite(logits.gather(1, best[:, None])).all().long()  # argmax stops at a NaN
        path, accepted = on_device.greedy_path(tokens, best)
        if tree.nodes > 1:
            self.cache.move(path + self._position, on_device.steps + self._position)
        # A child is accepted because it is the base's choice, so the choices along the path are what is emitted.
        block = best[path]
        last = path[accepted]
        self._hidden.copy_(hidden[last][0])
        self._root.copy_(best[last])
        self._position.add_(accepted + 1)
        return torch.cat([finite[None], accepted, path, block])

    def _pass(self, tokens: Tensor, on_device: DeviceTree, strips: Strips) -> tuple[Tensor, Tensor]:
        """Tokens [n] after the cached ones -> h [n, H], logits [n, V]; they are written behind what is cached."""
        span = (next(iter(strips.values())).shape[1] - on_device.nodes) // 2
        seen = self._columns[:span] + (span - self._position)
        masks = {kind: strip.index_select(1, seen)[None, None] for kind, strip in strips.items()}
        cache = self.cache.at(on_device.index + self._position, span, self.length)
        hidden, logits = self.base.run(
            tokens[None],
            past_key_values=cache,
            use_cache=True,
            attention_mask=masks.get(EVERY, masks),
            position_ids=(on_device.depth + self._position)[None],
        )
        return hidden[0], logits[0]

    # -- buffers and graphs --------------------------------------------------------------------------------------

    def _step_call(self, drafter: Drafter | None, tree: Tree, span: int) -> Callable[[], Tensor]:
        drafter = drafter if tree.nodes > 1 else None
        key = (drafter, tree.paths, span)
        if key not in self._steps:
            on_device, strips = self._on_device(tree, span)
            self._steps[key] = self._captured(partial(self._whole_step, drafter, tree, on_device, strips))
        return self._steps[key]

    def _pass_call(self, tree: Tree, span: int) -> tuple[Tensor, Callable[[], tuple[Tensor, Tensor]]]:
        """(the buffer [n] that its tokens are put into, the pass)."""
        key = (tree.paths, span)
        if key not in self._passes:
            held = torch.zeros(tree.nodes, dtype=torch.long, device=self.base.device)
            self._passes[key] = held, self._captured(partial(self._pass, held, *self._on_device(tree, span)))
        return self._passes[key]

    def _captured(self, body: Callable[[], T]) -> Callable[[], T]:
        state = (self._position, self._root, self._hidden)
        return body if self._capture is None else self._capture(body, state)

    def _on_device(self, tree: Tree, span: int) -> tuple[DeviceTree, Strips]:
        """The tree, and what its masks for `span` rows of cache are cut from."""
        if tree.paths not in self._trees:
            self._trees[tree.paths] = DeviceTree(tree, self.base.device)
        on_device, window = self._trees[tree.paths], self.base.window
        strip = partial(on_device.mask_strip, span, self.base.dtype, tiles_of(self.base) if tree.nodes > 1 else 1)
        if window is None:
            return on_device, {EVERY: strip()}
        if not window.hybrid:
            return on_device, {EVERY: strip(window.size)}
        return on_device, {"full_attention": strip(), "sliding_attention": strip(window.size)}

    def _span_of(self, rows: int) -> int:
        return -(-rows // self._span) * self._span

    def _set_length(self, length: int) -> None:
        self.length = length
        self._position.fill_(length)

    def _make_room(self, rows: int) -> None:
        if rows > self.cache.rows.shape[2]:
            held = self.cache.rows
            self._allocate(self._span_of(rows))
            self.cache.rows[:, :, : held.shape[2]] = held

    def _allocate(self, capacity: int) -> None:
        """A cache of `capacity` rows. Graphs know addresses, so those of another cache are of no use."""
        tensors, heads, width = self._row_shape
        # Zeros: what is masked still enters sums with weight 0, and 0 * NaN would be NaN.
        rows = torch.zeros((tensors, heads, capacity, width), dtype=self.base.dtype, device=self.base.device)
        self.cache = StaticTreeCache(rows)
        self._columns = torch.arange(capacity, device=self.base.device)
        self._steps.clear()
        self._passes.clear()


def fastest(base: Base) -> Runner:
    """On a GPU static shapes and CUDA graphs where the model takes them, else the growing cache."""
    if base.device.type != "cuda":
        return EagerRunner(base)
    capture = CudaGraphs()
    reason = reason_against_static(base, capture)
    return StaticRunner(base, capture) if reason is None else EagerRunner(base, reason)


@torch.inference_mode()
def reason_against_static(base: Base, capture: Capture | None = None) -> str | None:
    """Why this base cannot run with static shapes, in a sentence: by its config, or by trying it. None if it can."""
    name = type(base.model).__name__
    if base.rope[0] == "dynamic" or base.rereads_at is not None:
        return f"{name} changes its rotary angles with the length of the text, which fixed kernels cannot follow."
    if isinstance(shape := row_shape(base), str):
        return shape
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, base.vocab, (PROBE.nodes,), generator=generator).to(base.device)
    try:
        with narrow_window(base):
            runner = StaticRunner(base, capture)
            for length in PROBE_LENGTHS:
                ids = torch.randint(0, base.vocab, (length,), generator=generator).tolist()
                if reason := disagreement(runner, ids, tokens):
                    return f"With static shapes {reason}"
            runner.prepare(None, ROOT_ONLY, GREEDY, range(1, 2))
    except Exception as error:  # any failure here is an answer: this model does not run that way
        return f"{name} does not run with static shapes ({type(error).__name__})."
    return None
